"""Where a worker has its model: chosen by what the nodes have, and the same numbers wherever it is."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.loading import load_model
from seap_ray.pipeline import placement
from seap_ray.pipeline.calibrate import MAX_GROUP_SHARDS, group_shards, n_workers
from seap_ray.pipeline.placement import with_placement
from seap_ray.pipeline.shards import Shard
from tests.support.builders import CONFIGS

GB = 10**9


def config_of(**calibration) -> Config:
    return Config.model_validate(
        {"model": {"dtype": "bfloat16"}, "calibration": calibration, "evaluation": {"samples": 0}}
    )


def checkpoint_of(parameters: float):
    return SimpleNamespace(parameters=int(parameters), config={})


def node(name: str = "node", alive: bool = True, **resources) -> dict:
    return {"Alive": alive, "Resources": resources, "NodeID": name, "NodeManagerHostname": name}


@pytest.fixture
def cluster_of(monkeypatch):
    def has(*nodes, gpus=()):
        monkeypatch.setattr(placement.ray, "nodes", lambda: list(nodes))
        monkeypatch.setattr(placement, "_gpus_of", lambda _nodes, _n: list(gpus))

    return has


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "settings", "gpus", "kind"),
    [
        (8e9, {"num_gpus": 1}, [[80 * GB]], "single"),  # 19.2 GB of 80
        (8e9, {"num_gpus": 1}, [[80 * GB], [16 * GB]], "stream"),  # the smaller GPU counts
        (70e9, {"num_gpus": 1}, [[80 * GB]], "stream"),
        (70e9, {"num_gpus": 4}, [[80 * GB] * 4], "device_map"),  # 168 GB of 320
        (70e9, {"num_gpus": 2}, [[80 * GB] * 2], "stream"),
        (8e9, {"num_gpus": 4}, [[80 * GB] * 4], "single"),
        (8e9, {"num_gpus": 0.5}, [[80 * GB]], "single"),
        (8e9, {"num_gpus": 0.2}, [[80 * GB]], "stream"),  # a fifth of the GPU is the worker's
    ],
)
def test_the_first_placement_that_the_gpus_have_memory_for(cluster_of, capsys, parameters, settings, gpus, kind):
    cluster_of(*(node(str(i), CPU=8, GPU=4) for i in range(len(gpus))), gpus=gpus)
    own = with_placement(config_of(**settings), checkpoint_of(parameters)).calibration
    assert (own.placement, own.num_gpus) == (
        kind,
        settings["num_gpus"] if kind == "device_map" else min(1, settings["num_gpus"]),
    )
    said = capsys.readouterr().out
    assert f"placement {kind}: the model takes {parameters * 2.4 / GB:.3g} GB" in said


def test_on_cpus_a_worker_has_its_share_of_the_node_with_the_least(cluster_of):
    cluster_of(node(CPU=8, memory=100 * GB), node(CPU=2, memory=200 * GB), node(alive=False, CPU=8, memory=1))
    for parameters, settings, kind in [
        (5e9, {}, "single"),  # 12 GB; eight workers have 12.5 each
        (6e9, {}, "stream"),
        (6e9, {"num_cpus": 2}, "single"),  # four workers have 25, and one alone 200
        (6e9, {"workers": 2}, "single"),
    ]:
        assert with_placement(config_of(**settings), checkpoint_of(parameters)).calibration.placement == kind


def test_models_that_are_to_be_judged_have_the_share_of_every_process_that_a_node_holds(cluster_of):
    cluster_of(node(CPU=8, memory=100 * GB))
    config, judged = config_of(workers=2), Config().evaluation
    assert with_placement(config, checkpoint_of(6e9)).calibration.placement == "single"
    with pytest.raises(ConfigError, match=r"a worker's 12.5 GB are too little to evaluate the model \(14.4 GB\)"):
        with_placement(config.model_copy(update={"evaluation": judged}), checkpoint_of(6e9))


def test_workers_are_counted_node_by_node(cluster_of, monkeypatch):
    """Four GPUs of four nodes are no four GPUs of a worker."""
    cluster_of(*(node(str(i), CPU=8, GPU=1) for i in range(4)), node(alive=False, CPU=8, GPU=8))
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 32, "GPU": 4})
    assert n_workers(config_of(num_gpus=1), 99) == 4 and n_workers(config_of(num_gpus=0.5), 3) == 3
    with pytest.raises(
        ConfigError, match="nodes have room for 0 of 1 workers with 1 CPUs and 4 GPUs each; the cluster has "
    ):
        n_workers(config_of(num_gpus=4), 99)


def test_what_is_asked_for_is_obeyed_in_silence(cluster_of, capsys):
    cluster_of(node(CPU=2, memory=GB))
    for kind in ("single", "device_map", "stream"):
        assert with_placement(config_of(placement=kind), checkpoint_of(70e9)).calibration.placement == kind
    assert not capsys.readouterr().out


def test_a_model_that_no_worker_holds_is_not_judged_and_that_is_told_before_any_work(cluster_of):
    cluster_of(node(CPU=2, memory=100 * GB))
    config = config_of().model_copy(update={"evaluation": Config().evaluation})
    with pytest.raises(ConfigError, match=r"^evaluation.samples: a worker's 50 GB are too little .* \(168 GB\)"):
        with_placement(config, checkpoint_of(70e9))
    small = config.model_copy(update={"calibration": config_of(placement="stream").calibration})
    assert with_placement(small, checkpoint_of(1e9)).calibration.placement == "stream"


def test_gpus_that_torch_does_not_see_are_told_with_their_node(cluster_of):
    cluster_of(node("a", CPU=2, GPU=1), node("b", CPU=2, GPU=1), gpus=[[80 * GB], []])
    with pytest.raises(ConfigError, match="calibration.num_gpus: torch sees no GPU on b"):
        with_placement(config_of(num_gpus=1), checkpoint_of(1e9))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_over_several_devices_gives_what_it_gives_on_one(dense, name):
    """Here the several are one CPU; the code that spreads is accelerate's."""
    folder = dense(name)
    base, ids_BT = Checkpoint.open(str(folder)), torch.arange(3, 30)[None]
    outputs = []
    for kind in ("single", "device_map"):
        config = Config.model_validate({"model": {"source": str(folder)}, "calibration": {"placement": kind}})
        with torch.inference_mode():
            outputs.append(load_model(config, base, folder)(ids_BT).logits)
    assert torch.equal(*outputs)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 200), st.integers(1, 8))
def test_neighbours_go_together_within_their_tokens_and_every_worker_has_some(tokens, max_tokens, workers):
    shards = [Shard("sort", f"{i:05d}", 1, n, "") for i, n in enumerate(tokens)]
    groups = group_shards(shards, max_tokens, workers)
    assert len(group_shards(shards * 9, 10**9, 1)[0]) == min(MAX_GROUP_SHARDS, 9 * len(shards))
    assert [shard for group in groups for shard in group] == shards
    assert all(len(group) == 1 or sum(shard.n_tokens for shard in group) <= max_tokens for group in groups)
    assert max_tokens or len(groups) == len(shards)
    assert max(len(group) for group in groups) <= -(-len(shards) // workers)
    for one, two in zip(groups, groups[1:], strict=False):
        full = len(one) == -(-len(shards) // workers)
        assert full or sum(shard.n_tokens for shard in one) + two[0].n_tokens > max_tokens
