"""Layerwise: runs of a model that is read one layer at a time, and what they are compared with."""

from pathlib import Path

import torch

from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.layerwise import LayerwiseModel
from tests.support.oracles import RAGGED, prompts

SHARDS = {"sort/00000": RAGGED, "sort/00001": RAGGED[:1], "logic/00000": prompts([4, 4, 4], seed=1)}


def layerwise(folder: Path, dtype: torch.dtype = torch.float32, room: int = 1 << 30) -> LayerwiseModel:
    return LayerwiseModel(Checkpoint.open(str(folder)), dtype, torch.device("cpu"), room)


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
