"""Records and statistics on disk: the same bytes for the same numbers, damage that is seen, merges that add up."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, Moments, Statistics, tree_sum
from seap_ray.errors import ConfigError, DataError, IncompleteError
from seap_ray.models import forward
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.input_records import PooledInputs, input_keys, inputs_file
from seap_ray.models.records import covariance_file, is_whole, load_statistics, read_metadata, save_moments
from seap_ray.models.sequences import CountedSequence
from seap_ray.pipeline.calibrate import Calibrator
from seap_ray.pipeline.merge import TaskStatistics, merge_covariances, merge_input_covariances, merge_moments
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Manifest, Shard, _write_shard
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.run import Run
from tests.support import ROOT
from tests.support.builders import CONFIGS, load

ARCHITECTURE = Architecture.of(CONFIGS["llama_gqa"]().to_dict())
WIDTHS = {"attn": 48, "mlp": 80, "block": 1}
CALIBRATION = Calibration("model", "torch.float32", skip_first_token=False, batch_tokens=100)
LENGTHS = [5, 1, 17, 8, 2, 30, 4]
"""Tokens of seven shards: a tree of 4 + 2 + 1."""


def activations(n: int, seed: int) -> dict[tuple[int, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, site): 3 + torch.randn(n, WIDTHS[site], generator=generator, dtype=torch.float64) * (layer + 1)
        for layer in range(ARCHITECTURE.n_layers)
        for site in RECORDED
    }


def two_pass(x_ND: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    mean_D = x_ND.mean(0)
    return x_ND.shape[0], mean_D, (x_ND - mean_D).square().sum(0)


def statistics_of(inputs: dict[tuple[int, str], torch.Tensor]) -> Statistics:
    return {key: Moments(*two_pass(x_ND)) for key, x_ND in inputs.items()}  # type: ignore[misc]


def manifest_of(lengths: list[int] = LENGTHS, task: str = "arithmetic") -> Manifest:
    shards = tuple(Shard(task, f"{i:05d}", 1, n, f"sha-{task}-{i}") for i, n in enumerate(lengths))
    return Manifest(task, "print", shards, n_rows=len(lengths), n_cut=0, prompts="", rows="")


def records_of(run: Run, calibration: Calibration = CALIBRATION) -> ShardRecords:
    return ShardRecords(calibration, run, ARCHITECTURE)


def save_record(run: Run, shard: Shard, statistics: Statistics, calibration: Calibration = CALIBRATION) -> Path:
    path = records_of(run, calibration).path(shard)
    save_moments(path, statistics, task=shard.task, fingerprint=calibration.fingerprint(shard))
    return path


def make_records(run: Run, manifest: Manifest, calibration: Calibration = CALIBRATION) -> dict[str, Statistics]:
    """Records of random activations, one seed a shard, written last shard first."""
    made = {}
    for shard in reversed(manifest.shards):
        made[shard.shard] = statistics_of(activations(calibration.n_tokens(shard), seed=int(shard.shard)))
        save_record(run, shard, made[shard.shard], calibration)
    return made


def merge(run: Run, manifest: Manifest, calibration: Calibration = CALIBRATION) -> Path:
    path = run.statistics(manifest.task)
    merge_moments(TaskStatistics(records_of(run, calibration), manifest.shards, path))
    return path


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --- one file --------------------------------------------------------------------------------------------------------


def test_the_same_moments_give_the_same_bytes_whatever_the_order(tmp_path):
    statistics = statistics_of(activations(9, 1))
    save_moments(tmp_path / "a", statistics, task="t", shard="00001", fingerprint="f")

    backwards = dict(reversed(statistics.items()))
    save_moments(tmp_path / "b", backwards, fingerprint="f", shard="00001", task="t")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    save_moments(tmp_path / "a", statistics, task="t", shard="00001", fingerprint="f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}


def test_the_same_moments_give_the_same_bytes_in_every_process(tmp_path):
    code = """
