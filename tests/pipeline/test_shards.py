"""Shards on a real Ray cluster: the files."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.shards import Manifest, ShardFolder, make_shards
from seap_ray.storage.run import Run
from seap_ray.tasks import Task

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROWS = [{"q": f"what is {i}?", "a": str(i)} for i in range(300)]


def task(path: Path | str, **fields) -> Task:
    return Task(**{"name": "mine", "path": str(path), "question": "{{ q }}", "answer": "{{ a }}", **fields})


def parquet(path: Path, rows=ROWS, **options) -> Task:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return task(path)


def shards_of(folder: Path, mine: Task, **corpus) -> tuple[Run, Manifest, list[bytes]]:
    config = Config.model_validate(
        {
            "run": {"storage": str(folder), "name": "run"},
            "tasks": [mine.model_dump()],
            "corpus": {"samples": 50, "shard_sequences": 16, **corpus},
        }
    )
    run = Run.of(config)
    (manifest,) = make_shards(config, Checkpoint.open("demo"), run, lambda _: None)
    return run, manifest, [shard.path(run).read_bytes() for shard in manifest.shards]


def test_shards_hold_every_drawn_text_once_and_the_manifest_counts_their_tokens(tmp_path):
    _, manifest, files = shards_of(tmp_path, parquet(tmp_path / "rows.parquet"))
    tables = [pq.read_table(pa.BufferReader(file)) for file in files]
    texts = [text for table in tables for text in table.column("text").to_pylist()]
    ids = [ids for table in tables for ids in table.column("ids").to_pylist()]

    assert len(texts) == len(set(texts)) == 50
    assert [shard.n_sequences for shard in manifest.shards] == [13, 13, 12, 12]
    assert manifest.n_tokens == sum(map(len, ids)) == sum(len(text) + 1 for text in texts)


def test_shards_are_byte_equal_in_whatever_order_the_rows_lie(tmp_path):
    shuffled = random.Random(2).sample(ROWS, len(ROWS))
    _, _, first = shards_of(tmp_path / "1", parquet(tmp_path / "a.parquet"))
    _, _, second = shards_of(tmp_path / "2", parquet(tmp_path / "b.parquet", shuffled, row_group_size=30))
    assert first == second


def test_whole_shards_stay_and_a_damaged_one_is_made_again(tmp_path):
    mine = parquet(tmp_path / "rows.parquet")
    run, manifest, files = shards_of(tmp_path, mine)
    path = manifest.shards[1].path(run)
    written = path.stat().st_mtime_ns
    shards_of(tmp_path, mine)

    assert path.stat().st_mtime_ns == written
    damaged = bytearray(files[1])
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)

    assert not ShardFolder().is_whole(run.shards("mine"), manifest.fingerprint)
    assert shards_of(tmp_path, mine)[2] == files


def test_packed_shards_lose_no_token_and_are_full(tmp_path):
    mine = parquet(tmp_path / "rows.parquet")
    _, bucketed, _ = shards_of(tmp_path / "1", mine)
    _, packed, files = shards_of(tmp_path / "2", mine, packing="pack", sequence_length=32)

    assert packed.n_tokens == bucketed.n_tokens
    for file in files:
        lengths = [len(ids) for ids in pq.read_table(pa.BufferReader(file)).column("ids").to_pylist()]
        assert set(lengths[:-1]) == {32} or len(lengths) == 1


def test_a_token_budget_ends_the_draw_with_the_row_that_reaches_it(tmp_path):
    _, manifest, _ = shards_of(tmp_path, parquet(tmp_path / "rows.parquet"), max_tokens=200)
    assert 200 <= manifest.n_tokens < 200 + 25


def test_texts_beyond_the_longest_sequence_are_cut_and_counted(tmp_path):
    mine = parquet(tmp_path / "rows.parquet", [{"q": "x" * 400, "a": "y"}, *ROWS[:3]])
    # None of the few rows is held out.
    _, manifest, _ = shards_of(tmp_path, mine.model_copy(update={"held_out": False}), sequence_length=64)
    assert manifest.n_cut == 1


def test_prompts_are_the_questions_of_all_drawn_rows_or_their_texts_where_there_is_none(tmp_path):
    run, asked, _ = shards_of(tmp_path / "1", parquet(tmp_path / "rows.parquet"), max_tokens=200)
    prompts = asked.read_prompts(run)
    assert len(set(prompts)) == 50 > sum(shard.n_sequences for shard in asked.shards)
    assert set(prompts) <= {row["q"] for row in ROWS}

    prose = task(tmp_path / "rows.parquet", question="", answer="{{ q }} {{ a }}")
    run, told, files = shards_of(tmp_path / "2", prose)
    texts = [text for file in files for text in pq.read_table(pa.BufferReader(file)).column("text").to_pylist()]

    assert told.read_prompts(run) == texts


@pytest.mark.parametrize("how", ["damaged", "missing", "not in the manifest"])
def test_prompts_that_are_not_whole_are_made_again_and_the_shards_stay_the_same(tmp_path, how):
    mine = parquet(tmp_path / "rows.parquet")
    run, manifest, files = shards_of(tmp_path, mine)
    path, about = run.shards("mine") / "prompts.parquet", run.shards("mine") / "manifest.json"
    prompts = path.read_bytes()
    if how == "damaged":
        path.write_bytes(prompts[:-1] + b"?")
    elif how == "missing":
        path.unlink()
    else:
        values = json.loads(about.read_text())
        del values["prompts"]
        about.write_text(json.dumps(values))

    assert not ShardFolder().is_whole(run.shards("mine"), manifest.fingerprint)
    _, again, made = shards_of(tmp_path, mine)
    assert (again, made, path.read_bytes()) == (manifest, files, prompts)
