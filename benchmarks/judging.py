"""Judging: multiple choice by this build, by another checkout and by lm-eval's own loop, in turns on the same rows.

    python -m benchmarks.judging MODEL arc_easy=FILE piqa=FILE ... [--old FOLDER] [--rows 16] [--rounds 3]

Every build runs in a process of its own, which loads the model once and waits for its turns. The rows are every k-th of
a file's. ``--save FOLDER`` writes ``judging.json``, of which ``python jobs/bench.py docs`` makes a table.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
TARGETS = {"arc_easy": "ratio >= 3.5", "all": "ratio >= 2.8"}
"""What this build is to reach beside the one before token trees."""
BATCH_SIZES = (8, 16, 32)
"""Batch sizes of lm-eval's own loop; the fastest one counts."""


# --- a process that judges: it imports the seap_ray of its PYTHONPATH ------------------------------------------------


class _Worker:
    """A model and tasks' rows, judged in one of several ways."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        from seap_ray.models.corpus import load_tokenizer
        from seap_ray.models.encoding import Encoding

        torch.set_num_threads(settings["threads"])
        transformers_logging.disable_progress_bar()
        folder = Path(settings["model"])
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.encoding = Encoding(load_tokenizer(folder))
        self.batch_tokens = settings["batch_tokens"]

        self.items = {task: _items(task, Path(file), settings["rows"]) for task, file in settings["tasks"].items()}
        self.requests = {task: self._requests(task) for task in settings["tasks"]}

    def _requests(self, task: str) -> list[tuple[None, list[int], list[int]]]:
        """Return a task's choices as lm-eval asks for them: no texts, ids of the prompt, ids of the choice."""
        requests = []
        for item in self.items[task]:
            for choice in item.choices:
                ids, start = self.encoding.continuation(item, choice)
                requests.append((None, ids[:start], ids[start:]))
        return requests

    def tokens(self, task: str) -> int:
        """Return the tokens of a task's choices with their prompts."""
        return sum(len(prompt) + len(end) for _, prompt, end in self.requests[task])

    def judge(self, task: str) -> list[float]:
        """Judge by our own judge, texts to decisions; return 1 or 0 for each row."""
        from seap_ray.judges.quality import measure
        from seap_ray.tasks import BUILT_IN

        quality = measure(self.model, self.encoding, BUILT_IN[task], self.items[task], batch_tokens=self.batch_tokens)
        return list(quality.values)

    def lm_eval(self, task: str) -> list[tuple[float, bool]]:
        """Score what lm-eval asks for by our model of it."""
        from seap_ray.judges.lm_eval import wrap

        lm = wrap(self.model, self.encoding, self.batch_tokens)
        return lm._loglikelihood_tokens(self.requests[task], disable_tqdm=True)

    def hflm(self, task: str, batch_size: int) -> list[tuple[float, bool]]:
        """Score what lm-eval asks for by its own loop."""
        import copy

        from lm_eval.models.huggingface import HFLM

        # lm-eval gives the tokenizer a padding token, so it has a copy.
        tokenizer = copy.deepcopy(self.encoding.tokenizer)
        lm = HFLM(self.model, tokenizer=tokenizer, batch_size=batch_size)
        return lm._loglikelihood_tokens(self.requests[task], disable_tqdm=True)


