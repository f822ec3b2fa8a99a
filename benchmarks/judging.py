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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

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
        from seap_ray.judges.lm_eval_model import wrap

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
    import pyarrow.parquet as pq

    from seap_ray.models.corpus import Renderer
    from seap_ray.tasks import BUILT_IN

    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]

    renderer = Renderer(BUILT_IN[task])
    return [renderer.item(row) for row in rows[:: max(1, len(rows) // n)][:n]]


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


@dataclass(frozen=True)
class Build:
    """A process that judges with one checkout in one type."""

    process: "subprocess.Popen[str]"

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> "Build":
        """Start it, and give it its settings."""
        # -P: the folder of this file would hide packages of the same names.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--worker"],
            env={**os.environ, "PYTHONPATH": str(folder), "TRANSFORMERS_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        build = cls(process)
        build._send(settings)
        return build

    def _send(self, value: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the next answer."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, *call: Any) -> Any:
        """Call a method of the process's worker."""
        self._send(call)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Measure, print and, with ``--save``, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("tasks", nargs="+", help="built-in tasks with their files: arc_easy=test.parquet")
    parser.add_argument("--old", type=Path, help="another checkout of the repository")
    parser.add_argument("--rows", type=int, default=16, help="rows of every task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--save", type=Path, help="folder that judging.json is written to")
    arguments = parser.parse_args()

    files = dict(task.split("=", 1) for task in arguments.tasks)
    settings = {
        "model": arguments.model,
        "tasks": {task: str(Path(file).resolve()) for task, file in files.items()},
        "rows": arguments.rows,
        "threads": arguments.threads,
        "batch_tokens": arguments.batch_tokens,
    }
    folders = {"new": (ROOT, "float32"), "bfloat16": (ROOT, "bfloat16")}
    if arguments.old:
        folders["old"] = (arguments.old.resolve(), "float32")

    builds: dict[str, Build] = {}
    for name, (folder, dtype) in folders.items():
        builds[name] = Build.of(folder, {**settings, "dtype": dtype})
    tokens = {name: build.answer() for name, build in builds.items()}["new"]
    contest = _Contest(builds, tokens, arguments.rows)
    contest.run(arguments.rounds)
    for build in builds.values():
        build.close()

    _report(contest, Path(arguments.model).name, arguments.save)


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


def _report(contest: _Contest, model: str, folder: Path | None) -> None:
    from benchmarks.measure import Row, save_rows
    from benchmarks.suites import COLUMNS, _cells
    from seap_ray.report.table import text_table

    hflm = contest.fastest_hflm()
    pairs: list[tuple[str, str, str, Mapping[str, str]]] = [
        (
            f"lm-eval's tasks beside its own loop, batches of {hflm.split()[1]}",
            "lm_eval new",
            hflm,
            {"all": "ratio >= 2.5"},
        ),
        ("own judge, bfloat16 beside float32", "judge bfloat16", "judge new", {}),
    ]
    if "old" in contest.builds:
        pairs.insert(0, ("own judge beside one row a choice", "judge new", "judge old", TARGETS))
        pairs.insert(1, ("lm-eval's tasks beside one row a choice", "lm_eval new", "lm_eval old", TARGETS))

    command = f"python -m benchmarks.judging {model} ... --rows {contest.n_rows}"
    rows: list[Row] = []
    row_of = partial(Row.of, "judging", command=command)
    for name, contestant, baseline, targets in pairs:
        for task in (*contest.tokens, "all"):
            rows.append(
                row_of(
                    f"{model}, {task}: {name}",
                    ours=contest.items_a_second(contestant, task),
                    baseline=contest.items_a_second(baseline, task),
                    unit="rows/s",
                    ratios=contest.speedups(contestant, baseline, task),
                    target=targets.get(task, ""),
                )
            )

    exact = [("lm-eval's own loop", hflm)]
    if "old" in contest.builds:
        exact.append(("one row a choice", "lm_eval old"))
        apart = contest.decisions_apart("judge new", "judge old")
        rows.append(row_of(f"{model}: rows decided otherwise", ours=apart, unit="rows", target="ours <= 0"))
    for name, baseline in exact:
        difference = contest.largest_difference("lm_eval new", baseline)
        label = f"{model}: largest difference of a log-likelihood from {name}, float32"
        rows.append(row_of(label, ours=difference, unit="nats", target="ours <= 1e-4"))

    print(text_table(COLUMNS, [_cells(row) for row in rows]))
    for task, tokens in contest.tokens.items():
        seconds = median(contest.rounds_of("judge new", task))
        print(f"{task}: {tokens} tokens with every choice's prompt, {tokens / seconds:.0f} tokens/s")
    if folder:
        print(save_rows(folder, "judging", rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _serve()
    else:
        main()
