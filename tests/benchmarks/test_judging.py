"""The judging benchmark: what it makes of answers and seconds, and its worker beside a plain forward pass."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.judging import BATCH_SIZES, ROOT, Build, BuildError, _Contest, _report, _Worker, main
from benchmarks.measure import load_rows
from tests.support.builders import save_dense


class FakeBuild:
    """Answers like a build, without a model."""

    def __init__(self, shift: float, decision: float) -> None:
        self.shift = shift
        self.decision = decision

    def ask(self, method: str, task: str, *_: int) -> list:
        if method == "judge":
            return [1.0, self.decision]
        return [(-2.0 + self.shift, True), (-3.0, False)]


def test_a_contest_says_how_fast_and_how_far_apart_builds_are(tmp_path, capsys):
    builds = {"new": FakeBuild(0, 1.0), "bfloat16": FakeBuild(0.1, 1.0), "old": FakeBuild(0.25, 0.0)}
    contest = _Contest(builds, {"arc_easy": 50, "boolq": 70}, n_rows=2)
    contest.run(rounds=2)
    assert contest.largest_difference("lm_eval new", "lm_eval old") == 0.25
    assert contest.decisions_apart("judge new", "judge old") == 2

    contest.seconds |= {f"judge new {task}": [1.0, 2.0] for task in contest.tokens}
    contest.seconds |= {f"judge old {task}": [3.0, 8.0] for task in contest.tokens}
    contest.seconds |= {f"hflm {size} {task}": [size, size] for size in BATCH_SIZES for task in contest.tokens}
    assert contest.speedups("judge new", "judge old", "all") == [3.0, 4.0]
    assert contest.items_a_second("judge new", "all") == 4 / 3
    assert contest.fastest_hflm() == f"hflm {min(BATCH_SIZES)}"

    _report(contest, "tiny", tmp_path)
    _, rows = load_rows(tmp_path / "judging.json")
    (first,) = [row for row in rows if row.name == "tiny, all: own judge beside one row a choice"]
    assert first.ratio == 3.5 and first.met
    assert "judging.json" in capsys.readouterr().out


def test_an_answer_that_is_greedy_in_one_build_alone_is_infinitely_far(tmp_path):
    contest = _Contest({}, {"piqa": 1}, n_rows=1)
    contest.answers = {"a": {"piqa": [(-1.0, True)]}, "b": {"piqa": [(-1.0, False)]}}
    assert contest.largest_difference("a", "b") == float("inf")


def test_a_worker_answers_alike_in_all_its_ways(tmp_path):
    pytest.importorskip("lm_eval")
    save_dense(tmp_path / "model", "llama_gqa", torch.float32)
    rows = [{"goal": "boil it", "sol1": "heat", "sol2": "cool it", "label": i % 2} for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    worker = _Worker(
        {
            "model": str(tmp_path / "model"),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "rows": 2,
            "batch_tokens": 64,
            "tasks": {"piqa": str(file)},
        }
    )
    ours = worker.lm_eval("piqa")
    for (value, greedy), (own_value, own_greedy) in zip(ours, worker.hflm("piqa", 2), strict=True):
        assert value == pytest.approx(own_value, abs=1e-4) and greedy == own_greedy
    assert len(ours) == 4 and len(worker.judge("piqa")) == 2 and worker.tokens("piqa") > 4


# --- what goes wrong -------------------------------------------------------------------------------------------------


def checkout_with(folder: Path, worker: str) -> Path:
    """Write a checkout whose ``seap_ray.models.corpus``, which a worker imports first of all, does what it is told."""
    package = folder / "seap_ray" / "models"
    package.mkdir(parents=True)
    (folder / "seap_ray" / "judges").mkdir()
    for file in (package / "__init__.py", folder / "seap_ray" / "__init__.py"):
        file.touch()
    (package / "corpus.py").write_text(worker)
    return folder


def test_a_process_that_fails_is_named_with_its_last_lines(tmp_path):
    failing = checkout_with(tmp_path / "checkout", "raise OSError('no rows in it')")
    build = Build.of("old", failing, {"dtype": "float32"})
    try:
        with pytest.raises(BuildError) as failure:
            build.tokens()
        first, *last = str(failure.value).splitlines()
        assert first.startswith(f"build old ({failing}, float32) ended with exit code 1 at: loading the model and the")
        assert last[-1].strip() == "OSError: no rows in it" and len(last) <= 12

        # Nobody reads what is sent to it.
        with pytest.raises(BuildError, match=r"at: hflm piqa 8\. Its last lines:"):
            build.ask("hflm", "piqa", 8)
    finally:
        build.close()


def run_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["judging", *arguments])
    main()


def test_a_wrong_file_ends_in_one_error_and_no_traceback(tmp_path, monkeypatch):
    save_dense(tmp_path / "model", "llama_gqa", torch.float32)
    file = tmp_path / "rows.jsonl"
    file.write_text("no JSON")

    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, str(tmp_path / "model"), f"piqa={file}")
    assert str(end.value).startswith(f"build new ({ROOT}, float32) ended with exit code 1 at: loading")
    error, note = str(end.value).splitlines()[-2:]
    assert "JSONDecodeError" in error and note.strip() == f"while reading piqa={file}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["piqa"], "piqa: no such file"),
        (["piqa=missing.jsonl"], "piqa=missing.jsonl: no such file"),
        (["gsm8k=rows.jsonl"], "gsm8k=rows.jsonl: not TASK=FILE with a task of "),
        (["piqa=rows.jsonl", "--old", "elsewhere"], "--old elsewhere: no checkout of the repository"),
        (["piqa=rows.jsonl", "--old", "model"], "--old model: no checkout of the repository"),
    ],
)
def test_files_and_folders_are_checked_before_a_process_starts(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Build, "of", lambda *_: pytest.fail("a process was started"))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()

    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "model", *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err

    with pytest.raises(SystemExit):
        run_main(monkeypatch, "elsewhere", "piqa=rows.jsonl")
    assert "elsewhere: no folder of a model" in capsys.readouterr().err
