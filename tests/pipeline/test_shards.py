"""Shards on a real Ray cluster: the draw, the readers, the files."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.shards import Manifest, ShardFolder, draw, make_shards, read_rows
from seap_ray.storage.run import Run
from seap_ray.tasks import Task

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROWS = [{"q": f"what is {i}?", "a": str(i)} for i in range(300)]


def task(path: Path | str, **fields) -> Task:
    return Task(**{"name": "mine", "path": str(path), "question": "{{ q }}", "answer": "{{ a }}", **fields})


def drawn_from(rows, *, n: int, blocks: int = 3, seed: int = 0):
    dataset = ray.data.from_items(rows, override_num_blocks=blocks)
    return draw(task("unused"), dataset, n=n, seed=seed, official=False)


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


def test_the_draw_does_not_depend_on_the_order_or_the_blocks_of_the_corpus():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    one, other, reseeded = (
        drawn_from(rows, n=40, blocks=blocks, seed=seed)[0].column("text").to_pylist()
        for rows, blocks, seed in ((ROWS, 1, 0), (shuffled, 7, 0), (ROWS, 1, 1))
    )

    assert one == other
    assert one != reseeded


def test_the_draw_covers_the_whole_corpus_and_not_its_head():
    drawn, n_rows, _ = drawn_from(ROWS, n=60)
    places = [int(answer) for answer in drawn.column("answer").to_pylist()]
    assert n_rows == 300
    assert sum(place < 60 for place in places) < 30
    assert max(places) > 240


def test_blank_rows_are_counted_and_left_out():
    drawn, n_rows, n_blank = drawn_from([{"q": " ", "a": "\n"}] * 7 + ROWS[:5], n=100, blocks=6)
    assert (drawn.num_rows, n_rows, n_blank) == (5, 12, 7)


def test_a_corpus_of_blanks_is_refused_by_name():
    with pytest.raises(DataError, match="tasks.mine: all 7 rows of the corpus are blank"):
        drawn_from([{"q": " ", "a": ""}] * 7, n=5)


def test_parquet_jsonl_csv_and_txt_give_the_same_rows(tmp_path):
    parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in ROWS))
    (tmp_path / "rows.txt").write_text("".join(f"{row['q']} {row['a']}\n" for row in ROWS))

    def texts(name, **fields):
        mine = task(tmp_path / name, **fields)
        return sorted(draw(mine, read_rows(mine), n=300, seed=0, official=False)[0].column("text").to_pylist())

    expected = sorted(f"{row['q']} {row['a']}" for row in ROWS)
    assert texts("rows.parquet") == texts("rows.jsonl") == texts("rows.csv") == expected
    assert texts("rows.txt", question="", answer="{{ text }}") == expected


def test_one_process_looks_at_the_footers_of_a_parquet_corpus(tmp_path):
    def readers() -> int:
        return sum(actor["ActorClassName"] == "FooterReader" for actor in ray._private.state.actors().values())

    before = readers()
    assert len(read_rows(parquet(tmp_path / "rows.parquet")).take_all()) == len(ROWS)
    assert readers() == before + 1


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(task("owner/corpus", subset="main", split="train")).count() == 300
    assert asked == [("owner/corpus", "main", "train")]


def test_a_hub_that_does_not_answer_is_one_line_that_says_what_works(monkeypatch):
    import datasets

    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"tasks.mine: the hub did not give owner/corpus \(Couldn't reach the Hub\)"):
        read_rows(task("owner/corpus"))


def test_shards_hold_every_drawn_text_once_and_the_manifest_counts_their_tokens(tmp_path):
    _, manifest, files = shards_of(tmp_path, parquet(tmp_path / "rows.parquet"))
    tables = [pq.read_table(pa.BufferReader(file)) for file in files]
    texts = [text for table in tables for text in table.column("text").to_pylist()]
    ids = [ids for table in tables for ids in table.column("ids").to_pylist()]

    assert len(texts) == len(set(texts)) == 50
    assert [shard.n_sequences for shard in manifest.shards] == [16, 16, 16, 2]
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
    _, manifest, _ = shards_of(tmp_path, mine, sequence_length=64)
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