def _items(task: str, file: Path, n: int) -> list[Any]:
    """Return ``n`` rows of a file, evenly spaced, as the task renders them; an error's last line names the file."""
    from seap_ray.models.corpus import Renderer
    from seap_ray.tasks import BUILT_IN

    try:
        rows = _rows(file)
        renderer = Renderer(BUILT_IN[task])
        return [renderer.item(row) for row in rows[:: max(1, len(rows) // n)][:n]]
    except Exception as error:
        error.add_note(f"while reading {task}={file}")
        raise


def _rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text().splitlines()]


def _serve() -> None:
    """Answer one JSON line for each on stdin: the settings first, then names and arguments of ``_Worker``'s methods."""
    # Libraries print to stdout, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    worker = _Worker(json.loads(sys.stdin.readline()))
    print(json.dumps({task: worker.tokens(task) for task in worker.items}), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


# --- the contest -----------------------------------------------------------------------------------------------------


LAST_LINES = 12
"""Lines of a process that failed, which are shown: the end of a traceback."""


class BuildError(Exception):
    """A process that ended before it had answered."""


@dataclass(frozen=True)
class Build:
    """A process that works with one checkout in one type."""

    name: str
    process: "subprocess.Popen[str]"
    stderr: IO[str]
    """File that the process writes its warnings and its traceback to."""

    @classmethod
    def of(cls, name: str, folder: Path, settings: Mapping[str, Any], *, script: str = __file__) -> "Build":
        """Start a script's process with the checkout in ``folder``, and give it its settings."""
        # A file, not a pipe: nobody reads while the process works, and a full pipe would stop it.
        stderr = TemporaryFile("w+", errors="replace")
        # -P: the folder of this file would hide packages of the same names.
        process = subprocess.Popen(
            [sys.executable, "-P", script, "--worker"],
            env={**os.environ, "PYTHONPATH": str(folder), "TRANSFORMERS_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        build = cls(f"{name} ({folder}, {settings['dtype']})", process, stderr)
        build._send(settings, "starting")
        return build

    def tokens(self) -> dict[str, int]:
        """Wait until the process has loaded all; return what it answers: the tokens of each task's choices."""
        return self._receive("loading the model and the rows")

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the process's worker."""
        call = " ".join(map(str, (method, *arguments)))
        self._send((method, *arguments), call)
        return self._receive(call)

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        # What a process that has ended did not read cannot be written any more.
        with suppress(BrokenPipeError), self.process:
            pass
        self.stderr.close()

    def _send(self, value: Any, action: str) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._error(action) from None

    def _receive(self, action: str) -> Any:
        assert self.process.stdout
        # A process that has ended has no line left.
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise self._error(action)

    def _error(self, action: str) -> BuildError:
        exit_code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().splitlines()[-LAST_LINES:]
        return BuildError(
            "\n    ".join((f"build {self.name} ended with exit code {exit_code} at: {action}. Its last lines:", *lines))
        )


def main() -> None:
    """Measure, print and, with ``--save``, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("tasks", nargs="+", help="built-in tasks with their files: arc_easy=test.parquet")
    parser.add_argument("--old", type=Path, help="another checkout of the repository")
    parser.add_argument("--rows", type=int, default=16, help="rows of every task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--save", type=Path, help="folder that judging.json is written to")
    arguments = parser.parse_args()

    # Before any process loads a model.
    try:
        files = _files(arguments.tasks)
        _check_folders(arguments.model, arguments.old)
    except ValueError as error:
        parser.error(str(error))

    settings = {
        "model": str(arguments.model.resolve()),
        "tasks": files,
        "rows": arguments.rows,
        "threads": arguments.threads,
        "batch_tokens": arguments.batch_tokens,
    }
    try:
        contest = _measure(settings, arguments.old, arguments.rounds)
    except BuildError as error:
        raise SystemExit(str(error)) from None
    _report(contest, arguments.model.resolve().name, arguments.save)


def _files(tasks: Sequence[str]) -> dict[str, str]:
    """Return the file of each task. Raises ValueError for what is no ``TASK=FILE`` of a task with choices."""
    from seap_ray.tasks import BUILT_IN

    known = [name for name, task in BUILT_IN.items() if task.choices]
    files: dict[str, str] = {}
    for argument in tasks:
        name, _, file = argument.partition("=")
        if name not in known:
            raise ValueError(f"{argument}: not TASK=FILE with a task of {', '.join(known)}")
        if not Path(file).is_file():
            raise ValueError(f"{argument}: no such file")
        files[name] = str(Path(file).resolve())
    return files


def _check_folders(model: Path, old: Path | None) -> None:
    """Raise ValueError where a folder is not what it is to be."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model}: no folder of a model, which has a config.json")
    if old and not (old / "seap_ray" / "judges").is_dir():
        raise ValueError(f"--old {old}: no checkout of the repository, which has a folder seap_ray/judges")


def _measure(settings: Mapping[str, Any], old: Path | None, rounds: int) -> "_Contest":
    """Start all builds, let them judge in turns, and end them."""
    folders = {"new": (ROOT, "float32"), "bfloat16": (ROOT, "bfloat16")}
    if old:
        folders["old"] = (old.resolve(), "float32")

    builds: dict[str, Build] = {}
    try:
        # All load at once.
        for name, (folder, dtype) in folders.items():
            builds[name] = Build.of(name, folder, {**settings, "dtype": dtype})
        tokens = {name: build.tokens() for name, build in builds.items()}
        contest = _Contest(builds, tokens["new"], settings["rows"])
        contest.run(rounds)
    finally:
        for build in builds.values():
            build.close()
    return contest


class _Contest:
    """All turns: seconds of every contestant in every round, and what it answered last."""

    def __init__(self, builds: Mapping[str, Build], tokens: Mapping[str, int], n_rows: int) -> None:
        self.builds = builds
        self.tokens = tokens
        self.n_rows = n_rows
        self.answers: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, list[float]] = {}

    def run(self, rounds: int) -> None:
        """Let every contestant judge every task once a round."""
        from benchmarks.measure import alternate

        contestants: dict[str, Callable[[], object]] = {}
        for name in self.builds:
            contestants[f"judge {name}"] = partial(self._turn, f"judge {name}", name, "judge")
            contestants[f"lm_eval {name}"] = partial(self._turn, f"lm_eval {name}", name, "lm_eval")
        for size in BATCH_SIZES:
            contestants[f"hflm {size}"] = partial(self._turn, f"hflm {size}", "new", "hflm", size)

        # The first of a task's answers warms up what is loaded on its first use.
        for name in self.builds:
            self.builds[name].ask("judge", min(self.tokens, key=lambda task: self.tokens[task]))
        alternate(contestants, rounds, warm_up=False)

    def _turn(self, contestant: str, build: str, method: str, *settings: Any) -> None:
        import time

        for task in self.tokens:
            started = time.perf_counter()
            self.answers.setdefault(contestant, {})[task] = self.builds[build].ask(method, task, *settings)
            self.seconds.setdefault(f"{contestant} {task}", []).append(time.perf_counter() - started)

    def rounds_of(self, contestant: str, task: str) -> list[float]:
        """Return a contestant's seconds for a task, or for ``all`` of them, round by round."""
        if task != "all":
            return self.seconds[f"{contestant} {task}"]
        by_task = [self.seconds[f"{contestant} {name}"] for name in self.tokens]
        return [sum(seconds) for seconds in zip(*by_task, strict=True)]

    def items_a_second(self, contestant: str, task: str) -> float:
        """Return the rows that a contestant judges in a second."""
        n_tasks = len(self.tokens) if task == "all" else 1
        return n_tasks * self.n_rows / median(self.rounds_of(contestant, task))

    def speedups(self, contestant: str, baseline: str, task: str) -> list[float]:
        """Return how many times as fast as another a contestant is, round by round."""
        pairs = zip(self.rounds_of(contestant, task), self.rounds_of(baseline, task), strict=True)
        return [baseline_seconds / seconds for seconds, baseline_seconds in pairs]

    def fastest_hflm(self) -> str:
        """Return the contestant of lm-eval's own loop whose batch size is the fastest."""
        return min((f"hflm {size}" for size in BATCH_SIZES), key=lambda name: median(self.rounds_of(name, "all")))

    def largest_difference(self, one: str, other: str) -> float:
        """Return the largest difference of two contestants' log-likelihoods; infinite where a greedy answer differs."""
        largest = 0.0
        for task in self.tokens:
            for (value, greedy), (wanted, wanted_greedy) in zip(
                self.answers[one][task], self.answers[other][task], strict=True
            ):
                largest = max(largest, abs(value - wanted) if greedy == wanted_greedy else float("inf"))
        return largest

    def decisions_apart(self, one: str, other: str) -> int:
        """Return the number of rows on which two judges disagree."""
        apart = 0
        for task in self.tokens:
            pairs = zip(self.answers[one][task], self.answers[other][task], strict=True)
            apart += sum(value != wanted for value, wanted in pairs)
        return apart


# --- what is told ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """Two contestants, one of which is to be as fast as some target says."""

    name: str
    contestant: str
    baseline: str
    targets: Mapping[str, str]
    """Targets by task, or of ``all``."""


def _report(contest: _Contest, model: str, folder: Path | None) -> None:
    """Print the table, and write it to ``folder``."""
    from benchmarks.measure import Row, save_rows
    from benchmarks.suites import COLUMNS, _cells
    from seap_ray.report.table import text_table

    command = f"python -m benchmarks.judging {model} ... --rows {contest.n_rows}"
    row_of = partial(Row.of, "judging", command=command)
    rows = [*_speed_rows(contest, model, row_of), *_exactness_rows(contest, model, row_of)]

    print(text_table(COLUMNS, [_cells(row) for row in rows]))
    _print_tokens(contest)
    if folder:
        print(save_rows(folder, "judging", rows))


def _comparisons(contest: _Contest) -> list[_Comparison]:
    """Return what is compared for speed, beside one row a choice first, where there is another checkout."""
    comparisons = []
    if "old" in contest.builds:
        comparisons += [
            _Comparison("own judge beside one row a choice", "judge new", "judge old", TARGETS),
            _Comparison("lm-eval's tasks beside one row a choice", "lm_eval new", "lm_eval old", TARGETS),
        ]

    hflm = contest.fastest_hflm()
    own_loop = f"lm-eval's tasks beside its own loop, batches of {hflm.split()[1]}"
    return [
        *comparisons,
        _Comparison(own_loop, "lm_eval new", hflm, {"all": "ratio >= 2.5"}),
        _Comparison("own judge, bfloat16 beside float32", "judge bfloat16", "judge new", {}),
    ]


def _speed_rows(contest: _Contest, model: str, row_of: Callable[..., "Row"]) -> list["Row"]:
    """Return a row of each comparison for each task and for all of them."""
    rows = []
    for comparison in _comparisons(contest):
        for task in (*contest.tokens, "all"):
            row = row_of(
                f"{model}, {task}: {comparison.name}",
                ours=contest.items_a_second(comparison.contestant, task),
                baseline=contest.items_a_second(comparison.baseline, task),
                unit="rows/s",
                ratios=contest.speedups(comparison.contestant, comparison.baseline, task),
                target=comparison.targets.get(task, ""),
            )
            rows.append(row)
    return rows


def _exactness_rows(contest: _Contest, model: str, row_of: Callable[..., "Row"]) -> list["Row"]:
    """Return how far answers are from those of another checkout, and of lm-eval's own loop."""
    baselines = {"lm-eval's own loop": contest.fastest_hflm()}
    rows = []
    if "old" in contest.builds:
        baselines["one row a choice"] = "lm_eval old"
        apart = contest.decisions_apart("judge new", "judge old")
        rows.append(row_of(f"{model}: rows decided otherwise", ours=apart, unit="rows", target="ours <= 0"))

    for name, baseline in baselines.items():
        difference = contest.largest_difference("lm_eval new", baseline)
        label = f"{model}: largest difference of a log-likelihood from {name}, float32"
        rows.append(row_of(label, ours=difference, unit="nats", target="ours <= 1e-4"))
    return rows


def _print_tokens(contest: _Contest) -> None:
    """Print each task's tokens, and how many of them this build judges in a second."""
    for task, tokens in contest.tokens.items():
        seconds = median(contest.rounds_of("judge new", task))
        print(f"{task}: {tokens} tokens with every choice's prompt, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _serve()
    else:
        main()
