"""Covariances from tokens to a repaired checkpoint: merged, on disk, from an actor's passes, in a compacted model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seap_ray.models.hf  # noqa: F401  (registers the classes that load a compacted checkpoint)
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS, OutputModule
from seap_ray.core.moments import SITES, Covariance, Moments, pooled, pooled_covariance, tree_sum
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.reconstruction import DEFAULT_RIDGE
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import record
from seap_ray.models.loading import decoder_of
from seap_ray.models.records import (
    TILE,
    PooledCovariance,
    covariance_file,
    from_triangle,
    load_covariance,
    read_metadata,
    save_covariances,
    save_moments,
    to_triangle,
)
from seap_ray.pipeline import calibrate
from seap_ray.pipeline.calibrate import Calibrator
from seap_ray.pipeline.merge import TaskStatistics, merge_covariances, merge_moments
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.run import Run
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    load,
    logits,
    mixture_in,
    output_modules,
    random_ids,
    random_plan,
    write_compacted,
)
from tests.support.oracles import InputsOf, by_columns, tensors_of

often = settings(max_examples=40, deadline=None)
LENGTHS = ([4, 19, 2], [7, 11], [1, 30, 6, 6])


def drawn(n: int, width: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + offset


def assert_is_two_pass(covariance: Covariance, x: torch.Tensor, rtol: float = 1e-9) -> None:
    """Against numpy, relative to the columns' own deviations."""
    expected = np.cov(x.double().numpy(), rowvar=False, bias=True).reshape(x.shape[1], x.shape[1])
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert covariance.count == len(x)
    np.testing.assert_allclose(covariance.mean_D, x.double().mean(0), rtol=1e-9, atol=1e-12)
    assert (np.abs(covariance.covariance_DD.double().numpy() - expected) <= rtol * scale + 1e-15).all()


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    seed=st.integers(0, 99),
    random=st.randoms(use_true_random=False),
)
@often
def test_any_split_added_in_any_order_is_the_two_pass_covariance(lengths, seed, random, offset):
    x = drawn(sum(lengths) + 1, 5, seed, offset)
    parts = [Covariance.of(part) for part in x.split([*lengths, 1])]
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    assert_is_two_pass(parts[0], x)
    torch.testing.assert_close(parts[0].comoment_DD.diagonal(), parts[0].m2_D, rtol=1e-9, atol=1e-12)


def test_products_of_narrower_types_are_float32():
    x = drawn(400, 6, seed=1, offset=50.0)
    for dtype in (torch.float32, torch.bfloat16):
        covariance = Covariance.of(x.to(dtype))
        assert covariance.comoment_DD.dtype == torch.float32
        assert_is_two_pass(covariance, x.to(dtype), rtol=1e-5)


def test_adding_changes_no_part_and_nothing_is_neutral():
    one, other = (Covariance.of(drawn(9, 4, seed)) for seed in (0, 1))
    before = one.comoment_DD.clone(), other.comoment_DD.clone()
    assert (one + other).count == 18
    assert torch.equal(one.comoment_DD, before[0]) and torch.equal(other.comoment_DD, before[1])
    empty = Covariance.of(torch.zeros(0, 4))
    assert one + empty is one and empty + one is one


@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
)
@often
def test_pooled_is_the_covariance_of_the_weighted_tokens(sizes, seed, weights):
    parts, weights = [drawn(n, 4, seed + i, offset=3.0 * i) for i, n in enumerate(sizes)], weights[: len(sizes)]
    found = pooled_covariance(map(Covariance.of, parts), weights)
    of_token = np.concatenate([np.full(n, w / n) for n, w in zip(sizes, weights, strict=True)])
    expected = np.cov(torch.cat(parts).numpy(), rowvar=False, bias=True, aweights=of_token)
    np.testing.assert_allclose(found.covariance_DD, expected, rtol=1e-8, atol=1e-8)
    moments = pooled([Moments.of(part) for part in parts], weights)
    torch.testing.assert_close(found.mean_D, moments.mean_D)
    torch.testing.assert_close(found.var_D, moments.var_D)
    assert found.count == moments.count


# --- on disk ---------------------------------------------------------------------------------------------------------


