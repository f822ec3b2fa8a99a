"""Cut costs: slopes of the divergence, against differences of a model whose weights are changed by hand."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from torch import Tensor

from seap_ray.config import Config
from seap_ray.core.plan import Kept, Plan
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.cut_costs import CutCosts, measure_cut_costs
from seap_ray.models.cut_layer import cut_parameters
from seap_ray.models.divergence import measure_divergence
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import OpenedLayers
from seap_ray.models.loading import decoder_of
from tests.support.builders import CONFIGS, HYBRIDS, load, prompts, random_plan, random_statistics, save_dense

SEQUENCES = prompts([3, 17, 30, 9, 2, 24], seed=1)
STEP = 0.004


def opened(folder: Path, name: str) -> Checkpoint:
    """Write a random model and open it; tokens go to all experts, since a slope tells of no change of experts."""
    save_dense(folder, name, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    if n_experts := config.get("num_local_experts") or config.get("num_experts"):
        config["num_experts_per_tok"] = n_experts
        (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(str(folder))


def layers_of(checkpoint: Checkpoint, placement: str = "single") -> OpenedLayers:
    """Open the model in batches of several rows."""
    config = Config(model={"source": str(checkpoint.folder)}, calibration={"placement": placement, "batch_tokens": 64})
    return OpenedLayers.open(config, checkpoint)


def measured(layers: OpenedLayers, export: CheckpointExport) -> CutCosts:
    """Measure a cut model on ``SEQUENCES``."""
    batches = layers.embed(SEQUENCES)
    return measure_cut_costs(layers.model, layers.forwards(), layers.backwards(), batches, export)


def compensated_plan(checkpoint: Checkpoint, compensation: str = "mean") -> CheckpointExport:
    """Cut a model at random, compensated by random means."""
    plan = random_plan(checkpoint.architecture, 1, compensation)
    return CheckpointExport(checkpoint, plan, random_statistics(checkpoint.architecture, seed=3))


def divergence_between(dense: Any, changed: Any) -> float:
    """Return the divergence a token of a changed model, sequence by sequence."""
    total = 0.0
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence])
        with torch.no_grad():
            p, q = (torch.log_softmax(model(ids).logits[0, :-1].double(), -1) for model in (dense, changed))
        total += float((p.exp() * (p - q)).sum())
    return total / sum(len(sequence) - 1 for sequence in SEQUENCES)


def set_parameters(block: Any, parameters: dict[str, Tensor]) -> None:
    """Give a layer's modules other parameters."""
    for path, tensor in parameters.items():
        module, _, kind = path.rpartition(".")
        setattr(block.get_submodule(module), kind, torch.nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("name", [*CONFIGS, *HYBRIDS])
def test_the_cost_of_a_cut_is_half_the_slope_of_the_divergence_towards_the_whole_site(
    name: str, tmp_path: Path
) -> None:
    checkpoint = opened(tmp_path, name)
    export = compensated_plan(checkpoint)
    layers = layers_of(checkpoint)
    found = measured(layers, export)

    dense, changed = layers.model, deepcopy(layers.model)
    family = checkpoint.architecture.family
    wholes: list[dict[str, Tensor]] = []
    cuts: list[dict[str, Tensor]] = []
    for layer, block in enumerate(decoder_of(changed).layers):
        is_cut = export.plan.cuts(layer, checkpoint.architecture)
        cut = cut_parameters(block, export, layer) if is_cut else {}
        own = dict(block.named_parameters())
        wholes.append({path: own.get(path, torch.zeros_like(tensor)).clone() for path, tensor in cut.items()})
        cuts.append(cut)
        set_parameters(block, cut)
    assert found.divergence.rise.mean == pytest.approx(divergence_between(dense, changed), rel=1e-3)

    costs = found.costs()
    # Divergences curve more where states carry a change on.
    step = STEP / 4 if name in HYBRIDS else STEP
    for (layer, site), cost in costs.items():
        is_here = {path: (path.rpartition(".")[0] == family.o_proj) == (site == "attn") for path in cuts[layer]}
        ends: list[float] = []
        for alpha in (step, -step):
            nearer: dict[str, Tensor] = {}
            for path, here in is_here.items():
                nearer[path] = torch.lerp(cuts[layer][path], wholes[layer][path], alpha * here)
            set_parameters(decoder_of(changed).layers[layer], nearer)
            ends.append(divergence_between(dense, changed))
        set_parameters(decoder_of(changed).layers[layer], cuts[layer])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert cost.mean == pytest.approx(-slope / 2, rel=0.03, abs=2e-4 * found.divergence.rise.mean + 1e-7)
    assert costs, "something is cut"


def test_the_costs_of_all_sites_add_up_to_the_divergence_of_small_cuts(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "llama_gqa")
    architecture = checkpoint.architecture
    statistics = random_statistics(architecture, seed=3)
    # Whole widths but for one channel of each layer, whose weights are small.
    model = load(checkpoint.folder)
    for block in decoder_of(model).layers:
        block.mlp.down_proj.weight.data[:, 0] *= 0.05
    model.save_pretrained(checkpoint.folder)
    checkpoint = Checkpoint.open(str(checkpoint.folder))
    kept = [Kept.whole(architecture, layer) for layer in range(architecture.n_layers)]
    narrow = tuple(replace(whole, channels=(whole.channels[0][1:],)) for whole in kept)
    plan = replace(random_plan(architecture, 1, "none"), kept=narrow)

    found = measured(layers_of(checkpoint), CheckpointExport(checkpoint, plan, statistics))

    costs = found.costs()
    assert costs.keys() == {(layer, "mlp") for layer in range(architecture.n_layers)}
    assert sum(cost.mean for cost in costs.values()) == pytest.approx(found.divergence.rise.mean, rel=0.05)


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mixtral", "gpt_neox", "falcon_h1", "nemotron_h"])
def test_a_streamed_model_gives_the_same_costs_and_divergences(name: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, name)
    export = compensated_plan(checkpoint)
    single, stream = layers_of(checkpoint), layers_of(checkpoint, "stream")

    first, second = measured(single, export), measured(stream, export)

    assert first.sums.keys() == second.sums.keys()
    for key, sums_N in first.sums.items():
        torch.testing.assert_close(second.sums[key], sums_N, rtol=1e-4, atol=1e-8)
    (alone,) = measure_divergence(stream.model, stream.forwards(), stream.embed(SEQUENCES), [export])
    torch.testing.assert_close(alone.sums_N, first.divergence.sums_N, rtol=1e-4, atol=1e-8)


def test_what_is_whole_has_no_cost_and_dropped_layers_are_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "llama_gqa")
    architecture = checkpoint.architecture
    whole_L = [Kept.whole(architecture, layer) for layer in range(architecture.n_layers)]
    compensation = random_plan(architecture, 1).compensation
    layers = layers_of(checkpoint)

    nothing = measured(layers, CheckpointExport(checkpoint, Plan("whole", 0.0, compensation, tuple(whole_L), {})))
    assert nothing.divergence.rise.mean == 0
    assert nothing.costs() == {}

    dropped = Plan("depth", 0.25, compensation, tuple(whole_L[:-1]), {}, dropped=(architecture.n_layers - 1,))
    with pytest.raises(ValueError, match="dropped layer"):
        measured(layers, CheckpointExport(checkpoint, dropped))


def test_costs_are_kept_by_sequence(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "llama_gqa")
    found = measured(layers_of(checkpoint), compensated_plan(checkpoint))
    n = len(found.divergence.tokens_N)
    halves = [found.costs(slice(0, n // 2)), found.costs(slice(n // 2, n))]
    tokens = [float(found.divergence.tokens_N[part].sum()) for part in (slice(0, n // 2), slice(n // 2, n))]
    for key, cost in found.costs().items():
        parts = [half[key].mean * n_tokens for half, n_tokens in zip(halves, tokens, strict=True)]
        assert cost.mean == pytest.approx(sum(parts) / sum(tokens))


def test_modules_with_hooks_of_a_model_spread_over_devices_give_the_same_costs(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "llama_gqa")
    export = compensated_plan(checkpoint)
    layers = layers_of(checkpoint)
    plain = measured(layers, export)

    # What device_map attaches to every module with weights.
    for block in decoder_of(layers.model).layers:
        attach_execution_device_hook(block, "cpu")
    hooked = measured(layers, export)

    assert plain.divergence.rise.mean == pytest.approx(hooked.divergence.rise.mean)
    assert plain.costs() == hooked.costs()
