"""Error correction, against models on disk that are run sequence by sequence and corrected by numpy."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.correction import CORRECTION_RIDGES
from seap_ray.core.families import FAMILIES
from seap_ray.core.plan import Kept
from seap_ray.models.batching import make_batches
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.divergence import measure_divergence
from seap_ray.models.error_correction import Stream, correct_errors, is_correctable
from seap_ray.models.export import CheckpointExport, Corrections
from seap_ray.models.forward import record
from seap_ray.models.hidden_states import embed
from seap_ray.models.loading import decoder_of
from tests.support.builders import (
    CONFIGS,
    MORE_CONFIGS,
    load,
    output_modules,
    prompts,
    random_plan,
    save_dense,
    write_compacted,
)
from tests.support.oracles import tensors_of

RIDGE = 1e-2
CORRECTABLE = [name for name in CONFIGS if name not in ("gemma2", "gemma3", "mixtral", "qwen3_moe")]
TASKS = {"long": (prompts([40, 33, 28, 37, 30, 25, 44], seed=1), 3.0), "short": (prompts([9, 2, 24, 5], seed=2), 1.0)}
"""Sequences of two tasks, with what each counts."""


class Covariances(dict):  # type: ignore[type-arg]
    """What a model's activations were measured to be, each with one ridge."""

    def ridge_of(self, _key: Any) -> float:
        return RIDGE


def cut_model(
    folder: Path, name: str, dtype: torch.dtype = torch.float64, compensation: str = "least_squares"
) -> CheckpointExport:
    """A random model with a plan of other widths in every layer, repaired by least squares."""
    save_dense(folder, name, dtype)
    checkpoint = Checkpoint.open(str(folder))
    architecture = checkpoint.architecture
    sequences = [sequence for task, _ in TASKS.values() for sequence in task]
    statistics = record(load(folder), sequences, batch_tokens=128, covariances=range(architecture.n_layers))
    plan = random_plan(architecture, 1, compensation)
    return CheckpointExport(checkpoint, plan, Covariances(statistics))  # type: ignore[arg-type]


def fitted(
    export: CheckpointExport, share: float | None, *, skip_first: bool = False, n_held_out: int = 0
) -> dict[int, dict[str, torch.Tensor]]:
    """Fit corrections in packed batches of several rows."""
    model = load(export.base.folder)
    decoder = decoder_of(model)
    streams: list[Stream] = []
    for sequences, weight in TASKS.values():
        rows = make_batches(decoder, sequences, 64)
        batches = [embed(decoder, each, skip_first, torch.device("cpu")) for each in rows]
        streams.append(Stream(batches, weight, n_held_out))
    return dict(correct_errors(decoder.layers, streams, export, share=share, ridge=RIDGE))


def with_corrections(export: CheckpointExport, corrections: Corrections) -> CheckpointExport:
    return replace(export, corrections=corrections)