@given(width=st.integers(1, 40), seed=st.integers(0, 9))
@often
def test_the_lower_triangle_comes_back_as_the_whole_matrix(width, seed):
    symmetric = Covariance.of(drawn(50, width, seed)).comoment_DD.float()
    triangle = to_triangle(symmetric)
    assert triangle.shape == (width * (width + 1) // 2,) and triangle.dtype == torch.float32
    lower = symmetric.tril()
    assert torch.equal(from_triangle(triangle), (lower + lower.tril(-1).T).double())


@pytest.mark.parametrize("width", [TILE, TILE + 1, 2 * TILE + 77])
def test_a_triangle_of_several_tiles_comes_back_as_the_whole_matrix(width):
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    symmetric = values + values.T
    triangle = to_triangle(symmetric.double())
    assert torch.equal(triangle, symmetric[tuple(torch.tril_indices(width, width))])
    assert torch.equal(from_triangle(triangle), symmetric.double())


def saved(path: Path, x_of: dict[str, torch.Tensor], **about: Any) -> dict[str, Covariance]:
    """One layer's covariances, and its moments, as a run has them."""
    made = {site: Covariance.of(x) for site, x in x_of.items()}
    save_moments(path, {(0, site): covariance for site, covariance in made.items()})  # type: ignore[misc]
    save_covariances(path, 0, made, **about)  # type: ignore[arg-type]
    return made


def test_a_mixture_reads_its_sources_and_averages_their_ridges(tmp_path):
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    made = [
        saved(path, {site: drawn(30, 6, i, offset=i) for site in SITES}, ridges={"attn": ridge, "mlp": 0.1})
        for i, (path, ridge) in enumerate(zip(paths, (1e-1, 1e-4), strict=True))
    ]
    mixture = PooledCovariance(paths, (2.0, 1.0))
    expected = pooled_covariance([part["mlp"] for part in made], [2.0, 1.0])
    torch.testing.assert_close(mixture[0, "mlp"].covariance_DD, expected.covariance_DD, rtol=1e-6, atol=1e-6)
    assert mixture.ridge_of((0, "attn")) == pytest.approx(1e-2)
    assert mixture.ridge_of((0, "mlp")) == pytest.approx(0.1)
    assert replace(mixture, ridge=0.5).ridge_of((0, "attn")) == 0.5


def saved_whole(path: Path, records: list[Path]) -> None:
    """Merge records into a task's statistics, as a job does: from what their files hold."""
    merged = {site: tree_sum(load_covariance(file, (0, site)) for file in records) for site in SITES}
    save_moments(path, {(0, site): covariance for site, covariance in merged.items()})  # type: ignore[misc]
    save_covariances(path, 0, merged)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("held_out_of", [(True, True), (True, False), (False, True), (False, False)])
def test_a_held_out_record_is_as_if_the_statistics_were_of_the_other_records(tmp_path, offset, held_out_of):
    wholes, others, held_out = [], [], []
    for i, is_held_out in enumerate(held_out_of):
        records = [tmp_path / f"{i}.{j}.safetensors" for j in range(3)]
        for j, path in enumerate(records):
            n_tokens = 30 + 5 * j
            saved(path, {site: drawn(n_tokens, 6, 10 * i + j, offset + i + j) for site in SITES})
        wholes.append(tmp_path / f"whole{i}.safetensors")
        others.append(tmp_path / f"others{i}.safetensors")
        held_out.append(records[-1] if is_held_out else None)
        saved_whole(wholes[-1], records)
        saved_whole(others[-1], records[:-1] if is_held_out else records)

    pooled_wholes = PooledCovariance(tuple(wholes), (2.0, 1.0), held_out=tuple(held_out))
    pooled_others = PooledCovariance(tuple(others), (2.0, 1.0))
    for site in SITES:
        found = pooled_wholes[0, site]
        expected = pooled_others[0, site]
        assert found.count == expected.count
        torch.testing.assert_close(found.mean_D, expected.mean_D, rtol=1e-12, atol=1e-12)
        # Files hold float32: a third of the tokens is taken off, so the rounding of all of them stays about as large.
        scale_D = expected.m2_D.sqrt()
        close_DD = 1e-6 * torch.outer(scale_D, scale_D)
        assert ((found.comoment_DD - expected.comoment_DD).abs() <= close_DD).all()
        assert ((found.m2_D - expected.m2_D).abs() <= close_DD.diagonal()).all()

    if any(held_out_of):
        whole = PooledCovariance(tuple(wholes), (2.0, 1.0))[0, "mlp"]
        assert whole.count > pooled_wholes[0, "mlp"].count
        assert not torch.allclose(whole.covariance_DD, pooled_wholes[0, "mlp"].covariance_DD, rtol=1e-3)


def test_held_out_records_are_as_many_as_the_sources(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, {site: drawn(30, 6, 0) for site in SITES})
    with pytest.raises(ValueError, match="zip"):
        PooledCovariance((path, path), (2.0, 1.0), held_out=(path,))[0, "mlp"]


# --- from an actor ---------------------------------------------------------------------------------------------------


def config_of(source: Path, storage: Path, **calibration: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"source": str(source)},
            "run": {"storage": str(storage)},
            "tasks": ["sort"],
            "calibration": {"statistics": "covariance", "batch_tokens": 40, **calibration},
        }
    )


