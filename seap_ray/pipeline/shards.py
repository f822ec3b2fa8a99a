"""Shards: corpora in, immutable token shards with a manifest out. Ray Data reads, renders, draws and writes.

``shards/<task>/00017.parquet`` holds one sequence a row: ``ids`` (int32 list) and ``text``. ``prompts.parquet`` holds
what a user would ask of every drawn row. ``manifest.json``, written last, holds the token count and sha256 of every
shard. Which row goes where depends on content and seed alone.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.models.batching import chunk_stream
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import (
    Renderer,
    Row,
    corpus_files,
    file_format,
    is_files,
    load_tokenizer,
    row_key,
    tokenizer_hash,
)
from seap_ray.storage.files import atomic_write, read_json, sha256_of, stage, write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task

FOOTER_READERS = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
"""Environment variable of Ray Data: processes that look at the footers of parquet files. By default 32 start for every
corpus, of one file or of many; one has 128 reads under way at a time."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard file: name, number of sequences and tokens, sha256 of its bytes."""

    task: str
    shard: str
    n_sequences: int
    n_tokens: int
    sha256: str

    def path(self, run: Run) -> StoragePath:
        return run.shards(self.task) / f"{self.shard}.parquet"

    def sequences(self, run: Run) -> list[list[int]]:
        return pq.read_table(stage(self.path(run)), columns=["ids"]).column("ids").to_pylist()


@dataclass(frozen=True, slots=True)
class Manifest:
    """All shards of a task, and what became of the rows."""

    task: str
    fingerprint: str
    """Of the settings and files that the shards were made from."""
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
        return sum(shard.n_tokens for shard in self.shards)

    def read_prompts(self, run: Run) -> list[str]:
        """Questions of the drawn rows, or their texts where the task asks none, in the order of the draw."""
        return pq.read_table(stage(_prompts(run, self.task))).column("prompt").to_pylist()

    @classmethod
    def read(cls, run: Run, task: str) -> "Manifest | None":
        """The manifest on disk, or None when it is missing, torn, or a shard is not what it says."""
        values = read_json(run.shards(task) / "manifest.json")
        try:
            manifest = cls(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})
        except (TypeError, KeyError):
            return None
        hashes = {shard.path(run): shard.sha256 for shard in manifest.shards}
        hashes[_prompts(run, task)] = manifest.prompts
        return manifest if all(path.is_file() and sha256_of(path) == sha for path, sha in hashes.items()) else None


def _prompts(run: Run, task: str) -> StoragePath:
    return run.shards(task) / "prompts.parquet"


def make_shards(config: Config, checkpoint: Checkpoint, run: Run, said: Callable[[str], None]) -> list[Manifest]:
    """Bring every task's shards up to date; what is whole and still valid stays. Raises DataError naming the task."""
    manifests: dict[str, Manifest] = {}
    stale = []
    for task in config.tasks:
        print_ = _print(config, checkpoint, task)
        old = Manifest.read(run, task.name)
        if old and old.fingerprint == print_:
            manifests[task.name] = old
        else:
            stale.append((task, print_))
    if stale:
        said(f"reading {', '.join(task.name for task, _ in stale)}")
        for manifest in _write(config, checkpoint, run, stale):
            manifests[manifest.task] = manifest
    return [manifests[task.name] for task in config.tasks]


def _print(config: Config, checkpoint: Checkpoint, task: Task) -> str:
    """Fingerprint of what a task's shards depend on: settings, tokenizer, and the source's files (name, size, time)."""
    files = []
    if is_files(task.path):
        files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in corpus_files(task, task.path, task.split)]
    return fingerprint(
        task.model_dump(exclude={"metric", "lm_eval", "weight", "choices", "evaluation_path", "evaluation_split"}),
        config.corpus.model_dump(),
        config.run.seed,
        tokenizer_hash(checkpoint),
        files,
    )


