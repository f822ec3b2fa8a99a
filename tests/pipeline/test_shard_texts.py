"""Texts of shards: in the chat template or plain, which of their tokens count, and what is left out."""

import json
import math
import re
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seap_ray.config import Config
from seap_ray.errors import ConfigError, DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, Renderer, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.models.sequences import CountedSequence, counted_of
from seap_ray.pipeline import shards
from seap_ray.pipeline.draw import Draw
from seap_ray.pipeline.shards import Manifest, _write_task, shard_sizes, shards_artifact
from seap_ray.storage.run import Run
from seap_ray.tasks import Task
from tests.support.builders import demo_with_template

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}{{ m['role'][0] }}: {{ m['content'] }}.{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def model(tmp_path) -> Path:
    """The demo model with a chat template that writes conversations."""
    return demo_with_template(tmp_path / "model", TEMPLATE)


def rows(n: int) -> list[dict]:
    return [{"q": f"what is {i}?", "a": str(i)} for i in range(n)]


def task(**fields) -> Task:
    return Task(**{"name": "mine", "path": "demo:sort", "question": "{{ q }}", "answer": "{{ a }}", **fields})


def config_of(model: Path, **corpus) -> Config:
    storage = {"storage": str(model.parent), "name": "run"}
    source = {"source": str(model)}
    return Config.model_validate({"run": storage, "model": source, "corpus": {"shard_sequences": 16, **corpus}})


def written(model: Path, mine: Task, given: list[dict], **corpus) -> tuple[Run, Manifest]:
    config = config_of(model, **corpus)
    run = Run.of(config)
    renderer = Renderer(mine)
    items = tuple(map(renderer.item, given))
    _write_task(config, run, mine, "key", Draw(items, len(items), {"blank": 3}))
    manifest = Manifest.read(run.shards("mine"))
    assert manifest is not None
    return run, manifest


def read(run: Run, manifest: Manifest) -> list:
    return [sequence for shard in manifest.shards for sequence in shard.sequences(run)]


@given(n_rows=st.integers(1, 5000), most=st.integers(1, 600))
def test_rows_are_spread_evenly_over_the_fewest_shards_and_at_least_two(n_rows, most):
    sizes = shard_sizes(n_rows, most)
    assert sum(sizes) == n_rows
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 <= min(sizes)
    assert sizes == sorted(sizes, reverse=True)
    if n_rows > 1:
        assert len(sizes) == max(math.ceil(n_rows / most), 2)
    else:
        assert sizes == [1]


@pytest.mark.parametrize("packing", ["bucket", "pack"])
@pytest.mark.parametrize(("n_rows", "expected"), [(1, [1]), (2, [1, 1]), (16, [8, 8]), (17, [9, 8]), (33, [11] * 3)])
def test_shards_are_of_neighbouring_rows_and_none_is_a_small_remainder(model, packing, n_rows, expected):
    run, manifest = written(model, task(), rows(n_rows), packing=packing, sequence_length=64)
    all_sequences = [shard.sequences(run) for shard in manifest.shards]
    tokenizer = load_tokenizer(model)
    # In both packings a shard's tokens are those of its rows, one row after another.
    texts = [tokenizer.decode([*chain.from_iterable(sequences)]) for sequences in all_sequences]
    asked = [[int(number) for number in re.findall(r"whatis(\d+)", text.replace(" ", ""))] for text in texts]
    assert [len(numbers) for numbers in asked] == expected
    assert [number for numbers in asked for number in numbers] == [*range(n_rows)]
    assert [shard.shard for shard in manifest.shards] == [f"{i:05d}" for i in range(len(expected))]


def test_no_shard_of_packed_rows_is_empty_where_few_tokens_count(model):
    given_rows = [{"q": "x" * 50, "a": "y"} for _ in range(5)]
    settings = {"packing": "pack", "sequence_length": 8, "shard_sequences": 1}
    run, manifest = written(model, task(), given_rows, count="assistant", **settings)
    assert len(manifest.shards) == 5
    for shard in manifest.shards:
        assert any(counts for sequence in shard.sequences(run) for counts in counted_of(sequence))


def test_questions_are_in_the_template_and_a_task_may_be_without(model):
    tokenizer = load_tokenizer(model)
    run, manifest = written(model, task(), rows(20))
    assert manifest.chat and manifest.counts == {"blank": 3}
    texts = pq.read_table(manifest.shards[0].path(run)).column("text").to_pylist()
    assert texts[7] == "<bos>u: what is 7?.\na: 7.\n"
    sequences = read(run, manifest)
    assert sequences[7] == tokenizer(texts[7], add_special_tokens=False)["input_ids"]
    assert sequences[7].count(tokenizer.bos_token_id) == 1
    # What a user would ask is no less than what they write.
    assert manifest.read_prompts(run)[7] == "what is 7?"

    run, plain = written(model, task(chat="never"), rows(20))
    assert not plain.chat
    assert read(run, plain)[7] == tokenizer("what is 7? 7")["input_ids"]


@pytest.mark.parametrize("packing", ["bucket", "pack"])
def test_which_tokens_count_is_beside_the_ids_where_not_all_do(model, packing):
    tokenizer = load_tokenizer(model)
    settings = {"packing": packing, "sequence_length": 64}
    run, every = written(model, task(), rows(20), **settings)
    assert pq.read_table(every.shards[0].path(run)).column_names == ["ids", "text"]
    ids = [token for sequence in read(run, every) for token in sequence]

    run, some = written(model, task(), rows(20), count="assistant", **settings)
    sequences = read(run, some)
    assert all(isinstance(sequence, CountedSequence) for sequence in sequences)
    assert [token for sequence in sequences for token in sequence] == ids
    counted = [counts for sequence in sequences for counts in counted_of(sequence)]
    kept = [token for token, counts in zip(ids, counted, strict=True) if counts]
    assert tokenizer.decode(kept).replace(" ", "") == "".join(f"{i}." for i in range(20))
    # Work is by all tokens, as before.
    assert some.n_tokens == every.n_tokens == len(ids)


def test_sequences_of_which_no_token_counts_are_left_out_and_counted(model):
    given = [{"q": "x" * 50, "a": "y"}, *rows(3)]
    run, manifest = written(model, task(), given, count="assistant", sequence_length=32)
    assert len(read(run, manifest)) == 3
    assert manifest.counts == {"blank": 3, "no_token": 1}
    assert manifest.n_cut == 1

    with pytest.raises(DataError, match=r"tasks.mine: none of the 1 rows is left: .*1 without a token that counts"):
        written(model, task(), given[:1], count="assistant", sequence_length=32)


def test_chunks_of_which_no_token_counts_are_left_out(model):
    settings = {"packing": "pack", "sequence_length": 8}
    run, manifest = written(model, task(), [{"q": "x" * 50, "a": "y"}], count="assistant", **settings)
    sequences = read(run, manifest)
    assert 1 <= len(sequences) < 58 // 8 and all(any(counted_of(sequence)) for sequence in sequences)


def test_conversations_that_the_template_does_not_take_are_counted(model):
    mine = task(question="", answer="", messages="{{ messages }}")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    system = [{"role": "system", "content": "be brief"}, *talk]
    run, manifest = written(model, mine, [{"messages": talk}, {"messages": system}])
    assert len(read(run, manifest)) == 1 and manifest.counts == {"blank": 3, "refused": 1}

    with pytest.raises(DataError, match=r"^tasks.mine: the chat template does not take .*\(No system role\); it takes"):
        written(model, mine, [{"messages": system}])


def test_a_token_without_an_embedding_is_one_line_with_task_and_token(model):
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)
    n_rows = Checkpoint.open(str(model)).vocabulary_size
    with pytest.raises(
        DataError, match=f"^tasks.mine: .* token 'zebra' as number {len(tokenizer) - 1}, .* {n_rows} ro"
    ):
        written(model, task(), [{"q": "a zebra", "a": "b"}])