def save_shards(run: Run) -> list[Shard]:
    generator, shards = torch.Generator().manual_seed(0), []
    for i, lengths in enumerate(LENGTHS):
        ids = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]
        shard = Shard("sort", f"{i:05d}", len(ids), sum(lengths), "")
        shard.path(run).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))}), shard.path(run))
        shards.append(replace(shard, digest=digest_of_file(shard.path(run))))
    return shards


def measure(config: Config, checkpoint: Checkpoint) -> tuple[ShardRecords, list[Shard]]:
    """What the job's actors do to every shard."""
    records = ShardRecords.of(config, checkpoint, Run.of(config))
    shards = save_shards(records.run)
    groups = [[asdict(shard) for shard in shards[:2]], [asdict(shard) for shard in shards[2:]]]
    Calibrator(config, records)(pa.Table.from_pylist([{"shards": group} for group in groups]))
    return records, shards


def files_of(records: ShardRecords, shard: Shard) -> dict[str, str]:
    record = records.path(shard)
    return {path.name: digest_of_file(path) for path in (record, *record.with_suffix(".covariances").iterdir())}


def test_passes_over_the_layers_give_the_same_bytes_and_the_moments_of_a_run_without(dense, tmp_path):
    source = dense("llama_gqa")
    checkpoint, found = Checkpoint.open(str(source)), []
    for name, settings_ in {
        "auto": {},
        "one": {"covariance_layers": 1},
        "three": {"covariance_layers": 3},
        "stream": {"placement": "stream"},
        "moments": {"statistics": "moments"},
    }.items():
        records, shards = measure(config_of(source, tmp_path / name, **settings_), checkpoint)
        if name != "moments":
            found.append([files_of(records, shard) for shard in shards])
            assert len(found[-1][0]) == 1 + checkpoint.architecture.n_layers
        moments = [digest_of_file(records.path(shard)) for shard in shards]
        found_moments = [files[records.path(s).name] for files, s in zip(found[0], shards, strict=True)]
        assert moments == found_moments
    assert found[0] == found[1] == found[2] == found[3]


def merged(records: ShardRecords, shards: list[Shard], checkpoint: Checkpoint) -> TaskStatistics:
    statistics = TaskStatistics(records, shards, records.run.statistics("sort"))
    merge_moments(statistics)
    for layer in range(checkpoint.architecture.n_layers):
        merge_covariances(statistics, checkpoint, layer)
    return statistics


def test_records_merge_to_the_covariance_of_every_token_and_a_ridge(dense, tmp_path, float64_norms):
    source = dense("llama_biased", torch.float64)
    checkpoint = Checkpoint.open(str(source))
    records, shards = measure(config_of(source, tmp_path), checkpoint)
    statistics = merged(records, shards, checkpoint)
    path = statistics.path
    model, seen = load(source), []
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in (ids for shard in shards for ids in shard.sequences(records.run)):
            model(torch.tensor([ids]))
    assert_is_two_pass(load_covariance(path, (2, "mlp")), torch.cat(seen), rtol=1e-6)  # stored in float32
    assert set(read_metadata(covariance_file(path, 2))["ridges"]) == set(SITES)
    assert statistics.is_whole()


def test_a_task_of_one_shard_has_the_usual_ridge(dense, tmp_path):
    source = dense("llama_mha")
    checkpoint = Checkpoint.open(str(source))
    records, shards = measure(config_of(source, tmp_path), checkpoint)
    path = merged(records, shards[:1], checkpoint).path
    assert read_metadata(covariance_file(path, 0))["ridges"] == dict.fromkeys(SITES, DEFAULT_RIDGE)


