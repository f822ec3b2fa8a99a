"""Weight norms on disk: a file of their own, float64, which shows damage."""

import torch
from safetensors.torch import load_file, save_file

from seap_ray.core.architecture import Architecture
from seap_ray.core.scores import Norms
from seap_ray.models.records import is_whole, load_norms, save_norms
from tests.support.builders import CONFIGS


def norms_of(architecture: Architecture) -> dict[tuple[int, str], Norms]:
    generator = torch.Generator().manual_seed(0)
    norms = {}
    for layer in range(architecture.n_layers):
        for site in architecture.modules(layer):
            norms[layer, site] = Norms.of(torch.rand(6, 10, generator=generator))
    return norms


def test_norms_are_read_as_they_were_written(tmp_path):
    for name in ("llama_gqa", "mixtral"):
        architecture = Architecture.of(CONFIGS[name]().to_dict())
        norms, path = norms_of(architecture), tmp_path / f"{name}.safetensors"
        save_norms(path, norms, fingerprint="abc")
        assert is_whole(path, fingerprint="abc") and not is_whole(path, fingerprint="other")
        stored = load_norms(path, architecture)
        assert stored.keys() == norms.keys()
        for key, expected in norms.items():
            assert torch.equal(stored[key].l1_D, expected.l1_D)
            assert torch.equal(stored[key].l2_squared_D, expected.l2_squared_D)


def test_a_file_of_norms_names_them_by_layer_site_and_norm(tmp_path):
    architecture = Architecture.of(CONFIGS["llama_gqa"]().to_dict())
    save_norms(tmp_path / "norms.safetensors", norms_of(architecture))
    tensors = load_file(tmp_path / "norms.safetensors")
    names = [f"layers.{i}.{site}.{norm}" for i in range(4) for site in ("attn", "mlp") for norm in ("l1", "l2_squared")]
    assert sorted(tensors) == sorted(names)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}


def test_norms_of_a_run_of_version_0_1_are_read_from_the_names_of_moments(tmp_path):
    architecture = Architecture.of(CONFIGS["llama_gqa"]().to_dict())
    norms = norms_of(architecture)
    tensors = {}
    for (layer, site), site_norms in norms.items():
        tensors[f"layers.{layer}.{site}.mean"] = site_norms.l1_D
        tensors[f"layers.{layer}.{site}.m2"] = site_norms.l2_squared_D
    save_file(tensors, tmp_path / "norms.safetensors")

    loaded = load_norms(tmp_path / "norms.safetensors", architecture)

    assert all(torch.equal(loaded[key].l1_D, norms[key].l1_D) for key in norms)
    assert all(torch.equal(loaded[key].l2_squared_D, norms[key].l2_squared_D) for key in norms)
