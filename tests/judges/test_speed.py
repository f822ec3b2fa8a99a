"""Speed: what is measured, and against what. How fast anything is, is not asserted."""

import itertools
import json

import pytest
import torch

from seap_ray.config import SpeedSection
from seap_ray.judges import speed
from seap_ray.judges.speed import measure_speeds
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from tests.support.builders import random_plan, write_compacted

SETTINGS = SpeedSection(rounds=3, batch_size=2, prompt_tokens=12, new_tokens=4)


@pytest.fixture
def clock(monkeypatch):
    """Readings, in turn, of the seconds that pass."""

    def ticks(*seconds):
        readings = itertools.accumulate(itertools.cycle(seconds))
        monkeypatch.setattr(speed, "_now", lambda: next(readings))

    return ticks


def test_rates_are_of_the_whole_batch_and_speed_ups_of_the_same_round(monkeypatch):
    seconds = {
        "dense": iter([(1.0, 2.0), (10.0, 20.0), (3.0, 6.0)]),
        "cut": iter([(0.5, 1.0), (2.5, 10.0), (3.0, 2.0)]),
    }
    monkeypatch.setattr(speed, "_random_model", lambda config, *_: config["name"])
    monkeypatch.setattr(speed, "_time", lambda name, _: next(seconds[name]))
    found = measure_speeds(
        {"dense": {"name": "dense"}, "cut": {"name": "cut"}}, SETTINGS, dense="dense", dtype=torch.float32, device="cpu"
    )
    cut = found["cut"]

    assert cut.prefill_tokens_per_s == pytest.approx(2 * 12 / 2.5)  # medians over the rounds
    assert cut.decode_tokens_per_s == pytest.approx(2 * 4 / 2.0)
    assert (cut.prefill_speedup, cut.decode_speedup) == (2.0, 2.0)  # of 2, 4, 1 and of 2, 2, 3
    assert (found["dense"].prefill_speedup, found["dense"].decode_speedup) == (1, 1)


def test_prefill_ends_with_the_prompt_and_decoding_takes_a_token_at_a_time(dense, clock):
    clock(1.0)
    model = speed._random_model(json.loads((dense("llama_gqa") / "config.json").read_text()), torch.float32, "cpu")
    lengths = []
    model.register_forward_pre_hook(lambda _m, _a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    assert speed._time(model, SETTINGS) == (1.0, 1.0)  # one reading after the other
    assert lengths == [8, 1, 1, 12, 1, 1, 1, 1]  # a short one to warm up, then what is measured


def test_a_compacted_shape_is_measured_as_it_is(dense, tmp_path):
    base = Checkpoint.open(str(dense("llama_gqa")))
    plan = random_plan(base.architecture, seed=1)
    folder = write_compacted(CheckpointExport(base, plan), tmp_path / "cut")
    model = speed._random_model(json.loads((folder / "config.json").read_text()), torch.float32, "cpu")
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths == [shape.channels for shape in plan.shapes]
