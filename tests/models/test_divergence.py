"""Divergence: what is measured of cut models without writing them, against the written checkpoints themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seap_ray.core.plan import Kept, Plan
from seap_ray.models.batching import make_batches
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.divergence import Divergence, measure_divergence
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hidden_states import embed
from seap_ray.models.loading import decoder_of
from tests.support.builders import (
    CONFIGS,
    load,
    logits,
    prompts,
    random_covariances,
    random_plan,
    random_statistics,
    save_dense,
    write_compacted,
)

SEQUENCES = prompts([3, 17, 30, 9, 2, 24], seed=1)


def opened(folder: Path, name: str) -> Checkpoint:
    """Write a random model and open it."""
    save_dense(folder, name, torch.float32)
    return Checkpoint.open(str(folder))


def measured(checkpoint: Checkpoint, exports: list[CheckpointExport]) -> list[Divergence]:
    """Measure cut models on ``SEQUENCES``, in batches of several rows."""
    model = load(checkpoint.folder)
    decoder = decoder_of(model)
    device = torch.device("cpu")
    batches = [embed(decoder, rows, False, device) for rows in make_batches(decoder, SEQUENCES, 64)]
    return measure_divergence(model, decoder.layers, batches, exports)


def log_probabilities(folder: Path, sequence: list[int]) -> Tensor:
    """Return what a model on disk predicts after each token but the last, by one sequence alone."""
    return torch.log_softmax(logits(load(folder), torch.tensor([sequence]))[0, :-1].double(), -1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("compensation", ["none", "mean", "least_squares_without_bias"])
def test_divergence_is_that_of_the_written_checkpoint(name: str, compensation: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "base", name)
    random_of = random_covariances if compensation.startswith("least_squares") else random_statistics
    statistics = random_of(checkpoint.architecture, 3)
    plans = [random_plan(checkpoint.architecture, seed, compensation) for seed in (1, 2)]
    exports = [CheckpointExport(checkpoint, plan, statistics) for plan in plans]

    for export, divergence in zip(exports, measured(checkpoint, exports), strict=True):
        cut = write_compacted(export, tmp_path / export.plan.name / str(id(export)))
        total = loss = 0.0
        for sequence in SEQUENCES:
            dense_TV = log_probabilities(checkpoint.folder, sequence)
            cut_TV = log_probabilities(cut, sequence)
            total += float((dense_TV.exp() * (dense_TV - cut_TV)).sum())
            loss += float((dense_TV - cut_TV).gather(1, torch.tensor(sequence[1:])[:, None]).sum())

        n_tokens = sum(len(sequence) - 1 for sequence in SEQUENCES)
        assert divergence.rise.mean == pytest.approx(total / n_tokens, rel=1e-3, abs=1e-5)
        assert divergence.loss.mean == pytest.approx(loss / n_tokens, rel=1e-3, abs=1e-4)


def test_a_model_that_loses_nothing_does_not_diverge(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "llama_gqa")
    architecture = checkpoint.architecture
    whole = tuple(Kept.whole(architecture, layer) for layer in range(architecture.n_layers))
    plan = replace(random_plan(architecture, 1), kept=whole)

    (divergence,) = measured(checkpoint, [CheckpointExport(checkpoint, plan)])

    assert divergence.rise.mean == 0
    assert divergence.rise.stderr == 0


def test_a_model_without_a_layer_diverges_as_its_checkpoint_does(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "base", "llama_gqa")
    architecture = checkpoint.architecture
    kept = tuple(Kept.whole(architecture, layer) for layer in (0, 1, 3))
    plan = Plan("depth", 0.25, random_plan(architecture, 1).compensation, kept, {}, dropped=(2,))
    export = CheckpointExport(checkpoint, plan)

    (divergence,) = measured(checkpoint, [export])

    cut = write_compacted(export, tmp_path / "cut")
    total = 0.0
    for sequence in SEQUENCES:
        dense_TV = log_probabilities(checkpoint.folder, sequence)
        total += float((dense_TV.exp() * (dense_TV - log_probabilities(cut, sequence))).sum())
    assert divergence.rise.mean == pytest.approx(total / sum(len(s) - 1 for s in SEQUENCES), rel=1e-3)


def test_the_standard_error_is_that_of_a_ratio_over_sequences() -> None:
    sums_N = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    tokens_N = torch.tensor([10.0, 20.0, 10.0], dtype=torch.float64)

    divergence = Divergence(sums_N, sums_N, tokens_N)

    residual_N = sums_N - 7 / 40 * tokens_N
    assert divergence.rise.mean == pytest.approx(7 / 40)
    assert divergence.rise.stderr == pytest.approx(float((residual_N.square().sum() * 3 / 2).sqrt() / 40))