def test_the_key_changes_with_the_template_where_it_is_used(model):
    def key(**fields) -> str:
        config = config_of(model)
        checkpoint = Checkpoint.open(str(model))
        return shards_artifact(config, checkpoint, Run.of(config), task(**fields), load_tokenizer(model)).key

    before = [key(), key(chat="never")]
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("u: ", "user: ").replace("a: ", "answer: "))
    after = [key(), key(chat="never")]
    assert before[0] != after[0] and before[1] == after[1]

    config_file = model / "tokenizer_config.json"
    config_file.write_text(
        json.dumps({k: v for k, v in json.loads(config_file.read_text()).items() if "chat" not in k})
    )
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^tasks.mine.chat: always, but"):
        key(chat="always")


def test_the_key_changes_with_the_version_of_the_contents(model, monkeypatch):
    config = config_of(model)
    checkpoint = Checkpoint.open(str(model))
    tokenizer = load_tokenizer(model)
    before = shards_artifact(config, checkpoint, Run.of(config), task(), tokenizer).key
    monkeypatch.setattr(shards, "SCHEMA", shards.SCHEMA + 1)
    assert shards_artifact(config, checkpoint, Run.of(config), task(), tokenizer).key != before


def test_the_sequences_are_those_of_the_encoding(model):
    encoding = Encoding(load_tokenizer(model), is_chat=True)
    item = Item("q a", "q", "a", [], messages=[{"role": "user", "content": "q"}])
    run, manifest = written(model, task(question="q", answer="a"), [{}])
    assert read(run, manifest) == [encoding.sequence(item)]
