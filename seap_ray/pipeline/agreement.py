"""Agreement: written experts in; how often the dense and the general model would write what they write, out.

It is what the service holds an expert to (``serve.guard``). Each expert answers held-out prompts of its task in a Ray
task of its own; what was measured stays in the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from seap_ray.config import DENSE, GENERAL, Config
from seap_ray.judges.quality import Quality
from seap_ray.models.agreement import NEW_TOKENS, Reply, agreements, write_replies
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.encoding import Encoding
from seap_ray.pipeline.checkpoint_writer import PendingCheckpoint
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.evaluate import EvalTask, Failure, load_with_tokenizer, opened
from seap_ray.progress import Progress, say
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.files import write_json
from seap_ray.storage.run import Run, fingerprint

SCHEMA = 1
"""Version of what is measured; raise it when the same weights and rows would give other figures."""
Source = Checkpoint | PendingCheckpoint
Shares = Mapping[str, Any]
"""By the reference's name: mean share of agreement, its standard error, and the number of replies."""


@dataclass(frozen=True)
class _Comparison:
    """An expert, what it is compared with, and where the result is kept."""

    expert: PendingCheckpoint
    references: Mapping[str, Source]
    eval_task: EvalTask
    artifact: Artifact[dict[str, Any]]


def measure_agreements(
    config: Config,
    run: Run,
    dense: Checkpoint,
    checkpoints: Sequence[PendingCheckpoint],
    eval_tasks: Mapping[str, EvalTask],
    progress: Progress,
) -> None:
    """Measure every expert's agreement with the dense model and with the general one of its ratio.

    What cannot be measured costs nothing but a line: such an expert has no floor.

    Args:
        config: The job's settings.
        run: Where the figures are kept.
        dense: What all were cut from.
        checkpoints: All that were written.
        eval_tasks: The tasks with their held-out rows.
        progress: Shows how far it is.
    """
    if not config.evaluation.agreement:
        return

    general = {each.target.parent: each for each in checkpoints if each.spec.name == GENERAL}
    comparisons: list[_Comparison] = []
    for expert in checkpoints:
        eval_task = eval_tasks.get(expert.spec.task or "")
        if expert.spec.kind == "expert" and eval_task:
            references: dict[str, Source] = {DENSE: dense, GENERAL: general[expert.target.parent]}
            comparisons.append(_comparison(config, run, expert, references, eval_task))

    missing = [comparison for comparison in comparisons if not comparison.artifact.is_made()]
    if missing:
        for _ in progress(_measure_all(config, missing), len(missing), "comparing experts with dense", " experts"):
            pass
    for comparison in comparisons:
        if comparison.artifact.is_made():
            say(f"  {_line(comparison.expert, comparison.artifact.load())}")


def _comparison(
    config: Config, run: Run, expert: PendingCheckpoint, references: Mapping[str, Source], eval_task: EvalTask
) -> _Comparison:
    settings = (SCHEMA, NEW_TOKENS, config.evaluation.agreement, config.model.dtype)
    weights = [expert.fingerprint, *(source.fingerprint for source in references.values())]
    key = fingerprint(settings, weights, eval_task.fingerprint)
    path = run.agreement(expert.export.plan.requested, expert.spec.name)
    return _Comparison(expert, references, eval_task, Artifact(path, key, JsonFile()))


def _line(expert: PendingCheckpoint, shares: Shares) -> str:
    """Return what is told about an expert."""
    where = f"{expert.target.parent.name} {expert.spec.name}"
    if not shares[DENSE]["n"]:
        return f"{where}: no held-out row leaves room for a reply, so it has no measured agreement"
    parts = []
    for reference in (DENSE, GENERAL):
        share = shares[reference]
        parts.append(f"{share['share']:.3f} ± {share['stderr']:.3f} of its tokens are those of {reference}")
    return f"{where}: {', '.join(parts)} ({shares[DENSE]['n']} replies)"


def _measure_all(config: Config, comparisons: Sequence[_Comparison]) -> Iterator[int]:
    """Yield 1 for each expert that is compared, or cannot be."""
    settings = config.calibration
    task = remote_task(_measure, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)
    pending = {task.remote(config, comparison): comparison for comparison in comparisons}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        comparison = pending.pop(done)
        try:
            ray.get(done)
        except RayError as error:
            say(f"warning: {comparison.expert.spec.name} has no measured agreement; {Failure.of(error).error}")
        yield 1


def _measure(config: Config, comparison: _Comparison) -> None:
    """Measure one expert's agreement in a Ray task, one model in memory at a time."""
    replies = _replies(config, comparison)
    shares = {name: _share(config, source, replies) for name, source in comparison.references.items()}
    artifact = comparison.artifact
    write_json(artifact.path, {"fingerprint": artifact.key, **shares})


def _replies(config: Config, comparison: _Comparison) -> list[Reply]:
    """Return what an expert answers to held-out prompts of its task."""
    architecture = comparison.expert.export.base.architecture
    with opened(comparison.expert) as folder:
        model, tokenizer = load_with_tokenizer(config, folder)
        encoding = Encoding.of(config, comparison.eval_task.task, tokenizer)
        return write_replies(
            model,
            encoding,
            comparison.eval_task.items[: config.evaluation.agreement],
            longest=min(config.corpus.sequence_length, architecture.max_position_embeddings),
            batch_tokens=config.evaluation.batch_tokens,
        )


def _share(config: Config, source: Source, replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the mean share of a model's agreement with replies, its standard error, and their number."""
    if not replies:
        return {"share": None, "stderr": None, "n": 0}
    with opened(source) as folder:
        model, _ = load_with_tokenizer(config, folder)
        quality = asdict(Quality.of("agreement", agreements(model, replies)))
    return {"share": quality["value"], "stderr": quality["stderr"], "n": quality["n"]}
