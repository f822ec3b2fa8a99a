"""Shards: corpora in, immutable token shards with a manifest out. Ray Data reads, renders, draws and writes.

``shards/<task>/00017.parquet`` holds one sequence a row: ``ids`` (int32 list) and ``text``. ``prompts.parquet`` holds
what a user would ask of every drawn row. ``manifest.json``, written last, holds the token count and sha256 of every
shard.

Which row goes where depends on content and seed alone: a row's key is a hash of both, so the rows with the n smallest
keys are n rows at random, wherever they lie in the corpus and however it is cut into blocks.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.models.batching import chunk_stream
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Renderer, load_tokenizer, row_key, tokenizer_hash
from seap_ray.models.row_sources import (
    DemoRows,
    HubRows,
    Row,
    RowFiles,
    calibration_rows,
    evaluation_rows,
    file_format,
)
from seap_ray.storage.artifact import Artifact, has_hash
from seap_ray.storage.files import atomic_write, read_json, sha256_of, stage, write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task

MANIFEST_FILE = "manifest.json"
PROMPTS_FILE = "prompts.parquet"
FOOTER_READERS = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
"""Environment variable of Ray Data: processes that look at the footers of parquet files. By default 32 start for every
corpus, of one file or of many; one has 128 reads under way at a time."""
UNUSED_FIELDS = {"metric", "lm_eval", "weight", "choices", "evaluation_path", "evaluation_split"}
"""Fields of a task that its shards do not depend on."""

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
    n_blank: int
    """Rows without text, left out."""
    n_cut: int
    """Texts cut at the longest sequence."""
    prompts: str
    """sha256 of the file of prompts."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    def read_prompts(self, run: Run) -> list[str]:
        """Read the questions of the drawn rows, or their texts where the task asks none, in the order of the draw."""
        return pq.read_table(stage(run.shards(self.task) / PROMPTS_FILE)).column("prompt").to_pylist()

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
        rows = read_rows(task, seed=config.run.seed, n=corpus.samples)
        drawn = draw(task, rows, n=corpus.samples, seed=config.run.seed, official=is_official)
        pending.append(write.remote(config, run, task.name, key, drawn))

    # An error of any task is raised here.
    ray.get(pending)


# --- rows ------------------------------------------------------------------------------------------------------------


def read_rows(task: Task, *, evaluation: bool = False, seed: int = 0, n: int | None = None) -> ray.data.Dataset:
    """Return the rows of a task's source as a Ray Dataset.

    Args:
        task: The task.
        evaluation: Read the rows that the task is judged on, not those that it is calibrated on.
        seed: Seed of the demo's generators.
        n: Rows that the demo's generators make at least.

    Raises:
        DataError: The rows cannot be had; it names the task.
    """
    source = evaluation_rows(task) if evaluation else calibration_rows(task)
    match source:
        case DemoRows():
            return ray.data.from_items(source.generate(n, seed))
        case RowFiles():
            return _read_files(source)
        case HubRows():
            # Not ray.data.from_huggingface: it asks the hub again, and fails offline where the data set is cached.
            return ray.data.from_arrow(source.load())

    raise TypeError(f"tasks.{task.name}: {source} has no reader")


def _read_files(source: RowFiles) -> ray.data.Dataset:
    os.environ.setdefault(FOOTER_READERS, "1")  # a user's own value counts
    readers: dict[str, Callable[..., ray.data.Dataset]] = {
        "parquet": ray.data.read_parquet,
        "json": ray.data.read_json,
        "csv": ray.data.read_csv,
        "text": ray.data.read_text,
    }

    # All files of a source have one format.
    files = source.files()
    return readers[file_format(source.task, files[0])]([str(file) for file in files])


def read_in_order(rows: ray.data.Dataset) -> list[Row]:
    """Return all rows as they lie in their files, which Ray Data promises only where it is asked to."""
    # The option is the whole process's, so it is put back afterwards.
    options = DataContext.get_current().execution_options
    before = options.preserve_order
    options.preserve_order = True
    try:
        return rows.take_all()
    finally:
        options.preserve_order = before


