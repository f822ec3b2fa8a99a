"""Shards: corpora in, immutable token shards with a manifest out.

``shards/<task>/00017.parquet`` holds one sequence a row: ``ids`` (int32 list) and ``text``. ``prompts.parquet`` holds
what a user would ask of every drawn row, and ``rows.json`` the content key of each, so that none is judged on.
``manifest.json``, written last, holds the token count and sha256 of every shard.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from seap_ray.config import Config
from seap_ray.models.batching import chunk_stream
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, content_key, judged_rows, load_tokenizer, tokenizer_hash
from seap_ray.models.row_sources import calibration_rows
from seap_ray.pipeline.draw import Draw, draw_corpus
from seap_ray.storage.artifact import Artifact, has_hash
from seap_ray.storage.files import atomic_write, read_json, sha256_of, stage, write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task

MANIFEST_FILE = "manifest.json"
PROMPTS_FILE = "prompts.parquet"
ROWS_FILE = "rows.json"
UNUSED_FIELDS = {"metric", "lm_eval", "weight", "choices", "evaluation_path", "evaluation_split", "held_out"}
"""Fields of a task that its shards do not depend on, but for whether rows of the corpus are held out."""

# --- what is on storage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard file, as the manifest has it: name, number of sequences and tokens, sha256 of its bytes."""

    task: str
    shard: str
    """The shard's number among those of its task, in five digits, as in the file's name."""
    n_sequences: int
    n_tokens: int
    sha256: str

    def path(self, run: Run) -> StoragePath:
        """Return where the shard lies."""
        return run.shards(self.task) / f"{self.shard}.parquet"

    def sequences(self, run: Run) -> list[list[int]]:
        """Read the token ids of every sequence."""
        return pq.read_table(stage(self.path(run)), columns=["ids"]).column("ids").to_pylist()


@dataclass(frozen=True, slots=True)
class Manifest:
    """All shards of a task, and what became of the rows."""

    task: str
    fingerprint: str
    """Fingerprint of the settings and files that the shards were made from."""
    shards: tuple[Shard, ...]
    n_rows: int
    """Rows in the corpus."""
    n_cut: int
    """Texts cut at the longest sequence."""
    prompts: str
    """sha256 of the file of prompts."""
    rows: str
    """sha256 of the file of content keys."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows that are left out, or worth a look, by ``corpus.REASONS``. Duplicates are estimated where more than
    ``draw.COUNTED_KEYS`` rows are distinct."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    def read_prompts(self, run: Run) -> list[str]:
        """Read the questions of the drawn rows, or their texts where the task asks none, in the order of the draw."""
        return pq.read_table(stage(run.shards(self.task) / PROMPTS_FILE)).column("prompt").to_pylist()

    def read_row_keys(self, run: Run) -> frozenset[bytes]:
        """Read the content keys of the drawn rows."""
        return frozenset(map(bytes.fromhex, read_json(run.shards(self.task) / ROWS_FILE)))

    @classmethod
    def read(cls, folder: StoragePath) -> "Manifest | None":
        """Read the manifest in a task's folder of shards; None when it is missing or incomplete."""
        content = read_json(folder / MANIFEST_FILE)
        # A file that is not there, not JSON or of another version lacks keys or is no mapping.
        try:
            shards = tuple(Shard(**shard) for shard in content["shards"])
            return cls(**{**content, "shards": shards})
        except (TypeError, KeyError):
            return None

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of every other file in the folder, by its name."""
        hashes = {f"{shard.shard}.parquet": shard.sha256 for shard in self.shards}
        hashes[PROMPTS_FILE] = self.prompts
        hashes[ROWS_FILE] = self.rows
        return hashes


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The format of a task's shards as an artifact: a folder whose manifest holds the key and every file's sha256."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the manifest has the key and every file the bytes that the manifest states."""
        manifest = Manifest.read(path)
        if manifest is None or manifest.fingerprint != key:
            return False

        # Last, since it reads every byte.
        return all(has_hash(path / name, digest) for name, digest in manifest.hashes().items())

    def load(self, path: StoragePath) -> Manifest:
        """Read the manifest of shards that are whole."""
        manifest = Manifest.read(path)
        assert manifest is not None, "only a folder that is whole is loaded"
        return manifest


def shards_artifact(config: Config, checkpoint: Checkpoint, run: Run, task: Task) -> Artifact[Manifest]:
    """Return a task's shards as an artifact; its key stands for settings, tokenizer, and the source's files."""
    key = fingerprint(
        task.model_dump(exclude=UNUSED_FIELDS),
        config.corpus.model_dump(),
        config.run.seed,
        tokenizer_hash(checkpoint),
        calibration_rows(task).state(),
        judged_rows(task).is_split_off,
    )
    return Artifact(run.shards(task.name), key, ShardFolder())


# --- the job ---------------------------------------------------------------------------------------------------------