def test_a_damaged_or_missing_covariance_is_known_and_a_missing_record_is_named(dense, tmp_path):
    source = dense("llama_mha")
    checkpoint = Checkpoint.open(str(source))
    records, shards = measure(config_of(source, tmp_path), checkpoint)
    statistics = merged(records, shards, checkpoint)
    file = covariance_file(statistics.path, 3)
    before = file.read_bytes()
    flipped = bytearray(before)
    flipped[-5] ^= 1
    for damage in (bytes(flipped), before[:-9], b""):
        file.write_bytes(damage)
        assert not statistics.is_whole()
        merge_covariances(statistics, checkpoint, 3)
        assert file.read_bytes() == before and statistics.is_whole()
    file.unlink()
    assert not statistics.is_whole()
    without = replace(records, calibration=replace(records.calibration, covariance=False))
    assert replace(statistics, records=without).is_whole()
    records.path(shards[1]).unlink()
    statistics.path.unlink()
    with pytest.raises(IncompleteError, match="sort: 1 records are missing"):
        merge_moments(statistics)


def test_covariances_that_do_not_fit_the_disk_are_refused_with_what_would(tmp_path, monkeypatch):
    llama = Architecture.of(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        }
    )
    disk = SimpleNamespace(free=90 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: disk)
    calibrate.check_disk(Run(tmp_path), llama, n_files=10)  # 88 GB
    with pytest.raises(
        IncompleteError, match=r"97\.1 GB.*has 90\.0 \(11 shards and tasks\); make room .*, raise corpus"
    ):
        calibrate.check_disk(Run(tmp_path), llama, n_files=11)


def test_covariances_that_no_node_has_memory_for_are_refused_not_waited_for(monkeypatch):
    shape = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    llama = Architecture.of({"model_type": "llama", **shape, "intermediate_size": 28672})
    nodes = [{"Alive": True, "Resources": {"memory": 24e9}}, {"Alive": False, "Resources": {"memory": 900e9}}]
    monkeypatch.setattr(calibrate.ray, "nodes", lambda: nodes)
    with pytest.raises(ConfigError, match=r"a node with 46.2 GB of memory for tasks, and the largest has 24.0"):
        calibrate.check_memory(llama)
    nodes[1]["Alive"] = True
    calibrate.check_memory(llama)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_experts_covariance_is_that_of_the_tokens_that_are_routed_to_it(dense, name):
    model = load(dense(name, torch.float64))
    sequences = [ids.tolist() for ids in random_ids(4, 30, seed=4)]
    recorded = record(model, sequences, batch_tokens=50, covariances=range(4))
    # Some mixtures have layers without experts.
    mixtures = {layer: mixture_in(block) for layer, block in enumerate(decoder_of(model).layers)}
    weights = {
        (layer, e): w for layer, part in mixtures.items() if part for e, w in enumerate(by_columns(part.experts))
    }
    with InputsOf(weights.values()) as spy, torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    n_compared = 0
    for (layer, expert), weight_OD in weights.items():
        covariance = recorded[layer, f"mlp.{expert}"]
        assert isinstance(covariance, Covariance)
        seen = spy.by_place[weight_OD.data_ptr()]
        # Some experts have no token.
        if not seen:
            assert covariance.count == 0
            continue
        assert_is_two_pass(covariance, torch.cat(seen), rtol=1e-6)
        n_compared += 1
    assert n_compared >= 8


def test_streams_count_at_an_expert_by_what_is_routed_there_and_few_tokens_are_believed_less(tmp_path):
    paths, weights = (tmp_path / "a.safetensors", tmp_path / "b.safetensors"), (3.0, 2.0)
    sizes = {"attn": (100, 50), "mlp.0": (40, 10), "mlp.1": (0, 20), "mlp.2": (0, 0)}
    made = []
    for i, path in enumerate(paths):
        every_token = {"block": drawn(sizes["attn"][i], 1, i)}
        made.append(saved(path, every_token | {site: drawn(n[i], 6, i, offset=i) for site, n in sizes.items()}))
    pooled_files = PooledCovariance(paths, weights, ridge=0.1)
    # Of the first stream two fifths are routed there, of the second one fifth.
    expected = pooled_covariance([part["mlp.0"] for part in made], [3.0 * 0.4, 2.0 * 0.2])
    torch.testing.assert_close(pooled_files[0, "mlp.0"].covariance_DD, expected.covariance_DD, rtol=1e-5, atol=1e-6)
    alone = made[1]["mlp.1"]
    torch.testing.assert_close(pooled_files[0, "mlp.1"].covariance_DD, alone.covariance_DD, rtol=1e-5, atol=1e-6)
    assert not pooled_files[0, "mlp.2"].covariance_DD.any()
    ridges = [pooled_files.ridge_of((0, site)) for site in sizes]
    assert ridges == pytest.approx([0.1, 0.1 + 64 / 50, 0.1 + 64 / 20, 0.1 + 64])


