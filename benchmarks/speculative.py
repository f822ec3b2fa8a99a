"""Speculative: what pruned models are worth as drafts of the dense one, task by task, with one request at a time.

    python -m benchmarks.speculative RUN [key=value ...]

Every held-out prompt of a task is answered by the dense model alone, and with each draft: the task's expert and the
general model of every ratio in the run, ``serve.draft.tokens`` drafted at a time. ``benchmarks.new_tokens``,
``serve.num_cpus`` and ``serve.engine`` are those of the suite ``widths``, ``evaluation.agreement`` is the number of
prompts. A reply ends where the model ends it.
"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.widths import prepare_process
from seap_ray.config import GENERAL, Config, load_config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.report.table import text_table
from seap_ray.storage.files import read_json

COLUMNS = ("task", "draft", "removed", "accepted", "tokens a pass", "speed-up", "same tokens")
"""Accepted is the share of drafted tokens that the dense model takes, and a pass is one of the dense model."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine wrote, and how long that took."""

    ids: list[tuple[int, ...]]
    seconds: float
    drafted: float = 0.0
    accepted: float = 0.0
    passes: float = 0.0


def main(arguments: Sequence[str]) -> None:
    """Measure the drafts of a run and print a table."""
    folder, *overrides = arguments
    run = Path(folder)
    made_with = read_json(run / "config.json")
    made_with.update({name: section for name, section in _sections(overrides).items()})
    config = Config.model_validate(made_with)
    prepare_process(config)
    base = Checkpoint.open(config.model.source, config.model.revision)

    rows: list[list[Any]] = []
    prompts = {task.name: _prompts(config, base, run, task.name) for task in config.tasks}
    dense = {task: _answers(base.folder, None, ids, config) for task, ids in prompts.items() if ids}
    for ratio in sorted((run / "experts").iterdir()):
        for task, whole in dense.items():
            for draft in (task, GENERAL):
                drafted = _answers(base.folder, ratio / draft, prompts[task], config)
                rows.append(_row(task, draft, float(ratio.name), drafted, whole))
    print(text_table(COLUMNS, rows))


def _sections(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the sections that a command line may change here."""
    config = load_config(["run.name=unused", *overrides])
    return {name: getattr(config, name).model_dump(mode="json") for name in ("serve", "benchmarks", "evaluation")}


def _prompts(config: Config, base: Checkpoint, run: Path, name: str) -> list[list[int]]:
    """Return the token ids of a task's held-out prompts, as its expert is judged on them."""
    task = next(task for task in config.tasks if task.name == name)
    encoding = Encoding.of(config, task, load_tokenizer(base.folder))
    stored = json.loads((run / "cells" / f"{name}.items.json").read_text())["items"]
    items = [Item(**item) for item in stored[: config.evaluation.agreement]]
    return [list(encoding.prompt(item)) for item in items if item.question]


def _answers(folder: Path, draft: Path | None, prompts: Sequence[list[int]], config: Config) -> Answers:
    """Answer prompts greedily, one after another, with a new engine."""
    from vllm import LLM, SamplingParams

    n_new = config.benchmarks.new_tokens
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": max(map(len, prompts)) + n_new,
        "disable_log_stats": False,
        **config.serve.engine,
    }
    if draft:
        tokens = config.serve.draft.tokens
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": tokens,
        }
    engine = LLM(str(folder), **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=n_new)
    _answer(engine, prompts[0], sampling)  # to warm up

    before = _counted(engine)
    started = time.perf_counter()
    replies = [_answer(engine, ids, sampling) for ids in prompts]
    seconds = time.perf_counter() - started
    after = _counted(engine)
    # The next engine wants its memory.
    del engine
    gc.collect()
    return Answers(replies, seconds, *(new - old for new, old in zip(after, before, strict=True)))


def _answer(engine: Any, ids: list[int], sampling: Any) -> tuple[int, ...]:
    """Return the reply to one prompt."""
    (output,) = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return tuple(output.outputs[0].token_ids)


def _counted(engine: Any) -> tuple[float, float, float]:
    """Return how many tokens were drafted and accepted so far, and in how many passes of the dense model."""
    values = {metric.name: getattr(metric, "value", 0.0) for metric in engine.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens", "num_drafts")
    drafted, accepted, passes = (values.get(f"vllm:spec_decode_{name}", 0.0) for name in names)
    return drafted, accepted, passes


def _row(task: str, draft: str, ratio: float, drafted: Answers, dense: Answers) -> list[Any]:
    same = sum(first == second for first, second in zip(drafted.ids, dense.ids, strict=True))
    return [
        task,
        draft,
        f"{ratio:g}",
        f"{drafted.accepted / drafted.drafted:.3f}",
        f"{1 + drafted.accepted / drafted.passes:.2f}",
        f"{dense.seconds / drafted.seconds:.2f}",
        f"{same}/{len(dense.ids)}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