def make_shards(config: Config, checkpoint: Checkpoint, run: Run, report: Callable[[str], None]) -> list[Manifest]:
    """Bring every task's shards up to date; what is whole and still valid stays.

    Args:
        config: The job's settings.
        checkpoint: The model, whose tokenizer is used.
        run: Where the shards go.
        report: Is called with a line for people when something has to be made.

    Returns:
        A manifest for every task, in their order.

    Raises:
        DataError: A corpus cannot be had or used; it names the task.
    """
    artifacts = {task.name: shards_artifact(config, checkpoint, run, task) for task in config.tasks}
    stale = [task for task in config.tasks if not artifacts[task.name].is_made()]
    if stale:
        report(f"reading {', '.join(task.name for task in stale)}")
        keys = [artifacts[task.name].key for task in stale]
        _write_all(config, run, stale, keys)

    return [artifacts[task.name].load() for task in config.tasks]


def _write_all(config: Config, run: Run, tasks: Sequence[Task], keys: Sequence[str]) -> None:
    """Draw each corpus with Ray Data, then tokenise and write it in a Ray task of its own."""
    corpus = config.corpus
    is_official = corpus.prompt_format == "official"
    write = ray.remote(_write_task)

    # Each is written while the next one is drawn.
    pending = []
    for task, key in zip(tasks, keys, strict=True):
        drawn = draw_corpus(task, n=corpus.samples, seed=config.run.seed, official=is_official)
        pending.append(write.remote(config, run, task.name, key, drawn))

    # An error of any task is raised here.
    ray.get(pending)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_task(config: Config, run: Run, task: str, key: str, drawn: Draw) -> None:
    """Tokenise the drawn rows, cut them into shards, write these and, last, the manifest."""
    corpus = config.corpus
    # Opened here, on the node that does the work: a checkpoint's folder may lie elsewhere there.
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    longest = min(corpus.sequence_length, checkpoint.architecture.max_position_embeddings)

    texts = [item.text for item in drawn.items]
    questions = [item.question for item in drawn.items]
    all_ids = tokenizer(texts)["input_ids"]
    rows = [row for row in zip(all_ids, texts, questions, strict=True) if row[0]]  # some texts have no token

    # Where a task asks nothing, its text is what a user would write.
    prompts = _write_prompts(run, task, [question or text for _, text, question in rows])

    # Buckets cut long texts; packing has the stream of all texts, so that nothing is lost.
    pairs = [(ids, text) for ids, text, _ in rows]
    n_cut = 0
    if corpus.packing == "bucket":
        n_cut = sum(len(ids) > longest for ids, _ in pairs)
        pairs = [(ids[:longest], text) for ids, text in pairs]
    pairs = _within_budget(pairs, corpus.max_tokens)

    shards: list[Shard] = []
    for start in range(0, len(pairs), corpus.shard_sequences):
        shard_pairs = pairs[start : start + corpus.shard_sequences]
        if corpus.packing == "pack":
            # A chunk holds pieces of several texts, so none is stored with it.
            chunks = chunk_stream([ids for ids, _ in shard_pairs], longest)
            shard_pairs = [(ids, "") for ids in chunks]
        shards.append(_write_shard(run, task, f"{len(shards):05d}", shard_pairs))

    # Last: a folder without a manifest is made again.
    rows_hash = _write_row_keys(run, task, drawn.items)
    manifest = Manifest(task, key, tuple(shards), drawn.n_rows, n_cut, prompts, rows_hash, drawn.counts)
    write_json(run.shards(task) / MANIFEST_FILE, asdict(manifest))


def _within_budget(pairs: list[tuple[list[int], str]], max_tokens: int | None) -> list[tuple[list[int], str]]:
    """Keep sequences up to the one that reaches the budget."""
    if max_tokens is None:
        return pairs

    # Tokens of all sequences that come before one, so that the one that reaches the budget is kept.
    tokens_before = np.cumsum([0, *(len(ids) for ids, _ in pairs)])[:-1]
    return [pair for pair, before in zip(pairs, tokens_before, strict=True) if before < max_tokens]


def _write_prompts(run: Run, task: str, prompts: list[str]) -> str:
    """Write the file of prompts and return its sha256."""
    with atomic_write(run.shards(task) / PROMPTS_FILE) as temporary:
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), temporary)
        return sha256_of(temporary)


def _write_row_keys(run: Run, task: str, items: Sequence[Item]) -> str:
    """Write the file of content keys and return its sha256."""
    path = run.shards(task) / ROWS_FILE
    write_json(path, [content_key(item).hex() for item in items])
    return sha256_of(stage(path))


def _write_shard(run: Run, task: str, shard: str, pairs: list[tuple[list[int], str]]) -> Shard:
    table = pa.table(
        {
            "ids": pa.array([ids for ids, _ in pairs], pa.list_(pa.int32())),
            "text": pa.array([text for _, text in pairs], pa.string()),
        }
    )

    # Hashed before it moves to its place, which may be a bucket.
    path = run.shards(task) / f"{shard}.parquet"
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
        digest = sha256_of(temporary)

    return Shard(task, shard, len(pairs), sum(len(ids) for ids, _ in pairs), digest)