def test_an_expert_that_no_token_reaches_keeps_its_weights(tmp_path):
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "a.safetensors"
    saved(path, {"attn": drawn(9, 6, 0), "mlp.0": drawn(0, 6, 0)})
    cut = OutputModule(w, None, torch.tensor([0, 3]), (0, "mlp.0"), may_have_bias=False)
    for way in ("least_squares", "least_squares_without_bias"):
        repaired = COMPENSATIONS[way].repaired(cut, PooledCovariance((path,), (1.0,), ridge=0.1))
        assert torch.equal(repaired["weight"], w[:, [0, 3]]) and set(repaired) == {"weight"}


# --- in a compacted model --------------------------------------------------------------------------------------------


def calibrated(source: Path, folder: Path, ridge: float | None = 1e-3) -> tuple[Checkpoint, PooledCovariance]:
    """Statistics of some tokens of the model itself, as files."""
    base = Checkpoint.open(str(source))
    sequences = [ids.tolist() for ids in random_ids(12, 40, seed=4)]
    recorded = record(load(source), sequences, batch_tokens=200, covariances=range(base.architecture.n_layers))
    path = folder / "statistics.safetensors"
    save_moments(path, recorded)
    for layer in range(base.architecture.n_layers):
        by_site = {site: recorded[layer, site] for site in base.architecture.modules(layer)}
        save_covariances(path, layer, by_site)  # type: ignore[arg-type]
    return base, PooledCovariance((path,), (1.0,), ridge)


