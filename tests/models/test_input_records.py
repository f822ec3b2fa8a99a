"""Covariances of a layer's other inputs, against activations that hooks of our own keep."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seap_ray.core.inputs import INPUTS, input_modules
from seap_ray.core.moments import Covariance, pooled_covariance
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import record
from seap_ray.models.input_records import PooledInputs, input_covariance_bytes, inputs_file
from seap_ray.models.loading import decoder_of
from seap_ray.models.records import save_covariances, save_moments
from tests.support.builders import (
    CONFIGS,
    HYBRIDS,
    MIXTURES,
    MORE_CONFIGS,
    SHARDS,
    layerwise,
    load,
    prompts,
    recorded_by,
)
from tests.support.oracles import assert_equal

SEQUENCES = prompts([9, 30, 4, 17, 22], seed=3)
OTHERS = (*MIXTURES, *HYBRIDS, "gemma4", "gemma4_sharing")
FAMILIES = [name for name in CONFIGS | MORE_CONFIGS if name not in OTHERS]
"""Models whose inputs are recorded: mixtures and those of other parts are not quantised."""


@torch.no_grad()
def kept(model: Any, modules: list[str], layer: int) -> list[torch.Tensor]:
    """What each of some modules of a layer is given, token by token."""
    seen: dict[str, list[torch.Tensor]] = {module: [] for module in modules}
    block = decoder_of(model).layers[layer]
    for module in modules:
        block.get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, module=module: seen[module].append(inputs[0].flatten(0, -2))
        )
    for sequence in SEQUENCES:
        model(input_ids=torch.tensor([sequence]), use_cache=False)
    return [torch.cat(parts) for parts in seen.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_are_what_every_module_that_reads_them_is_given(dense: Any, name: str, float64_norms: None) -> None:
    folder = dense(name, torch.float64)
    architecture = Checkpoint.open(str(folder)).architecture
    settings = {"batch_tokens": 50, "covariances": range(architecture.n_layers)}
    recorded = record(load(folder), SEQUENCES, inputs=True, **settings)

    for site, modules in input_modules(architecture.family).items():
        for layer in (0, 3):
            covariance = recorded[layer, site]
            for x_ND in kept(load(folder), [*modules], layer):
                assert covariance.count == len(x_ND)
                torch.testing.assert_close(covariance.mean_D, x_ND.mean(0), rtol=1e-9, atol=1e-9)
                deviation_ND = x_ND - x_ND.mean(0)
                assert isinstance(covariance, Covariance)
                torch.testing.assert_close(covariance.comoment_DD, deviation_ND.T @ deviation_ND, rtol=1e-9, atol=1e-9)

    # What is recorded otherwise is the same with them and without.
    others = {key: part for key, part in recorded.items() if key[1] not in INPUTS}
    assert_equal(others, record(load(folder), SEQUENCES, **settings))


def test_layers_without_covariances_have_none_of_their_inputs(dense: Any) -> None:
    recorded = record(load(dense("llama_gqa")), SEQUENCES, batch_tokens=50, covariances=(1,), inputs=True)
    assert [key for key in recorded if key[1] in INPUTS] == [(1, site) for site in INPUTS]


def test_inputs_are_the_same_bytes_layer_by_layer(dense: Any) -> None:
    folder = dense("llama_gqa")
    found = recorded_by(layerwise(folder), covariance=True, inputs=True)
    for shard, sequences in SHARDS.items():
        expected = record(load(folder), sequences, batch_tokens=40, covariances=range(4), inputs=True)
        assert_equal(found[shard], expected)


def test_inputs_of_several_tasks_are_read_as_one_stream(dense: Any, tmp_path: Path) -> None:
    folder = dense("llama_gqa")
    architecture = Checkpoint.open(str(folder)).architecture
    assert input_covariance_bytes(architecture) == 4 * 2 * 48 * 48

    sources = []
    parts = []
    for i, sequences in enumerate((SEQUENCES, SEQUENCES[:2])):
        recorded = record(load(folder), sequences, batch_tokens=50, covariances=range(4), inputs=True)
        of_layer = {site: recorded[2, site] for site in INPUTS}
        sources.append(tmp_path / f"{i}.safetensors")
        save_moments(inputs_file(sources[-1]), {(2, site): part for site, part in of_layer.items()})  # type: ignore[arg-type]
        save_covariances(inputs_file(sources[-1]), 2, of_layer)  # type: ignore[arg-type]
        parts.append(of_layer["mlp_in"])

    pooled = PooledInputs(tuple(sources), (3.0, 1.0))[2, "mlp_in"]  # type: ignore[arg-type]
    expected = pooled_covariance(parts, (3.0, 1.0))  # type: ignore[arg-type]
    torch.testing.assert_close(pooled.mean_D, expected.mean_D, rtol=1e-9, atol=0)
    # Stored in float32.
    torch.testing.assert_close(pooled.comoment_DD, expected.comoment_DD.double(), rtol=1e-5, atol=1e-4)