def read_rows(task: Task, *, evaluation: bool = False, seed: int = 0, n: int | None = None) -> ray.data.Dataset:
    """Rows of a task's corpus as a Ray Dataset, from the demo's generators (``n`` at least), local files or the hub."""
    path = (task.evaluation_path or task.path) if evaluation else task.path
    split = task.evaluation_split if evaluation else task.split
    if path.startswith("demo:"):
        from seap_ray.demo import skills

        part: skills.Split = "test" if evaluation else "train"
        return ray.data.from_items(skills.rows(path.removeprefix("demo:"), max(n or 0, 1000), split=part, seed=seed))
    if is_files(path):
        files = corpus_files(task, path, split)
        os.environ.setdefault(FOOTER_READERS, "1")
        readers: dict[str, Callable[..., ray.data.Dataset]] = {
            "parquet": ray.data.read_parquet,
            "json": ray.data.read_json,
            "csv": ray.data.read_csv,
            "text": ray.data.read_text,
        }
        return readers[file_format(task, files[0])]([str(file) for file in files])
    return _from_hub(task, path, split)


def _from_hub(task: Task, path: str, split: str) -> ray.data.Dataset:
    import datasets

    try:
        loaded = datasets.load_dataset(path, task.subset, split=split)
        # Not ray.data.from_huggingface: it asks the hub again, and fails offline where the data set is cached.
        return ray.data.from_arrow(loaded.with_format("arrow")[:])
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"tasks.{task.name}: the hub did not give {path} ({reason}); a local copy works: "
            f"tasks=[{{name: {task.name}, path: FOLDER}}]"
        ) from None


def read_in_order(rows: ray.data.Dataset) -> list[Row]:
    """All rows as they lie in their files, which Ray Data promises only where it is asked to."""
    options = DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        return rows.take_all()
    finally:
        options.preserve_order = before


class Render:
    """Rows -> key, text, question, answer, choices; blank texts marked by an empty key."""

    def __init__(self, task: Task, seed: int, official: bool):
        self.renderer, self.seed = Renderer(task, official), seed

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = [self.renderer.item(row) for row in rows.to_pylist()]
        return pa.table(
            {
                "key": pa.array([row_key(self.seed, i) if i.text.strip() else b"" for i in items], pa.binary()),
                "text": pa.array([i.text for i in items], pa.string()),
                "question": pa.array([i.question for i in items], pa.string()),
                "answer": pa.array([i.answer for i in items], pa.string()),
                "choices": pa.array([i.choices for i in items], pa.list_(pa.string())),
            }
        )


def draw(task: Task, rows: ray.data.Dataset, *, n: int | None, seed: int, official: bool) -> tuple[pa.Table, int, int]:
    """``n`` rows (None: all) drawn at random over the whole corpus, in the order of their keys; counts of all and of
    blank rows.

    Every block keeps its own ``n`` smallest keys, so only candidates travel.
    """
    render = Render(task, seed, official)
    rendered = rows.map_batches(lambda batch: _candidates(render(batch), n), batch_format="pyarrow", batch_size=None)
    tables = [table for table in ray.get(rendered.to_arrow_refs()) if table.num_rows]
    if not tables:
        raise DataError(f"tasks.{task.name}: the corpus has no rows")
    table = pa.concat_tables(tables)
    n_rows, n_blank = (sum(table.column(c).to_pylist()) for c in ("n_rows", "n_blank"))
    drawn = _smallest(table.filter(pa.compute.not_equal(table.column("key"), b"")), n)
    if not drawn.num_rows:
        raise DataError(f"tasks.{task.name}: all {n_rows} rows of the corpus are blank")
    return drawn.drop_columns(["n_rows", "n_blank"]), n_rows, n_blank