def prediction(
    covariance: Covariance, kept: list[int], cut: list[int], ridge: float, *, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map from kept to cut columns that is nearest to the calibration tokens, and its intercept."""
    C, mu = covariance.covariance_DD.numpy(), covariance.mean_D.numpy()
    R = ridge * np.diag(C.diagonal()[kept])
    if not has_bias:
        # Second moments, for which a ReLU's zeros are no trouble either.
        C, mu = C + np.outer(mu, mu), np.zeros_like(mu)
    A = C[np.ix_(cut, kept)] @ np.linalg.pinv(C[np.ix_(kept, kept)] + R, hermitian=True)
    return torch.tensor(A), torch.tensor(mu[cut] - A @ mu[kept])


def with_predicted_activations(
    model: Any, plan: Plan, mixture: PooledCovariance, head_dim: int, *, has_bias: bool = True
) -> Any:
    """Before ``o_proj`` and ``down_proj`` of the dense model every cut activation gives way to its prediction."""
    for layer, (block, kept) in enumerate(zip(decoder_of(model).layers, plan.kept, strict=True)):
        heads = [h * head_dim + i for h in kept.heads for i in range(head_dim)]
        kept_of = {"attn": heads, "mlp": list(kept.channels[0])}
        for site, module in output_modules(model).items():
            of = kept_of[site]
            linear, covariance = block.get_submodule(module), mixture[layer, site]  # type: ignore[index]
            cut = sorted(set(range(linear.in_features)) - set(of))
            ridge = mixture.ridge_of((layer, site))  # type: ignore[arg-type]
            A, intercept_P = prediction(covariance, of, cut, ridge, has_bias=has_bias)

            def predict(_module: Any, inputs: Any, cut=cut, of=of, A=A, intercept_P=intercept_P) -> Any:
                x_BTD = inputs[0].clone()
                x_BTD[..., cut] = intercept_P + x_BTD[..., of] @ A.T
                return (x_BTD,)

            linear.register_forward_pre_hook(predict)
    return model


@contextmanager
def with_predicted_channels(model: Any, plan: Plan, mixture: PooledCovariance) -> Iterator[None]:
    """Before ``down_proj`` of every MoE expert cut channels give way to their linear prediction."""
    maps: dict[int, tuple[list[int], list[int], torch.Tensor]] = {}
    for layer, (block, kept) in enumerate(zip(decoder_of(model).layers, plan.kept, strict=True)):
        for expert, channels in enumerate(kept.channels if len(kept.channels) > 1 else ()):
            weight_OD = block.mlp.experts.down_proj[expert]
            of, key = list(channels), (layer, f"mlp.{expert}")
            cut = sorted(set(range(weight_OD.shape[1])) - set(of))
            A, _ = prediction(mixture[key], of, cut, mixture.ridge_of(key), has_bias=False)
            maps[weight_OD.data_ptr()] = (of, cut, A)
    linear = torch.nn.functional.linear

    def predicting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.data_ptr() in maps:
            of, cut, A = maps[weight.data_ptr()]
            x = x.clone()
            x[..., cut] = x[..., of] @ A.T
        return linear(x, weight, bias)

    with mock.patch.object(torch.nn.functional, "linear", predicting):
        yield


@pytest.mark.parametrize("way", ["least_squares", "least_squares_without_bias"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compacted_equals_the_dense_model_with_cut_activations_predicted(dense, tmp_path, float64_norms, name, way):
    source, ids_BT = dense(name, torch.float64), random_ids()
    base, mixture = calibrated(source, tmp_path)
    plan = random_plan(base.architecture, 1, way)
    folder = write_compacted(CheckpointExport(base, plan, mixture), tmp_path / "cut")
    compacted = logits(load(folder), ids_BT)
    has_bias = way == "least_squares"
    model = with_predicted_activations(load(source), plan, mixture, base.architecture.head_dim, has_bias=has_bias)
    with with_predicted_channels(model, plan, mixture):
        predicted = logits(model, ids_BT)
    added = {name for name in tensors_of(folder) if name.endswith(".bias")} - base.tensors.keys()
    assert bool(added) == (has_bias and bool(base.architecture.bias_keys))
    assert (compacted - predicted).abs().max() < 1e-8
    assert (compacted - logits(load(source), ids_BT)).abs().max() > 0.05


@pytest.mark.parametrize("way", ["least_squares", "least_squares_without_bias"])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_biased", "qwen2", "mixtral"])
def test_a_plan_that_cuts_nothing_is_the_identity(dense, tmp_path, name, way):
    source, ids_BT = dense(name), random_ids()
    base, mixture = calibrated(source, tmp_path)
    whole = (Kept.whole(base.architecture, 0),) * base.architecture.n_layers
    export = CheckpointExport(base, Plan("expert", 0.0, COMPENSATIONS[way], whole, {}), mixture)
    compacted = load(write_compacted(export, tmp_path / "cut"))
    assert torch.equal(logits(compacted, ids_BT), logits(load(source), ids_BT))


def test_channels_that_others_give_exactly_are_cut_for_nothing(dense, tmp_path, float64_norms):
    """A planted dependence: the last 16 channels are multiples of the first 16, so the cut model is the dense one."""
    source, model = dense("llama_gqa", torch.float64), load(dense("llama_gqa", torch.float64))
    folder = tmp_path / "planted"
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight[64:] = block.mlp.gate_proj.weight[:16]
            block.mlp.up_proj.weight[64:] = 1.7 * block.mlp.up_proj.weight[:16]
    model.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    base, mixture = calibrated(folder, tmp_path, ridge=1e-5)
    dense_shape = base.architecture.dense
    kept = Kept(tuple(range(dense_shape.groups)), tuple(range(dense_shape.heads)), (tuple(range(64)),))
    plan = Plan("expert", 0.1, COMPENSATIONS["least_squares"], (kept,) * base.architecture.n_layers, {})
    ids_BT = random_ids(seed=11)
    expected = logits(load(folder), ids_BT)
    repaired = logits(load(write_compacted(CheckpointExport(base, plan, mixture), tmp_path / "cut")), ids_BT)
    plain = CheckpointExport(base, replace(plan, compensation=COMPENSATIONS["none"]))
    cut = logits(load(write_compacted(plain, tmp_path / "plain")), ids_BT)
    assert (repaired - expected).abs().max() < 1e-3 * (cut - expected).abs().max()
