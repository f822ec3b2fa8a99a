"""A model read layer by layer finds what the whole model finds, to the byte, and never holds more than two layers."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from seap_ray.config import Config
from seap_ray.errors import ConfigError, DataError
from seap_ray.models.batching import Batch
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import record
from seap_ray.models.hidden_states import HiddenBatch
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.loading import attention_of, load_model
from seap_ray.models.sequences import CountedSequence
from tests.support.builders import CONFIGS, SHARDS, layerwise, recorded_by
from tests.support.oracles import assert_equal


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "float16 in float32", "bfloat16"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_covariances_are_the_bytes_of_the_whole_model(dense, name, stored, dtype):
    folder = dense(name, stored)
    attention = "eager" if name == "gemma2" else None  # which has a soft cap
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    for settings in ({}, {"skip_first_token": True}):
        found = recorded_by(layerwise(folder, dtype), covariance=True, **settings)
        for shard, sequences in SHARDS.items():
            expected = record(whole, sequences, batch_tokens=40, covariances=range(4), **settings)
            assert_equal(found[shard], expected)


def test_tokens_that_count_are_those_of_the_whole_model(dense):
    folder = dense("llama_gqa")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    marked = {shard: [CountedSequence(ids, [i % 3 > 0 for i in ids]) for ids in SHARDS[shard]] for shard in SHARDS}
    marked["none/00000"] = [CountedSequence([5, 6, 7], [False] * 3)]
    found = recorded_by(layerwise(folder), marked)
    for shard, sequences in marked.items():
        assert_equal(found[shard], record(whole, sequences, batch_tokens=40))
    assert found["none/00000"][0, "attn"].count == 0


def test_a_model_in_many_files_is_the_same_model(dense):
    one, many = dense("llama_gqa"), dense("llama_gqa", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    expected = recorded_by(layerwise(one))
    for shard, recorded in recorded_by(layerwise(many)).items():
        assert_equal(recorded, expected[shard])


def test_hidden_states_wait_on_the_host_where_the_device_has_no_room_for_all_of_them(dense):
    checkpoint, device = Checkpoint.open(str(dense("llama_gqa"))), torch.device("meta")
    of_batches = {"one": [[[[1] * 7, [1] * 13]], [[[1] * 5]]], "other": [[[[1] * 4], [[1] * 9]]]}  # rows of 20, 5, 4, 9
    needed = 38 * (48 * 4 + 20)
    for room, home in ((needed, device), (needed - 1, torch.device("cpu"))):
        assert LayerwiseModel(checkpoint, torch.float32, device, room)._waiting_device(of_batches) == home


def test_what_layers_share_is_moved_once():
    mask, rotary = torch.ones(2), (torch.ones(3), torch.zeros(3))
    named = {"attention_mask": mask, "position_embeddings": rotary, "use_cache": False, "past_key_values": None}
    one = HiddenBatch(Batch.of([[[1, 2]]], False, torch.device("cpu")), [[[1, 2]]], torch.ones(1), [named, dict(named)])
    there = one.to(torch.device("meta"))
    assert there.hidden_BTD.device.type == "meta" and there.arguments_L[0]["use_cache"] is False
    for key in ("attention_mask", "position_embeddings"):
        first, second = (of[key] for of in there.arguments_L)
        tensors = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
        assert all(a is b and a.device.type == "meta" for a, b in tensors)


def test_a_batch_that_does_not_fit_names_the_key_to_halve(dense, monkeypatch):
    def full(*_args, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", full)
    with pytest.raises(
        ConfigError, match=r"calibration.batch_tokens: cpu has no room for a batch of \d+ tokens; halve it"
    ):
        recorded_by(layerwise(dense("llama_gqa")))


def test_two_layers_are_in_memory_at_most_whatever_the_depth(dense, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most, made, read = 0, 0, LayerwiseModel._read_layer

    def counted(self, empty, layer):
        nonlocal most, made
        most = max(most, len(alive) + 1)  # and this one
        block = read(self, empty, layer)
        alive.add(block.mlp.down_proj.weight)
        made += 1
        return block

    monkeypatch.setattr(LayerwiseModel, "_read_layer", counted)
    recorded_by(layerwise(dense("llama_gqa")))
    assert (made, most) == (4, 2)


def test_activations_that_are_not_finite_are_told_with_their_shard(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][39, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shards = {"sort/00000": [[5, 6]], "sort/00001": [[5, 39]]}
    with pytest.raises(DataError, match="shard sort/00001: activations of layer 0, site attn, are not finite"):
        recorded_by(layerwise(folder), shards)


def test_attention_with_a_soft_cap_is_run_with_it(dense):
    """transformers' usual attention leaves Gemma 2's cap out, without a word."""
    config = Config.model_validate({"model": {"source": str(dense("gemma2"))}})
    model = load_model(config, checkpoint := Checkpoint.open(str(dense("gemma2"))), checkpoint.folder)
    assert model.config._attn_implementation == "eager" and attention_of(checkpoint.config) == "eager"
    assert attention_of(Checkpoint.open(str(dense("llama_gqa"))).config) is None
