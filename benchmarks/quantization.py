"""Quantisation: experts in fewer bits, rounded by a run's statistics and by llm-compressor, on their own tasks.

    python -m benchmarks.quantization OUT.csv PACKAGES config=docs/results/quantization.yaml [KEY=VALUE ...]

``PACKAGES`` is a folder with llm-compressor, as ``pip install --target`` makes it. The job runs once for each scheme,
on the same statistics, and every expert is judged on its own task's rows: by the metric, and by nats a token of the
right answers, or of the windows of a text, both against the dense model on the same rows. llm-compressor rounds the
same experts on the same texts (``examples/llm_compressor.py``). Seconds are those of one expert: ours the time that a
job's checkpoints take, by their number, once statistics are there; llm-compressor's the time of its process.
"""

import csv
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import ray

from seap_ray.config import Config, load_config
from seap_ray.judges.quality import Quality
from seap_ray.judges.scoring import score
from seap_ray.models.encoding import Encoding
from seap_ray.pipeline.cluster import connect_driver
from seap_ray.pipeline.evaluate import EvalTask, eval_task, judge_task, load_with_tokenizer
from seap_ray.storage.files import stage
from seap_ray.storage.run import Run

ROOT = Path(__file__).parents[1]
AS_IT_IS = "bfloat16"
SCHEMES = {AS_IT_IS: "null", "w8a16": "w8a16", "w4a16": "w4a16"}
"""Values of ``export.quantization``, by the names that rows have."""
BY_LLM_COMPRESSOR = {"w4a16": "W4A16"}
"""Names that llm-compressor has for schemes. One is enough: it takes its time."""
WINDOWS = 25
"""Windows of a text: each has as many tokens as ten rows of other tasks."""
MOST_REMOVED = 0.3
"""Experts of which more is gone are not given to llm-compressor."""


@dataclass(frozen=True, slots=True)
class Result:
    """One expert in one scheme. Differences are to the dense model in bfloat16, with standard errors over the rows."""

    task: str
    removed: float
    weights: str
    by: str
    n_bytes: int
    seconds: float
    metric: str
    value: float
    against_dense: float
    stderr: float
    excess_nats: float
    """Of the right answers, or of a text's windows, a token."""
    excess_stderr: float


Judged = tuple[Quality, Quality]
"""A task's own metric, and the perplexity of what is right."""


def main(arguments: Sequence[str]) -> None:
    """Write a row for every expert and scheme."""
    out, packages, *settings = arguments
    config = load_config(settings)
    run = Run.of(config)
    # A worker has one thread; here there is one worker.
    threads = config.calibration.model_copy(update={"num_cpus": os.cpu_count()})
    config = config.model_copy(update={"calibration": threads})
    dense: dict[str, Judged] = {}

    with Path(out).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Result)])
        for weights in SCHEMES:
            seconds = prune(settings, weights) / (len(config.pruning.ratio) * (len(config.tasks) + 1))
            for result in results(config, run, weights, seconds, packages, dense):
                writer.writerow(getattr(result, field.name) for field in fields(Result))
                file.flush()
                print(result, flush=True)


def prune(settings: Sequence[str], weights: str) -> float:
    """Run the job for a scheme, and return the seconds that its checkpoints took; nan where they were there."""
    command = [sys.executable, "jobs/prune.py", *settings, f"export.quantization={SCHEMES[weights]}"]
    # What is judged here is the experts alone, each on its own task.
    command += ["evaluation.samples=0", "evaluation.agreement=0"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"writing .* in ([0-9.]+) s", output)
    return float(found[1]) if found else math.nan


def results(
    config: Config, run: Run, weights: str, seconds: float, packages: str, dense: dict[str, Judged]
) -> Iterator[Result]:
    """Judge all experts of a run that are there now, and those that llm-compressor makes of them."""
    drawn = draw(config, run)
    for ratio in config.pruning.ratio:
        for task in config.tasks:
            rows = drawn[task.name]
            expert = stage(run.expert(ratio, task.name))
            found = judged(config, rows, expert)
            # The first that is judged is the whole model, in the type that it has.
            whole = dense.setdefault(task.name, found)
            yield result(task.name, ratio, weights, "seap_ray", expert, seconds, found, whole)

            if weights == AS_IT_IS and ratio < MOST_REMOVED:
                for scheme, its_name in BY_LLM_COMPRESSOR.items():
                    folder, took = by_llm_compressor(its_name, expert, packages)
                    found = judged(config, rows, folder)
                    yield result(task.name, ratio, scheme, "llm-compressor", folder, took, found, whole)


def draw(config: Config, run: Run) -> dict[str, EvalTask]:
    """Draw the rows of all tasks, which Ray does where they are not there yet."""
    connect_driver()
    rows = {task.name: eval_task(config, run, task, by_lm_eval=False) for task in config.tasks}
    ray.shutdown()
    return rows


def by_llm_compressor(scheme: str, expert: Path, packages: str) -> tuple[Path, float]:
    """Quantise an expert by the example, and return the folder and the seconds of the process."""
    folder = expert.parents[2] / "llm_compressor" / expert.parent.name / expert.name
    # One that is there already was made by a run of this benchmark that did not come to its end.
    noted = folder / "seconds.txt"
    if noted.is_file():
        return folder, float(noted.read_text())
    environment = {**os.environ, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples/llm_compressor.py"), scheme, str(expert), str(folder)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, cwd=expert, capture_output=True)
    seconds = time.perf_counter() - started
    noted.write_text(f"{seconds}")
    return folder, seconds


def judged(config: Config, rows: EvalTask, folder: Path) -> Judged:
    """Judge a checkpoint on a task's rows."""
    model, tokenizer = load_with_tokenizer(config, folder)
    if rows.metric == "window_perplexity":
        windows = config.evaluation.model_copy(update={"samples": WINDOWS})
        quality = judge_task(config.model_copy(update={"evaluation": windows}), model, tokenizer, rows)
        return quality, quality

    quality = judge_task(config, model, tokenizer, rows)

    encoding = Encoding.of(config, rows.task, tokenizer)
    answers = [encoding.continuation(item, item.answer) for item in rows.items]
    scored = score(model, answers, batch_tokens=config.evaluation.batch_tokens)
    losses = [-answer.log_likelihood for answer in scored]
    return quality, Quality.of("perplexity", losses, [answer.n_tokens for answer in scored])


def result(
    task: str, ratio: float, weights: str, by: str, folder: Path, seconds: float, found: Judged, dense: Judged
) -> Result:
    """Return a row: what an expert is worth beside the whole model."""
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    against, excess = (ours.against(whole) for ours, whole in zip(found, dense, strict=True))
    assert against and excess
    quality, _ = found
    nats = math.log(excess[0])
    return Result(task, ratio, weights, by, n_bytes, seconds, quality.metric, quality.value, *against, nats, excess[1])


if __name__ == "__main__":
    main(sys.argv[1:])