# --- the draw --------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """Rows drawn from a corpus."""

    table: pa.Table
    """Columns ``key``, ``text``, ``question``, ``answer`` and ``choices``, in the order of the keys."""
    n_rows: int
    """Rows in the corpus."""
    n_blank: int
    """Rows without text, which cannot be drawn."""


class Render:
    """Renders blocks of rows: key, text, question, answer, choices; the key of a blank text is empty."""

    def __init__(self, task: Task, seed: int, official: bool):
        self.renderer = Renderer(task, official)
        self.seed = seed

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Render a block."""
        items = [self.renderer.item(row) for row in rows.to_pylist()]
        # No hash is empty, so an empty key stands for a row that cannot be drawn.
        keys = [row_key(self.seed, item) if item.text.strip() else b"" for item in items]

        # With the types stated, blocks of nothing but empty lists fit the others.
        return pa.table(
            {
                "key": pa.array(keys, pa.binary()),
                "text": pa.array([item.text for item in items], pa.string()),
                "question": pa.array([item.question for item in items], pa.string()),
                "answer": pa.array([item.answer for item in items], pa.string()),
                "choices": pa.array([item.choices for item in items], pa.list_(pa.string())),
            }
        )


def draw(task: Task, rows: ray.data.Dataset, *, n: int | None, seed: int, official: bool) -> Draw:
    """Draw ``n`` rows (None: all) at random over the whole corpus, and count all and blank ones.

    Every block keeps its own ``n`` smallest keys, so only candidates travel. Raises DataError where no row has text.
    """
    render = Render(task, seed, official)
    # A batch is a whole block: each block is ranked once.
    rendered = rows.map_batches(lambda batch: _candidates(render(batch), n), batch_format="pyarrow", batch_size=None)

    # Empty blocks may have no columns, which would not fit those of the others.
    tables = [table for table in ray.get(rendered.to_arrow_refs()) if table.num_rows]
    if not tables:
        raise DataError(f"tasks.{task.name}: the corpus has no rows")

    table = pa.concat_tables(tables)
    # A block's counts stand in its first row, so that their sums are those of the corpus.
    n_rows = sum(table.column("n_rows").to_pylist())
    n_blank = sum(table.column("n_blank").to_pylist())

    # The smallest of all blocks are among the smallest of each.
    drawn = _smallest_keys(table.filter(pa.compute.not_equal(table.column("key"), b"")), n)
    if not drawn.num_rows:
        raise DataError(f"tasks.{task.name}: all {n_rows} rows of the corpus are blank")

    return Draw(drawn.drop_columns(["n_rows", "n_blank"]), n_rows, n_blank)


def _candidates(rendered: pa.Table, n: int | None) -> pa.Table:
    """Return a block's smallest keys; the first row carries the block's counts.

    Where no row has text, a blank one carries them.
    """
    is_text = pa.compute.not_equal(rendered.column("key"), b"")
    n_text = pa.compute.sum(is_text).as_py() or 0
    kept = _smallest_keys(rendered.filter(is_text), n) if n_text else rendered.slice(0, 1)

    n_rows = np.zeros(kept.num_rows, np.int64)
    n_blank = np.zeros(kept.num_rows, np.int64)
    # A block without any rows has no first one.
    if kept.num_rows:
        n_rows[0] = rendered.num_rows
        n_blank[0] = rendered.num_rows - n_text

    return kept.append_column("n_rows", pa.array(n_rows)).append_column("n_blank", pa.array(n_blank))


def _smallest_keys(table: pa.Table, n: int | None) -> pa.Table:
    return table.take(pa.compute.sort_indices(table, [("key", "ascending")])).slice(0, n)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_task(config: Config, run: Run, task: str, key: str, drawn: Draw) -> None:
    """Tokenise the drawn rows, cut them into shards, write these and, last, the manifest."""
    corpus = config.corpus
    # Opened here, on the node that does the work: a checkpoint's folder may lie elsewhere there.
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    longest = min(corpus.sequence_length, checkpoint.architecture.max_position_embeddings)

    texts = drawn.table.column("text").to_pylist()
    questions = drawn.table.column("question").to_pylist()
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
    manifest = Manifest(task, key, tuple(shards), drawn.n_rows, drawn.n_blank, n_cut, prompts)
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
