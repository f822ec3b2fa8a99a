"""Records of a run's shards: what is missing, what was tried, what is given up."""

from pathlib import Path

import pytest

from seap_ray.core.architecture import Architecture
from seap_ray.errors import IncompleteError
from seap_ray.models.records import covariance_file
from seap_ray.pipeline.shard_records import MAX_ATTEMPTS, RECORD_FILE, Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.run import Run
from tests.support.builders import CONFIGS

SHARDS = [Shard("sort", f"{i:05d}", 2, 10, f"sha-{i}") for i in range(3)]


def records_of(folder: Path, **calibration: bool) -> ShardRecords:
    settings = Calibration("model", "torch.float32", skip_first_token=False, batch_tokens=100, **calibration)
    return ShardRecords(settings, Run(folder), Architecture.of(CONFIGS["llama_gqa"]().to_dict()))


def test_attempts_are_counted_shard_by_shard_until_one_ends(tmp_path):
    records = records_of(tmp_path)
    for n in (1, 2):
        records.mark_attempt(SHARDS[0])
        assert [records.attempts(shard) for shard in SHARDS] == [n, 0, 0]

    records.clear_attempts(SHARDS[0])
    records.clear_attempts(SHARDS[1])
    assert [records.attempts(shard) for shard in SHARDS] == [0, 0, 0]
    assert not list(tmp_path.rglob("*.tried"))


def test_a_shard_without_a_record_is_missing_until_its_attempts_are_spent_then_given_up(tmp_path):
    records = records_of(tmp_path)
    for _ in range(MAX_ATTEMPTS - 1):
        records.mark_attempt(SHARDS[1])
    with pytest.raises(IncompleteError, match="sort: 3 records are missing"):
        records.existing_paths(SHARDS)

    records.mark_attempt(SHARDS[1])
    with pytest.raises(IncompleteError, match="sort: shard 00001 ended its worker's process 3 times") as caught:
        records.existing_paths(SHARDS)
    assert str(SHARDS[1].path(records.run)) in str(caught.value)


def test_records_with_covariances_have_a_file_more_for_every_layer_under_the_same_key(tmp_path):
    plain = records_of(tmp_path)
    full = records_of(tmp_path, covariance=True)
    assert plain.path(SHARDS[0]) == full.path(SHARDS[0]) and plain.key(SHARDS[0]) == full.key(SHARDS[0])

    moments = full.path(SHARDS[0])
    paths = [artifact.path for artifact in full.files(moments, full.key(SHARDS[0]), RECORD_FILE)]
    assert paths == [moments, *(covariance_file(moments, layer) for layer in range(4))]
    assert [artifact.path for artifact in plain.files(moments, "", RECORD_FILE)] == [moments]
    assert not full.is_whole(SHARDS[0])


def test_the_key_of_statistics_depends_on_every_record_and_their_order(tmp_path):
    records = records_of(tmp_path)
    assert len({records.merged_key(shards) for shards in (SHARDS, SHARDS[:2], SHARDS[::-1])}) == 3
