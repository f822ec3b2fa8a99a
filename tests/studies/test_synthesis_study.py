"""Texts of the model's own in a run, and the study that compares them with rows."""

import csv
import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.studies.run import check
from seap_ray.studies.synthesis import CORPORA
from tests.support import ROOT

main = runpy.run_path(str(ROOT / "jobs" / "eval.py"))["main"]
TASKS = ("arithmetic", "prose")


def arguments(storage: Path, *more: str) -> list[str]:
    settings = [
        "study=synthesis",
        f"tasks=[{', '.join(TASKS)}]",
        "corpus.samples=24",
        "corpus.shard_sequences=6",
        "corpus.synthesis={samples: 24, temperature: 0.5}",
        "pruning.ratio=[0.5]",
        "pruning.score=wifv",
        "pruning.compensation=mean",
        "pruning.allocation.kind=logistic",
        "evaluation.samples=20",
    ]
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", "run.name=run", *settings, *more]


def manifest(run: Path, task: str) -> dict:
    return json.loads((run / "shards" / task / "manifest.json").read_text())


def texts(run: Path, task: str, shard: str) -> list[str]:
    return pq.read_table(run / "shards" / task / f"{shard}.parquet").column("text").to_pylist()


def table(run: Path) -> list[dict[str, str]]:
    with (run / "results" / "synthesis.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.ray
def test_the_study_compares_rows_with_texts_that_the_model_wrote_behind_their_questions(cluster, tmp_path, capsys):
    assert main(arguments(tmp_path)) == 0
    run = tmp_path / "run-synthesis"
    output = capsys.readouterr().out
    assert "writing texts 48 texts" in output and "of them in texts of the model's own" in output

    tokens: dict[str, int] = {}
    for task in TASKS:
        shards = manifest(run, task)["shards"]
        assert [shard["shard"] for shard in shards[:4]] == [f"s{i:05d}" for i in range(4)]
        assert [shard["is_synthetic"] for shard in shards] == [True] * 4 + [False] * 4, "the corpus's own come last"
        # A batch of texts goes on from the questions of the shard of its number.
        for number in range(4):
            rows, written = (texts(run, task, f"{letter}{number:05d}") for letter in ("", "s"))
            beginnings = {text[:6] for text in rows}
            assert 0 < len(written) <= len(rows) == 6
            assert all(text[:6] in beginnings for text in written)
        sizes = [shard["n_tokens"] for shard in shards]
        of_task = (
            sum(sizes[4:6]),
            sum(sizes[4:6]) + sum(sizes[:2]),
            sum(sizes[4:6]) + sum(sizes[2:4]),
            sum(sizes[:4]),
            sum(sizes[4:]),
        )
        for corpus, n_tokens in zip(CORPORA, of_task, strict=True):
            tokens[corpus] = tokens.get(corpus, 0) + n_tokens

    rows = table(run)
    assert [(row["corpus"], int(row["tokens"])) for row in rows] == [*tokens.items()]
    assert all(0 <= float(row["mean acc"]) <= 1 and float(row["arithmetic"]) >= 0 for row in rows)

    # The same command has all of it; lost shards are made from the texts that are there, to the byte.
    before = (run / "shards/prose/s00001.parquet").read_bytes()
    (run / "shards/prose/manifest.json").unlink()
    assert main(arguments(tmp_path)) == 0
    assert "writing texts" not in capsys.readouterr().out
    assert (run / "shards/prose/s00001.parquet").read_bytes() == before
    assert table(run) == rows
    # Another temperature gives other texts; the demo model is so sure of its own that it has to be a high one.
    assert main(arguments(tmp_path, "corpus.synthesis={samples: 24, temperature: 40}", "run.name=hot")) == 0
    hot = tmp_path / "hot-synthesis"
    assert (hot / "shards/prose/s00001.parquet").read_bytes() != before
    assert texts(hot, "prose", "00001") == texts(run, "prose", "00001")


def test_texts_must_be_as_many_as_the_rows_they_are_compared_with():
    check(load_config(["study=synthesis"]))
    with pytest.raises(ConfigError, match="corpus.synthesis.samples.*400"):
        check(load_config(["study=synthesis", "corpus.synthesis.samples=399"]))


def test_the_study_of_corpus_sizes_counts_rows_alone():
    with pytest.raises(ConfigError, match="corpus.synthesis.samples"):
        check(load_config(["study=corpus", "corpus.synthesis.samples=10"]))


@pytest.mark.parametrize("value", ["{samples: -1}", "{temperature: -0.1}", "{temperature: .inf}", "{tokens: 3}"])
def test_odd_settings_are_refused_by_their_key(value):
    with pytest.raises(ConfigError, match="corpus.synthesis"):
        load_config([f"corpus.synthesis={value}"])
