"""A model read layer by layer finds what the whole model finds, to the byte, and never holds more than two layers."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from test_recorder import RAGGED, prompts
from transformers import AutoModelForCausalLM

from seap_ray.checkpoint import Checkpoint
from seap_ray.errors import DataError
from seap_ray.layerwise import LayerwiseModel
from seap_ray.recorder import record

SHARDS = {"sort/00000": RAGGED, "sort/00001": RAGGED[:1], "logic/00000": prompts([4, 4, 4], seed=1)}


def layerwise(folder: Path, dtype: torch.dtype = torch.float32, hidden_room: int = 1 << 30) -> LayerwiseModel:
    return LayerwiseModel(Checkpoint.open(str(folder)), dtype, torch.device("cpu"), hidden_room)


def found_by(model: LayerwiseModel, shards: dict = SHARDS, **settings) -> dict:
    found: dict = {shard: {} for shard in shards}
    for shard, recorded in model.record(shards, **{"batch_tokens": 40, **settings}):
        assert not found[shard].keys() & recorded.keys()
        found[shard] |= recorded
    return found


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, moments in other.items():
        assert type(one[key]) is type(moments) and one[key].count == moments.count
        for part in ("mean_D", "m2_D", *(["comoment_DD"] if hasattr(moments, "comoment_DD") else [])):
            assert torch.equal(getattr(one[key], part), getattr(moments, part)), (key, part)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "float16 in float32", "bfloat16"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_covariances_are_the_bytes_of_the_whole_model(dense, name, stored, dtype):
    folder = dense(name, stored)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for settings in ({}, {"skip_first_token": True}):
        found = found_by(layerwise(folder, dtype), covariance=True, **settings)
        for shard, sequences in SHARDS.items():
            expected = record(whole, sequences, batch_tokens=40, covariances=range(4), **settings)
            assert_equal(found[shard], expected)


def test_files_of_any_number_and_hidden_states_on_the_host_change_nothing(dense):
    one, many = dense("llama_gqa"), dense("llama_gqa", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    expected = found_by(layerwise(one))
    for model in (layerwise(many), layerwise(one, hidden_room=0)):
        for shard, recorded in found_by(model).items():
            assert_equal(recorded, expected[shard])


def test_two_layers_are_in_memory_at_most_whatever_the_depth(dense, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most, made, read = 0, 0, LayerwiseModel._block

    def counted(self, empty, layer):
        nonlocal most, made
        most = max(most, len(alive) + 1)  # and this one
        block = read(self, empty, layer)
        alive.add(block.mlp.down_proj.weight)
        made += 1
        return block

    monkeypatch.setattr(LayerwiseModel, "_block", counted)
    found_by(layerwise(dense("llama_gqa")))
    assert (made, most) == (4, 2)


def test_activations_that_are_not_finite_are_told_with_their_shard(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][39, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shards = {"sort/00000": [[5, 6]], "sort/00001": [[5, 39]]}
    with pytest.raises(DataError, match="shard sort/00001: activations of layer 0, site attn, are not finite"):
        found_by(layerwise(folder), shards)