def _candidates(rendered: pa.Table, n: int | None) -> pa.Table:
    """The block's smallest keys; its first row carries the block's counts, an otherwise blank one where it must."""
    is_text = pa.compute.not_equal(rendered.column("key"), b"")
    n_text = pa.compute.sum(is_text).as_py() or 0
    kept = _smallest(rendered.filter(is_text), n) if n_text else rendered.slice(0, 1)
    counts = np.zeros((2, kept.num_rows), np.int64)
    if kept.num_rows:
        counts[:, 0] = rendered.num_rows, rendered.num_rows - n_text
    return kept.append_column("n_rows", pa.array(counts[0])).append_column("n_blank", pa.array(counts[1]))


def _smallest(table: pa.Table, n: int | None) -> pa.Table:
    return table.take(pa.compute.sort_indices(table, [("key", "ascending")])).slice(0, n)


def _write(config: Config, checkpoint: Checkpoint, run: Run, stale: list[tuple[Task, str]]) -> list[Manifest]:
    """Draw each corpus with Ray Data, then tokenise and write it in a Ray task of its own."""
    seed, corpus = config.run.seed, config.corpus
    write = ray.remote(_write_task)
    pending = []
    for task, print_ in stale:
        rows = read_rows(task, seed=seed, n=corpus.samples)
        drawn = draw(task, rows, n=corpus.samples, seed=seed, official=corpus.prompt_format == "official")
        pending.append(write.remote(config, run, task.name, print_, *drawn))
    return ray.get(pending)


def _write_task(
    config: Config, run: Run, task: str, print_: str, drawn: pa.Table, n_rows: int, n_blank: int
) -> Manifest:
    """Tokenise the drawn rows, cut them into shards, write these and, last, the manifest."""
    checkpoint, corpus = Checkpoint.open(config.model.source, config.model.revision), config.corpus
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    longest = min(corpus.sequence_length, checkpoint.architecture.max_position_embeddings)
    texts, questions = (drawn.column(name).to_pylist() for name in ("text", "question"))
    rows = [row for row in zip(tokenizer(texts)["input_ids"], texts, questions, strict=True) if row[0]]
    prompts = _write_prompts(run, task, [question or text for _, text, question in rows])
    pairs = [(ids, text) for ids, text, _ in rows]
    n_cut = 0
    if corpus.packing == "bucket":
        n_cut = sum(len(ids) > longest for ids, _ in pairs)
        pairs = [(ids[:longest], text) for ids, text in pairs]
    pairs = _within_budget(pairs, corpus.max_tokens)
    shards: list[Shard] = []
    for start in range(0, len(pairs), corpus.shard_sequences):
        part = pairs[start : start + corpus.shard_sequences]
        if corpus.packing == "pack":
            part = [(ids, "") for ids in chunk_stream([ids for ids, _ in part], longest)]
        shards.append(_write_shard(run, task, f"{len(shards):05d}", part))
    manifest = Manifest(task, print_, tuple(shards), n_rows, n_blank, n_cut, prompts)
    write_json(run.shards(task) / "manifest.json", asdict(manifest))
    return manifest


def _within_budget(pairs: list[tuple[list[int], str]], max_tokens: int | None) -> list[tuple[list[int], str]]:
    if max_tokens is None:
        return pairs
    before = np.cumsum([0, *(len(ids) for ids, _ in pairs)])[:-1]
    return [pair for pair, spent in zip(pairs, before, strict=True) if spent < max_tokens]


def _write_prompts(run: Run, task: str, prompts: list[str]) -> str:
    with atomic_write(_prompts(run, task)) as temporary:
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), temporary)
        return sha256_of(temporary)


def _write_shard(run: Run, task: str, shard: str, pairs: list[tuple[list[int], str]]) -> Shard:
    table = pa.table(
        {
            "ids": pa.array([ids for ids, _ in pairs], pa.list_(pa.int32())),
            "text": pa.array([text for _, text in pairs], pa.string()),
        }
    )
    path = run.shards(task) / f"{shard}.parquet"
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
        digest = sha256_of(temporary)
    return Shard(task, shard, len(pairs), sum(len(ids) for ids, _ in pairs), digest)