@torch.no_grad()
def traced(model: Any, layer: int, sequences: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What comes into ``down_proj`` of a layer, and what the layer hands on, of every token of some sequences."""
    block = decoder_of(model).layers[layer]
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    down_proj = block.get_submodule(output_modules(model)["mlp"])
    hooks = [
        down_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0].reshape(-1, given[0].shape[-1]))),
        block.register_forward_hook(
            lambda _, __, out: outputs.append((out[0] if isinstance(out, tuple) else out).flatten(0, -2))
        ),
    ]
    for sequence in sequences:
        model(input_ids=torch.tensor([sequence]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat(inputs).numpy(), torch.cat(outputs).numpy()


@torch.no_grad()
def correct_on_disk(export: CheckpointExport, folder: Path, share: float) -> Any:
    """The checkpoint without corrections, then corrected layer by layer in memory, by weighted ridge regression."""
    dense, cut = load(export.base.folder), load(write_compacted(export, folder))
    for layer in range(export.base.architecture.n_layers):
        if not export.compensates(layer):
            continue
        inputs, errors, weights = [], [], []
        for sequences, weight in TASKS.values():
            x_NS, cut_NO = traced(cut, layer, sequences)
            _, dense_NO = traced(dense, layer, sequences)
            inputs.append(x_NS)
            errors.append(dense_NO - cut_NO)
            weights += [weight / len(x_NS)] * len(x_NS)
        x_NS, error_NO, weight_N = np.concatenate(inputs), np.concatenate(errors), np.array(weights) / sum(weights)
        mean_S, mean_O = weight_N @ x_NS, weight_N @ error_NO
        root_N1 = np.sqrt(weight_N)[:, None]
        variance_S = weight_N @ (x_NS - mean_S) ** 2
        if not export.plan.compensation.adds_biases:
            mean_S, mean_O = np.zeros_like(mean_S), np.zeros_like(mean_O)
        # A ridge is rows of data that say zero.
        rows = np.concatenate([root_N1 * (x_NS - mean_S), np.diag(np.sqrt(RIDGE * variance_S))])
        wanted = np.concatenate([root_N1 * (error_NO - mean_O), np.zeros((len(mean_S), error_NO.shape[1]))])
        weight_SO = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        down_proj = decoder_of(cut).layers[layer].get_submodule(output_modules(cut)["mlp"])
        down_proj.weight += share * torch.tensor(weight_SO.T)
        if export.plan.compensation.adds_biases:
            down_proj.bias += share * torch.tensor(mean_O - weight_SO.T @ mean_S)
    return cut


WITH_BIAS = [(name, "least_squares") for name in CORRECTABLE]


@pytest.mark.parametrize(("name", "compensation"), [*WITH_BIAS, ("llama_gqa", "least_squares_without_bias")])
def test_corrections_are_the_regressions_of_each_layers_error_on_what_comes_into_down_proj(
    name: str, compensation: str, tmp_path: Path, float64_norms: None
) -> None:
    export = cut_model(tmp_path / "base", name, compensation=compensation)
    expected = dict(correct_on_disk(export, tmp_path / "plain", 0.5).named_parameters())

    corrected = with_corrections(export, fitted(export, 0.5))

    plain = tensors_of(tmp_path / "plain")
    tensors = tensors_of(write_compacted(corrected, tmp_path / "cut"))
    changed = [key for key in tensors if not torch.equal(tensors[key], plain[key])]
    down_proj = export.base.architecture.family.down_proj
    cut_layers = [layer for layer in range(export.base.architecture.n_layers) if export.compensates(layer)]
    assert len(changed) == len(export.plan.compensation.replaces) * len(cut_layers), "weight, and bias if there is one"
    assert all(down_proj in key for key in changed)
    for key in changed:
        # Corrections are float32.
        assert (tensors[key] - expected[key]).abs().max() < 1e-5 * expected[key].abs().max(), key


def test_corrections_lessen_the_error_of_what_layers_hand_on_and_a_share_of_0_changes_nothing(tmp_path: Path) -> None:
    export = cut_model(tmp_path / "base", "llama_gqa")
    sequences = [sequence for task, _ in TASKS.values() for sequence in task]
    dense = load(export.base.folder)
    last = export.base.architecture.n_layers - 1

    errors: dict[float, float] = {}
    for share in (0.0, 0.5, 1.0):
        corrected = with_corrections(export, fitted(export, share))
        cut = load(write_compacted(corrected, tmp_path / f"{share}"))
        errors[share] = float(np.square(traced(dense, last, sequences)[1] - traced(cut, last, sequences)[1]).sum())

    assert errors[1.0] < errors[0.5] < errors[0.0]
    plain = tensors_of(write_compacted(export, tmp_path / "plain"))
    unchanged = tensors_of(tmp_path / "0.0")
    assert all(torch.equal(unchanged[key], plain[key]) for key in plain)


def test_tokens_that_do_not_count_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = cut_model(tmp_path / "base", "llama_mha")

    whole, skipped = fitted(export, 0.5), fitted(export, 0.5, skip_first=True)
    assert not torch.allclose(whole[2]["weight"], skipped[2]["weight"])
    # Sequences of one token each: none counts.
    monkeypatch.setitem(TASKS, "long", ([[3], [5]], 3.0))
    monkeypatch.setitem(TASKS, "short", ([[7]], 1.0))
    assert all(not tensor.any() for layer in fitted(export, 0.5, skip_first=True).values() for tensor in layer.values())


def test_a_corrected_model_is_judged_with_its_corrections_before_it_is_written(tmp_path: Path) -> None:
    export = cut_model(tmp_path / "base", "qwen2", torch.float32)
    corrected = with_corrections(export, fitted(export, 0.5))
    model = load(export.base.folder)
    decoder = decoder_of(model)
    sequences = TASKS["short"][0]
    batches = [embed(decoder, rows, False, torch.device("cpu")) for rows in make_batches(decoder, sequences, 64)]

    plain, judged = measure_divergence(model, decoder.layers, batches, [export, corrected])

    cut = load(write_compacted(corrected, tmp_path / "cut"))
    total = 0.0
    with torch.no_grad():
        for sequence in sequences:
            ids_BT = torch.tensor([sequence])
            dense_TV, cut_TV = (torch.log_softmax(each(ids_BT).logits[0, :-1].double(), -1) for each in (model, cut))
            total += float((dense_TV.exp() * (dense_TV - cut_TV)).sum())
    assert judged.rise.mean == pytest.approx(total / sum(len(s) - 1 for s in sequences), rel=1e-3)
    assert judged.rise.mean < plain.rise.mean


def test_a_layer_that_stays_whole_is_not_corrected(tmp_path: Path) -> None:
    export = cut_model(tmp_path / "base", "llama_gqa", torch.float32)
    architecture = export.base.architecture
    kept = [Kept.whole(architecture, layer) for layer in range(architecture.n_layers)]
    kept[2] = export.plan.kept[2]
    export = replace(export, plan=replace(export.plan, kept=tuple(kept)))

    assert [*fitted(export, 0.5)] == [2]


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_least_squares_makes_and_the_residual_stream_gets_as_it_is_can_be_corrected(
    name: str, tmp_path: Path
) -> None:
    save_dense(tmp_path, name, torch.float32)
    architecture = Checkpoint.open(str(tmp_path)).architecture
    plan = random_plan(architecture, 1, "none")

    assert not is_correctable(plan, architecture)
    assert not is_correctable(replace(plan, compensation=COMPENSATIONS["mean"]), architecture)
    for repair in ("least_squares", "least_squares_without_bias"):
        repaired = replace(plan, compensation=COMPENSATIONS[repair])
        assert is_correctable(repaired, architecture) == (name in CORRECTABLE)


NORMS_BEHIND = ("post_feedforward", "post_mlp_layernorm", "post_norm2")
"""Beginnings of the names of such norms in transformers."""


def test_families_with_something_behind_the_mlp_are_marked() -> None:
    marked = {name: row.behind_mlp for name, row in FAMILIES.items() if row.behind_mlp}
    found = {}
    for config in [make() for make in (MORE_CONFIGS | CONFIGS).values()]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if hasattr(config, "residual_multiplier") or hasattr(config, "mlp_multipliers"):
            found[config.model_type] = "a multiplier"
        if any(name.rpartition(".")[2].startswith(NORMS_BEHIND) for name, _ in model.named_modules()):
            found[config.model_type] = "a norm"
    assert marked == found


def test_a_share_is_chosen_for_each_layer_on_held_out_batches(tmp_path: Path) -> None:
    export = cut_model(tmp_path / "dense", "llama_gqa")
    chosen = fitted(export, None, n_held_out=1)
    whole = {ridge: dict(fitted_with(export, ridge)) for ridge in CORRECTION_RIDGES}
    first = min(chosen)
    # Only the first cut layer sees the same model whatever the share; its correction is a part of one ridge's whole.
    ratios = {}
    for ridge, corrections in whole.items():
        ratio = chosen[first]["weight"] / corrections[first]["weight"]
        ratios[ridge] = (float(ratio.median()), float(ratio.std()))
    share, spread = min(ratios.values(), key=lambda pair: pair[1])
    assert spread < 1e-4 and 0 < share < 1


def fitted_with(export: CheckpointExport, ridge: float) -> dict[int, dict[str, torch.Tensor]]:
    """Whole corrections with a ridge."""
    decoder = decoder_of(load(export.base.folder))
    streams: list[Stream] = []
    for sequences, weight in TASKS.values():
        rows = make_batches(decoder, sequences, 64)
        streams.append(Stream([embed(decoder, each, False, torch.device("cpu")) for each in rows], weight))
    return dict(correct_errors(decoder.layers, streams, export, share=1.0, ridge=ridge))


def test_without_held_out_batches_nothing_is_corrected_by_itself(tmp_path: Path) -> None:
    export = cut_model(tmp_path / "dense", "llama_gqa")
    for correction in fitted(export, None).values():
        assert not any(tensor.any() for tensor in correction.values())
