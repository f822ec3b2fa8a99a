"""The draw: which rows are taken, what is counted, and that no row is both calibrated and judged on."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, Renderer, Split, content_key, judged_rows, split_of
from seap_ray.models.row_files import RowPart
from seap_ray.models.row_sources import calibration_rows
from seap_ray.pipeline import draw as draw_module
from seap_ray.pipeline.draw import Selection, _Distinct, _PartDraw, draw, draw_corpus, draw_judged, judged_text
from seap_ray.pipeline.evaluate import eval_task
from seap_ray.pipeline.ray_errors import unwrap_ray_errors
from seap_ray.pipeline.shards import make_shards
from seap_ray.storage.run import Run
from seap_ray.tasks import Task

often = settings(max_examples=60, deadline=None)
ROWS = [{"q": f"what is {i}?", "a": str(i)} for i in range(300)]


def task(path: Path | str = "/x", **fields: Any) -> Task:
    templates = {"question": "{{ q }}", "answer": "{{ a }}", "metric": "exact_match"}
    return Task(**{"name": "mine", "path": str(path), **templates, **fields})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_one_process(parts: list[RowPart], selection: Selection) -> _PartDraw:
    """Draw as the cluster does, which merges the draws of all parts."""
    drawn = _PartDraw(selection)
    for part in parts:
        drawn.merge(_PartDraw(selection).read(part.rows()))
    return drawn


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(draw_module, "_draw_parts", in_one_process)


class Rows(RowPart):
    """A part of rows at hand."""

    def __init__(self, rows):
        object.__setattr__(self, "_rows", rows)

    def rows(self):
        yield from self._rows


def drawn_from(rows, *, n=None, parts=3, **fields):
    selection = Selection(fields.pop("task", task()), n, fields.pop("seed", 0), **fields)
    return draw([Rows(rows[i::parts]) for i in range(parts)], selection)


def texts(drawn):
    return [item.text for item in drawn.items]


# --- which rows are drawn --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
def test_the_draw_does_not_depend_on_the_order_or_the_parts_of_the_corpus():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    expected = drawn_from(ROWS, n=40, parts=1)
    assert drawn_from(shuffled, n=40, parts=7) == expected
    assert texts(drawn_from(ROWS, n=40, seed=1)) != texts(expected)
    assert texts(drawn_from(ROWS, n=20)) == texts(expected)[:20]


@pytest.mark.usefixtures("without_ray")
def test_the_draw_covers_the_whole_corpus_and_not_its_head():
    drawn = drawn_from(ROWS, n=60)
    places = [int(item.answer) for item in drawn.items]
    assert drawn.n_rows == 300
    assert sum(place < 60 for place in places) < 30
    assert max(places) > 240


@often
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", "", " "])), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 8)),
    st.integers(1, 4),
)
def test_duplicates_are_drawn_once_and_every_row_is_counted_once(pairs, n, parts):
    rows = [{"q": question, "a": answer} for question, answer in pairs]
    usable = [(question, answer) for question, answer in pairs if answer.strip()]
    selection = Selection(task(), n, 0)
    drawn = in_one_process([Rows(rows[i::parts]) for i in range(parts)], selection)

    assert len(drawn.items) == min(n or 99, len(set(usable)))
    assert {(item.question, item.answer) for item in drawn.items.values()} <= set(usable)
    assert drawn.counts["no_answer"] == len(pairs) - len(usable)
    assert drawn.distinct.n_duplicates() == len(usable) - len(set(usable))
    assert drawn.n_rows == len(rows)


@pytest.mark.usefixtures("without_ray")
def test_of_rows_with_one_text_and_other_choices_the_same_is_drawn_in_whatever_order():
    rows = [{"q": "?", "a": "x", "c": choices} for choices in (["x", "z"], ["x", "y"])]
    mine = task(choices="c", metric="acc")
    drawn = [drawn_from(order, task=mine, parts=parts) for order in (rows, rows[::-1]) for parts in (1, 2)]
    assert all(each.items == drawn[0].items and each.counts == {"duplicate": 1} for each in drawn)


def test_duplicates_among_very_many_rows_are_estimated(monkeypatch):
    monkeypatch.setattr(draw_module, "COUNTED_KEYS", 500)
    keys = [random.Random(i % 4000).randbytes(16) for i in range(6000)]
    halves = [_Distinct(), _Distinct()]
    for i, key in enumerate(keys):
        halves[i % 2].add(key)

    halves[0].merge(halves[1])
    assert len(halves[0].counts) <= 500
    assert halves[0].n_duplicates() == pytest.approx(2000, rel=0.15)


# --- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
def test_blank_rows_and_rows_without_an_answer_are_counted_and_left_out():
    rows = [{"q": " ", "a": "\n"}] * 7 + [{"q": "?", "a": None}, {"q": "?"}] + ROWS[:5]
    drawn = drawn_from(rows, n=100)
    assert (len(drawn.items), drawn.n_rows, drawn.counts) == (5, 14, {"blank": 7, "no_answer": 2})


@pytest.mark.usefixtures("without_ray")
def test_a_corpus_without_a_row_to_draw_is_refused_by_name():
    with pytest.raises(DataError, match="^tasks.mine: all 7 rows of the corpus are blank$"):
        drawn_from([{"q": " ", "a": ""}] * 7, n=5)
    with pytest.raises(DataError, match="^tasks.mine: none of the 3 rows is left: 1 blank, 2 without an answer$"):
        drawn_from([{"q": "?", "a": ""}, {"q": "?", "a": None}, {"q": "", "a": ""}])
    with pytest.raises(DataError, match="^tasks.mine: the corpus has no rows$"):
        drawn_from([])


@pytest.mark.usefixtures("without_ray")
def test_a_column_that_no_row_has_is_refused_and_one_that_some_rows_have_is_not():
    with pytest.raises(DataError, match="^tasks.mine: 'a' is undefined; the columns are q$"):
        drawn_from([{"q": "?"}] * 5)
    assert len(drawn_from([{"q": "?"}] * 5 + [{"q": "?", "a": "x"}]).items) == 1


@pytest.mark.usefixtures("without_ray")
def test_rows_whose_answer_is_none_of_their_choices_are_calibrated_and_not_judged():
    rows = [
        {"q": "1", "a": "x", "c": ["x", "y"]},
        {"q": "2", "a": "x", "c": ["y", "z"]},
        {"q": "3", "a": "x", "c": ["x", "x"]},
        {"q": "4", "a": "x ", "c": ["x", "z"]},
    ]
    mine = task(choices="c", metric="acc")
    calibrated = drawn_from(rows, task=mine)
    judged = drawn_from(rows, task=mine, is_judged=True)
    assert sorted(item.question for item in calibrated.items) == ["1", "2", "3", "4"]
    assert sorted(item.question for item in judged.items) == ["1", "3", "4"]
    assert calibrated.counts == judged.counts == {"wrong_answer": 1, "same_choices": 1}


# --- held out --------------------------------------------------------------------------------------------------------


@often
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), min_size=2, max_size=60),
    st.integers(0, 3),
    st.integers(1, 20),
    st.booleans(),
)
def test_no_judged_row_is_a_calibrated_one_or_a_duplicate_of_one_or_has_its_question(pairs, seed, n, official):
    rows = [{"q": f"q{question}", "a": f"a{answer}"} for question, answer in pairs]
    mine = task(official="{{ a }} of {{ q | upper }}" if official else None)
    selection = Selection(mine, n, seed, official, split=Split(seed))
    parts = [Rows(rows[::2]), Rows(rows[1::2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_module, "_draw_parts", in_one_process)
        if len({question for question, _ in pairs}) == 1:
            with pytest.raises(DataError, match="tasks.mine: all rows have the same question"):
                draw(parts, selection)
            return

        calibrated = draw(parts, selection)
        judged = draw(parts, replace(selection, official=False, is_judged=True))

    assert calibrated.items and judged.items
    assert not {item.question for item in calibrated.items} & {item.question for item in judged.items}
    assert not set(map(content_key, calibrated.items)) & set(map(content_key, judged.items))
    # Every row is on one side.
    assert calibrated.counts["held_out"] + judged.counts["left"] == len(rows)
    # What lm-eval is told is the same.
    split = split_of(mine, seed, map(Renderer(mine).item, rows))
    assert all(split.holds_out(item) for item in judged.items)
    assert not any(split.holds_out(item) for item in calibrated.items)


@often
@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_a_row_of_the_evaluation_that_was_calibrated_on_is_left_out(train, test):
    rows = [[{"q": f"q{i}", "a": f"a{i}"} for i in numbers] for numbers in (train, test)]
    calibrated = in_one_process([Rows(rows[0])], Selection(task(), 5, 0))
    keys = frozenset(map(content_key, calibrated.items.values()))
    judged = in_one_process([Rows(rows[1])], Selection(task(), None, 0, is_judged=True, calibrated=keys))

    drawn = {item.question for item in calibrated.items.values()}
    assert {item.question for item in judged.items.values()} == {f"q{i}" for i in test} - drawn
    assert judged.counts["calibrated"] == sum(f"q{i}" in drawn for i in test)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    "evaluation",
    [{}, {"evaluation_split": "train"}, {"evaluation_path": "{}/*.jsonl"}, {"evaluation_path": "{}", "path": "{}"}],
    ids=["none", "equal split", "pattern", "folder"],
)
def test_a_task_without_rows_of_its_own_is_judged_on_rows_held_out_of_its_corpus(tmp_path, evaluation):
    write(tmp_path / "train.jsonl", ROWS + ROWS[:30])
    fields = {"path": "{}/train.jsonl", **evaluation}
    mine = task(**{name: value.format(tmp_path) for name, value in fields.items()})
    calibrated = draw_corpus(mine, n=None, seed=0)
    judged = draw_judged(mine, n=None, seed=0)

    assert {item.question for item in calibrated.items} | {item.question for item in judged.items} == {
        row["q"] for row in ROWS
    }
    assert len(calibrated.items) + len(judged.items) == 300
    assert 40 < len(judged.items) < 80
    assert calibrated.counts["duplicate"] + judged.counts["duplicate"] == 30


@pytest.mark.usefixtures("without_ray")
def test_a_task_of_recall_is_judged_on_what_it_was_calibrated_on(tmp_path):
    mine = task(write(tmp_path / "rows.jsonl", ROWS), held_out=False)
    assert draw_corpus(mine, n=None, seed=0) == draw_judged(mine, n=None, seed=0)


def test_a_text_of_the_corpus_itself_is_of_its_held_out_rows_in_their_order(tmp_path):
    lines = [f" line {i}" for i in range(100)]
    path = tmp_path / "rows.jsonl"
    write(path, [{"a": line} for line in [*lines, "", "  "]])
    mine = task(path, question="", metric="window_perplexity")
    assert judged_rows(mine).is_split_off

    held_out = judged_text(mine, seed=0).split("\n\n")
    items = [Item(line, "", line, []) for line in lines]
    split = split_of(mine, 0, items)
    assert held_out == [item.text for item in items if split.holds_out(item)]
    assert 10 < len(held_out) < 30

    other = task(path, question="", metric="window_perplexity", held_out=False)
    assert judged_text(other, seed=0) == "\n\n".join([*lines, "", "  "])


# --- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_parquet_jsonl_csv_and_txt_give_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=50)
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in ROWS))
    (tmp_path / "rows.txt").write_text("".join(f"{row['q']} {row['a']}\n" for row in ROWS))

    def drawn(name, **fields):
        return sorted(texts(draw_corpus(task(tmp_path / name, held_out=False, **fields), n=300, seed=0)))

    expected = sorted(f"{row['q']} {row['a']}" for row in ROWS)
    assert drawn("rows.parquet") == drawn("rows.jsonl") == drawn("rows.csv") == expected
    assert drawn("rows.txt", question="", answer="{{ text }}") == expected


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_corpus_of_one_question_is_calibrated_on_whole_where_nothing_is_evaluated(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS[:1])
    mine = task(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="all rows have the same question"):
        draw_corpus(mine, n=10, seed=0)
    assert len(draw_corpus(mine, n=10, seed=0, is_evaluated=False).items) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_cluster_draws_as_one_process_does(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.jsonl", ROWS[i::5])
    parts = [*calibration_rows(task(tmp_path / "*.jsonl")).parts()]
    assert len(parts) == 5

    mine = task()
    split = split_of(mine, 0, map(Renderer(mine).item, ROWS))
    drawn = draw(parts, Selection(mine, 40, 0, split=Split(0)))
    expected = in_one_process(parts, Selection(mine, 40, 0, split=split))
    assert drawn.items == tuple(item for _, item in sorted(expected.items.items()))
    assert drawn.counts == expected.counts


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("has_own_rows", [False, True])
def test_shards_the_routers_prompts_and_the_judge_share_no_row(tmp_path, has_own_rows):
    rng = random.Random(has_own_rows)
    rows = [{"q": f"what is {rng.randrange(60)}?", "a": str(rng.randrange(2))} for _ in range(300)]
    fields = {"evaluation_path": str(write(tmp_path / "test.jsonl", rows[100:]))} if has_own_rows else {}
    mine = task(write(tmp_path / "rows.jsonl", rows[:200]), **fields)
    config = Config.model_validate(
        {
            "run": {"storage": str(tmp_path), "name": "run"},
            "tasks": [mine.model_dump()],
            "corpus": {"samples": 40, "shard_sequences": 16},
        }
    )

    run = Run.of(config)
    (manifest,) = make_shards(config, Checkpoint.open("demo"), run, lambda _: None)
    tables = [pq.read_table(shard.path(run)) for shard in manifest.shards]
    calibrated = [text for table in tables for text in table.column("text").to_pylist()]
    judged = eval_task(config, run, mine, by_lm_eval=False)

    # The last shard is the ridge's: no row is in two.
    assert len(tables) > 1 and len(calibrated) == len(set(calibrated))
    assert judged.items and not set(calibrated) & {item.text for item in judged.items}
    # Where rows are held out, no question is on both sides.
    if not has_own_rows:
        assert not set(manifest.read_prompts(run)) & {item.question for item in judged.items}
        assert manifest.counts["held_out"] + judged.counts["left"] == 200
    # The second time nothing is drawn.
    assert eval_task(config, run, mine, by_lm_eval=False) == judged


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_row_that_does_not_fit_ends_the_draw_with_one_line(tmp_path):
    mine = task(write(tmp_path / "rows.jsonl", [*ROWS, {"q": [1], "a": "x"}]), held_out=False)
    with pytest.raises(DataError, match=r"^tasks.mine.question: prints a whole list; .*$"), unwrap_ray_errors():
        draw_corpus(mine, n=5, seed=0)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mine = task("owner/corpus", subset="main", split="train", evaluation_split="test")
    assert draw_corpus(mine, n=None, seed=0).n_rows == 300
    assert asked == [("owner/corpus", "main", "train")]


def test_a_hub_that_does_not_answer_is_one_line_that_says_what_works(monkeypatch):
    import datasets

    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"tasks.mine: the hub did not give owner/corpus \(Couldn't reach the Hub\)"):
        draw_corpus(task("owner/corpus", evaluation_split="test"), n=5, seed=0)