x = torch.arange(6, dtype=torch.float64)
of = {(layer, site): Moments(7, x + layer, x * 2) for layer in range(3) for site in ("attn", "mlp")}
save_moments(path, of, task="t", shard="00001", fingerprint="f", more=[1, 2])
"""
    exec(code, {"torch": torch, "Moments": Moments, "save_moments": save_moments, "path": tmp_path / "here"})
    imports = "import sys, pathlib, torch\nfrom seap_ray.models.records import Moments, save_moments\n"
    there = f"{imports}path = pathlib.Path(sys.argv[1]){code}"

    # Another seed of hashes, and so another order of sets.
    subprocess.run(
        [sys.executable, "-c", there, tmp_path / "there"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        timeout=300,
    )
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_moments_come_back_exactly_with_what_was_said_about_them(tmp_path):
    path = tmp_path / "deep" / "m.safetensors"
    statistics = statistics_of(activations(9, 2))
    save_moments(path, statistics, task="t", made_of="x")

    back = load_statistics(path, ARCHITECTURE)
    assert back.keys() == statistics.keys()
    for key, moments in statistics.items():
        assert back[key].count == moments.count == 9
        assert torch.equal(back[key].mean_D, moments.mean_D) and back[key].mean_D.dtype == torch.float64
        assert torch.equal(back[key].m2_D, moments.m2_D) and back[key].m2_D.dtype == torch.float64

    about = read_metadata(path)
    assert (about["task"], about["made_of"], len(about["digest"])) == ("t", "x", 71)


def test_a_count_beyond_float32_comes_back_exactly(tmp_path):
    few = statistics_of(activations(2, 0))
    statistics = {key: replace(moments, count=2**40 + 1) for key, moments in few.items()}
    save_moments(tmp_path / "m", statistics)
    assert load_statistics(tmp_path / "m", ARCHITECTURE)[3, "mlp"].count == 2**40 + 1


def test_a_whole_file_is_whole_and_only_for_what_it_says(tmp_path):
    path = tmp_path / "m"
    assert not is_whole(path)
    save_moments(path, statistics_of(activations(9, 3)), task="t", fingerprint="f")

    assert is_whole(path)
    assert is_whole(path, fingerprint="f")
    assert is_whole(path, fingerprint="f", task="t")
    assert not is_whole(path, fingerprint="g")
    assert not is_whole(path, fingerprint="f", task="u")
    assert not is_whole(path, other="f")
    assert not is_whole(tmp_path)


def test_a_flipped_byte_is_seen_wherever_it_is(tmp_path):
    path = tmp_path / "m"
    save_moments(path, statistics_of(activations(9, 4)), fingerprint="f")
    size = path.stat().st_size
    # A safetensors file: eight bytes with the header's length, the header, the data.
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for place in [0, 2, 9, *range(start, size, (size - start) // 23), size - 1]:
        flipped(path, place)
        assert not is_whole(path, fingerprint="f"), place
        flipped(path, place)
        assert is_whole(path, fingerprint="f")


def test_moments_under_the_name_of_others_are_seen(tmp_path):
    path = tmp_path / "m"
    save_moments(path, statistics_of(activations(9, 4)), fingerprint="f")
    data = path.read_bytes()
    for old, new in (("layers.3", "layers.9"), ("layers.0.attn.mean", "layers.0.attn.mode")):
        path.write_bytes(data.replace(old.encode(), new.encode()))
        assert load_file(path).keys() != load_bytes(data).keys()
        assert not is_whole(path, fingerprint="f")


def test_a_truncated_file_is_not_whole(tmp_path):
    path = tmp_path / "m"
    save_moments(path, statistics_of(activations(9, 5)), fingerprint="f")
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert not is_whole(path, fingerprint="f"), length
    path.write_bytes(data + b"\0")
    assert not is_whole(path, fingerprint="f")


def test_a_file_of_something_else_is_not_whole(tmp_path, dense):
    shutil.copy(dense("llama_gqa") / "model.safetensors", tmp_path / "m")
    assert not is_whole(tmp_path / "m")
    (tmp_path / "m").write_text("hello")
    assert not is_whole(tmp_path / "m")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_record_has_another_name_when_anything_that_its_numbers_depend_on_changes(tmp_path):
    run = Run(tmp_path)
    shard = manifest_of().shards[0]
    paths = {records_of(run).path(shard)}
    for change in ({"model": "other"}, {"dtype": "torch.float16"}, {"skip_first_token": True}, {"batch_tokens": 99}):
        paths.add(records_of(run, replace(CALIBRATION, **change)).path(shard))
    paths.add(records_of(run, replace(CALIBRATION, schema=CALIBRATION.schema + 1)).path(shard))
    paths.add(records_of(run).path(replace(shard, digest="other")))
    assert len(paths) == 7
    assert {path.parent for path in paths} == {run.records("arithmetic")}
    assert {path.name[:6] for path in paths} == {"00000-"}
    assert records_of(run).path(shard) in paths


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merged_records_are_the_tree_sum_and_the_two_pass_moments_of_all_tokens(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    records = make_records(run, manifest)
    path = merge(run, manifest)
    assert path == run.statistics("arithmetic")
    merged = load_statistics(path, ARCHITECTURE)

    parts = [activations(n, seed=i) for i, n in enumerate(LENGTHS)]
    for key, moments in merged.items():
        tree = tree_sum(records[shard.shard][key] for shard in manifest.shards)
        assert torch.equal(moments.mean_D, tree.mean_D) and torch.equal(moments.m2_D, tree.m2_D)

        count, mean_D, m2_D = two_pass(torch.cat([part[key] for part in parts]))
        assert moments.count == count == sum(LENGTHS)
        torch.testing.assert_close(moments.mean_D, mean_D, rtol=1e-12, atol=0)
        torch.testing.assert_close(moments.m2_D, m2_D, rtol=1e-12, atol=0)


def test_the_tree_of_seven_is_four_and_two_and_one(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    records = make_records(run, manifest)
    merged = load_statistics(merge(run, manifest), ARCHITECTURE)
    for key, moments in merged.items():
        a, b, c, d, e, f, g = (records[shard.shard][key] for shard in manifest.shards)
        by_hand = ((a + b) + (c + d)) + ((e + f) + g)
        assert torch.equal(moments.mean_D, by_hand.mean_D) and torch.equal(moments.m2_D, by_hand.m2_D)


def test_statistics_are_the_same_bytes_whatever_was_done_first(tmp_path):
    manifest = manifest_of()
    digests = set()
    orders = {"up": manifest.shards, "down": manifest.shards[::-1], "mid": manifest.shards[3:] + manifest.shards[:3]}
    for name, order in orders.items():
        run = Run(tmp_path / name)
        for shard in order:
            statistics = statistics_of(activations(shard.n_tokens, seed=int(shard.shard)))
            save_record(run, shard, statistics)
            save_record(run, shard, statistics)  # delivered twice: replaced, not added
        digests.add(digest_of_file(merge(run, manifest)))
    assert len(digests) == 1


def test_skipped_first_tokens_are_not_expected_in_the_count(tmp_path):
    skipping = replace(CALIBRATION, skip_first_token=True)
    run = Run(tmp_path)
    lengths = [5, 9, 4]
    manifest = manifest_of(lengths)
    make_records(run, manifest, skipping)
    merged = load_statistics(merge(run, manifest, skipping), ARCHITECTURE)
    assert {moments.count for moments in merged.values()} == {sum(lengths) - 3}


def test_a_merge_is_done_once_and_again_when_its_records_are_others(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    make_records(run, manifest)
    path = merge(run, manifest)
    before = (path.stat().st_mtime_ns, path.stat().st_ino, digest_of_file(path))
    made_of = read_metadata(path)["made_of"]
    shutil.rmtree(run.records("arithmetic"))
    assert merge(run, manifest) == path  # not a record is read
    assert (path.stat().st_mtime_ns, path.stat().st_ino, digest_of_file(path)) == before

    # One shard of other content: its record is missing, and the merge has to be made again.
    shards = (replace(manifest.shards[0], digest="other"), *manifest.shards[1:])
    other = replace(manifest, shards=shards)
    with pytest.raises(IncompleteError):
        merge(run, other)
    make_records(run, other)
    merge(run, other)
    assert read_metadata(path)["made_of"] != made_of


def test_damaged_statistics_are_made_again(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    make_records(run, manifest)
    path = merge(run, manifest)
    digest = digest_of_file(path)
    flipped(path, -1)
    assert digest_of_file(merge(run, manifest)) == digest


def test_a_count_that_is_not_the_manifests_is_refused(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    make_records(run, manifest)
    shard = manifest.shards[2]
    save_record(run, shard, statistics_of(activations(shard.n_tokens - 1, seed=2)))
    with pytest.raises(DataError, match=rf"arithmetic.*: {sum(LENGTHS) - 1} tokens, the manifest has {sum(LENGTHS)}"):
        merge(run, manifest)
    assert not run.statistics("arithmetic").exists()


def test_a_count_that_differs_in_one_site_alone_is_refused(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    records = make_records(run, manifest)
    statistics: dict[Any, Moments] = dict(records["00004"])
    statistics[3, "mlp"] = replace(statistics[3, "mlp"], count=statistics[3, "mlp"].count + 5)
    save_record(run, manifest.shards[4], statistics)
    with pytest.raises(DataError, match="layer 3, mlp"):
        merge(run, manifest)


def test_missing_records_are_named_and_counted(tmp_path):
    run = Run(tmp_path)
    manifest = manifest_of()
    make_records(run, manifest)
    lost = [records_of(run).path(shard) for shard in manifest.shards[3:5]]
    for record in lost:
        record.unlink()
    with pytest.raises(IncompleteError) as caught:
        merge(run, manifest)
    assert str(caught.value).startswith(f"arithmetic: 2 records are missing ({lost[0].name}, ...)")
    assert "\n" not in str(caught.value)
    assert not run.statistics("arithmetic").exists()


def test_tasks_do_not_mix(tmp_path):
    run = Run(tmp_path)
    one = manifest_of()
    other = manifest_of([3, 3], task="sort")
    make_records(run, one)
    make_records(run, other)
    counts = [load_statistics(merge(run, m), ARCHITECTURE)[0, "attn"].count for m in (one, other)]
    assert counts == [sum(LENGTHS), 6]


# --- the actor, called without Ray -----------------------------------------------------------------------------------


def config_of(source: Path, storage: Path, **calibration: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"source": str(source)},
            "run": {"storage": str(storage), "name": "r"},
            "calibration": {"batch_tokens": 40, **calibration},
        }
    )


def save_shards(run: Run, sequences: list[list[list[int]]]) -> Manifest:
    shards = []
    for i, ids in enumerate(sequences):
        shard = Shard("sort", f"{i:05d}", len(ids), sum(map(len, ids)), "")
        shard.path(run).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))}), shard.path(run))
        shards.append(replace(shard, digest=digest_of_file(shard.path(run))))
    return Manifest("sort", "print", tuple(shards), n_rows=len(sequences), n_cut=0, prompts="", rows="")


def table_of(shards: tuple[Shard, ...]) -> pa.Table:
    """A row a shard, as placements that hold the model have it."""
    return pa.Table.from_pylist([{"shards": [asdict(shard)]} for shard in shards])


@pytest.mark.parametrize("skip", [False, True], ids=["all", "skip"])
def test_records_of_an_actor_merge_to_the_moments_of_every_token(dense, tmp_path, float64_norms, skip):
    source = dense("llama_gqa", torch.float64)
    config = config_of(source, tmp_path, skip_first_token=skip)
    run = Run.of(config)
    checkpoint = Checkpoint.open(str(source))
    generator = torch.Generator().manual_seed(0)
    sequences = [
        [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ([4, 19, 2], [7], [1, 30, 6, 6])
    ]
    manifest = save_shards(run, sequences)

    # Two deliveries to the same actor.
    calibration = Calibration.of(config, checkpoint)
    actor = Calibrator(config, records_of(run, calibration))
    done = actor(table_of(manifest.shards[:2])), actor(table_of(manifest.shards[2:]))
    assert [row for table in done for row in table.to_pylist()] == [
        {"n_tokens": shard.n_tokens} for shard in manifest.shards
    ]

    for shard in manifest.shards:
        assert is_whole(records_of(run, calibration).path(shard), fingerprint=calibration.fingerprint(shard))
    merged = load_statistics(merge(run, manifest, calibration), ARCHITECTURE)

    # The same model on the same tokens, all activations kept.
    model = load(source)
    seen = []
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in (ids for shard in sequences for ids in shard):
            model(torch.tensor([ids]))

    count, mean_D, m2_D = two_pass(torch.cat([x_TD[int(skip) :] for x_TD in seen]))
    assert {moments.count for moments in merged.values()} == {count}
    torch.testing.assert_close(merged[2, "mlp"].mean_D, mean_D, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged[2, "mlp"].m2_D, m2_D, rtol=1e-9, atol=0)


@pytest.mark.parametrize("skip", [False, True], ids=["all", "skip"])
def test_records_of_tokens_that_count_merge_to_their_moments(dense, tmp_path, skip):
    source = dense("llama_gqa", torch.float64)
    config = config_of(source, tmp_path, skip_first_token=skip)
    run = Run.of(config)
    sequences = [
        [CountedSequence([5, 6, 7, 8], [False, False, True, True]), [9, 10, 11]],
        [CountedSequence([12, 13], [True, False])],
    ]
    shards = []
    for i, of_shard in enumerate(sequences):
        shards.append(_write_shard(run, "sort", f"{i:05d}", [(ids, "") for ids in of_shard]))
    manifest = Manifest("sort", "print", tuple(shards), n_rows=3, n_cut=0, prompts="", rows="")
    assert [(shard.n_uncounted, shard.n_uncounted_first) for shard in shards] == [(2, 1), (1, 0)]

    calibration = Calibration.of(config, Checkpoint.open(str(source)))
    Calibrator(config, records_of(run, calibration))(table_of(manifest.shards))
    merged = load_statistics(merge(run, manifest, calibration), ARCHITECTURE)
    assert {moments.count for moments in merged.values()} == {4 if skip else 6}
    expected = forward.record(load(source), [*chain(*sequences)], batch_tokens=40, skip_first_token=skip)
    for key, moments in expected.items():
        torch.testing.assert_close(merged[key].mean_D, moments.mean_D, rtol=1e-9, atol=1e-12)


def test_where_no_token_counts_at_all_it_is_one_line(dense, tmp_path):
    source = dense("llama_gqa", torch.float64)
    config = config_of(source, tmp_path, skip_first_token=True)
    run = Run.of(config)
    shard = _write_shard(run, "sort", "00000", [(CountedSequence([5, 6], [True, False]), "")])
    manifest = Manifest("sort", "print", (shard,), n_rows=1, n_cut=0, prompts="", rows="")
    calibration = Calibration.of(config, Checkpoint.open(str(source)))
    Calibrator(config, records_of(run, calibration))(table_of(manifest.shards))
    with pytest.raises(DataError, match="^tasks.sort: no token counts, by corpus.count and calibration.skip_first"):
        merge(run, manifest, calibration)


def test_a_record_is_the_same_bytes_again(dense, tmp_path):
    source = dense("qwen2", torch.bfloat16)
    digests = set()
    for name in ("a", "b"):
        config = config_of(source, tmp_path / name)
        run = Run.of(config)
        manifest = save_shards(run, [[[5, 6, 7], [9] * 20]])
        records = ShardRecords.of(config, Checkpoint.open(str(source)), run)
        Calibrator(config, records)(table_of(manifest.shards))
        digests.add(digest_of_file(records.path(manifest.shards[0])))
    assert len(digests) == 1


def test_an_actor_names_the_shard_whose_activations_are_not_finite(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = config_of(source, tmp_path)
    run = Run.of(config)
    manifest = save_shards(run, [[[5, 6, 7]]])
    records = ShardRecords.of(config, Checkpoint.open(str(source)), run)
    with pytest.raises(DataError, match="shard sort/00000: activations of layer 1, site attn, are not finite"):
        Calibrator(config, records)(table_of(manifest.shards))
    assert not list(run.records("sort").iterdir())


def test_an_actor_refuses_a_model_that_is_not_the_drivers(dense, tmp_path):
    config = config_of(dense("llama_gqa"), tmp_path)
    records = ShardRecords.of(config, Checkpoint.open(str(dense("llama_mha"))), Run.of(config))
    with pytest.raises(ConfigError, match="differs between the nodes"):
        Calibrator(config, records)


def test_records_of_inputs_merge_to_their_covariances_and_leave_all_other_files_as_they_are(dense, tmp_path):
    source = dense("llama_gqa")
    checkpoint = Checkpoint.open(str(source))
    sequences = [[[5, 6, 7, 8, 9], [4, 3]], [[9, 8, 7]], [[3, 4, 5, 6], [8, 3, 5, 9, 11, 30]]]
    files = {}
    for inputs in (False, True):
        config = config_of(source, tmp_path / str(inputs), statistics="covariance", input_covariances=inputs)
        run = Run.of(config)
        manifest = save_shards(run, sequences)
        records = ShardRecords.of(config, checkpoint, run)
        Calibrator(config, records)(table_of(manifest.shards))
        assert all(records.is_whole(shard) for shard in manifest.shards)

        statistics = TaskStatistics(records, manifest.shards, run.statistics("sort"))
        merge_moments(statistics)
        for layer in range(4):
            merge_covariances(statistics, checkpoint, layer)
            if inputs:
                assert not statistics.is_whole()
                merge_input_covariances(statistics, layer)
        assert statistics.is_whole()
        paths = (path for path in run.root.rglob("*.safetensors") if "inputs" not in str(path.relative_to(run.root)))
        files[inputs] = {path.relative_to(run.root): path.read_bytes() for path in paths}

    assert files[True] == files[False]
    recorded = forward.record(load(source), [*chain(*sequences)], batch_tokens=40, covariances=range(4), inputs=True)
    pooled = PooledInputs((statistics.path,), (1.0,))
    for layer, site in input_keys(checkpoint.architecture):
        expected = recorded[layer, site]
        torch.testing.assert_close(pooled[layer, site].mean_D, expected.mean_D, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            pooled[layer, site].covariance_DD, expected.covariance_DD.double(), rtol=1e-4, atol=1e-5
        )

    # A file that is missing or damaged has its record made again, and no other.
    moments = records.path(manifest.shards[1])
    flipped(covariance_file(inputs_file(moments), 2), -1)
    assert [records.is_whole(shard) for shard in manifest.shards] == [True, False, True]
    before = inputs_file(statistics.path).read_bytes()
    covariance_file(inputs_file(statistics.path), 1).unlink()
    assert not statistics.is_whole()
    merge_input_covariances(statistics, 1)
    assert statistics.is_whole() and inputs_file(statistics.path).read_bytes() == before
