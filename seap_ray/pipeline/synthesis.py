"""Synthesis: drawn rows of a task in; rows that the dense model has written behind their questions, out.

A Ray task writes as many texts as a shard holds, with as much of a node as a worker of the calibration takes. What is
written is kept in the run, so that the same command resumes what was cut short.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.models.loading import load_model
from seap_ray.models.synthesis import Prompt, write_texts
from seap_ray.pipeline.cluster import remote_task
from seap_ray.progress import progress
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.files import write_json
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task

SCHEMA = 1
"""Version of what is written; raise it when the same rows would give other texts."""


def synthesis_state(config: Config, checkpoint: Checkpoint) -> Any:
    """Return everything that the texts of a task depend on besides its rows; None where none are asked for."""
    settings = config.corpus.synthesis
    if not settings.samples:
        return None
    model = (checkpoint.fingerprint, config.model.dtype)
    return (SCHEMA, model, settings.model_dump(), config.calibration.batch_tokens, config.corpus.sequence_length)


@dataclass(frozen=True)
class TextBatch:
    """Rows of a task that the model goes on from together, by one Ray task."""

    task: Task
    items: tuple[Item, ...]
    seed: str
    """What the draws of tokens depend on besides the run's seed: which of the task's batches this is."""
    key: str

    def artifact(self, run: Run) -> Artifact[dict[str, Any]]:
        """Return the file of the texts."""
        return Artifact(run.synthesis(self.task.name) / f"{self.key[:20]}.json", self.key, JsonFile())


def synthesise(
    config: Config, checkpoint: Checkpoint, run: Run, drawn: Mapping[Task, Sequence[Sequence[Item]]]
) -> dict[str, list[list[Item]]]:
    """Let the dense model write texts of every task, side by side on the cluster; what was written before is read.

    Args:
        config: The job's settings.
        checkpoint: The dense model.
        run: Where the texts are kept.
        drawn: Every task's drawn rows, shard by shard.

    Returns:
        The rows that were written, by the task's name, shard by shard: as many as ``corpus.synthesis.samples``, less
        those that are empty or whose question leaves no room for an answer.
    """
    batches: list[TextBatch] = []
    for task, shards in drawn.items():
        batches += _batches(config, checkpoint, task, shards)

    missing = [batch for batch in batches if not batch.artifact(run).is_made()]
    if missing:
        total = sum(len(batch.items) for batch in missing)
        for _ in progress(_write_missing(config, run, missing), total, "writing texts", " texts"):
            pass

    written: dict[str, list[list[Item]]] = {task.name: [] for task in drawn}
    for batch in batches:
        stored = batch.artifact(run).load()["items"]
        written[batch.task.name].append([Item(**item) for item in stored])
    return written


def _batches(config: Config, checkpoint: Checkpoint, task: Task, shards: Sequence[Sequence[Item]]) -> list[TextBatch]:
    """Return what is written for a task, a batch for each shard; for more texts than it has rows, these come again."""
    state = synthesis_state(config, checkpoint)
    batches: list[TextBatch] = []
    left = config.corpus.synthesis.samples
    while left:
        for shard in shards:
            rows = tuple(shard[:left])
            left -= len(rows)
            if rows:
                seed = f"{len(batches)}"
                values = [asdict(row) for row in rows]
                key = fingerprint(state, config.run.seed, config.corpus.chat, task.chat, seed, values)
                batches.append(TextBatch(task, rows, seed, key))
    return batches


def _write_missing(config: Config, run: Run, batches: Sequence[TextBatch]) -> Iterator[int]:
    """Yield the number of texts of each batch as it is written."""
    settings = config.calibration
    task = remote_task(_write, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)

    pending = {task.remote(config, run, batch): batch for batch in batches}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        ray.get(done)
        yield len(pending.pop(done).items)


def _write(config: Config, run: Run, batch: TextBatch) -> None:
    """Write the texts of a batch in a Ray task."""
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    encoding = Encoding.of(config, batch.task, tokenizer)
    longest = min(config.corpus.sequence_length, checkpoint.architecture.max_position_embeddings)

    prompts = [Prompt.of(encoding, item, longest) for item in batch.items]
    items = write_texts(
        load_model(config, checkpoint, checkpoint.folder),
        encoding,
        [prompt for prompt in prompts if prompt],
        temperature=config.corpus.synthesis.temperature,
        # A number of 60 bits, as the generator takes it.
        seed=int(fingerprint(config.run.seed, batch.task.name, batch.seed)[:15], 16),
        batch_tokens=config.calibration.batch_tokens,
    )
    written = [asdict(item) for item in items if item]
    write_json(batch.artifact(run).path, {"fingerprint": batch.key, "items": written})
