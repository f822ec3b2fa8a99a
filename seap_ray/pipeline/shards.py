"""Shards: corpora in, immutable token shards with a manifest out.

``shards/<task>/00017.parquet`` holds one sequence a row: ``ids`` (int32 list), ``text`` and, where not all tokens count
in the statistics, ``counted`` (bool list). ``prompts.parquet`` holds what a user would ask of every drawn row, and
``rows.json`` the content key of each, so that none is judged on. ``manifest.json``, written last, holds the token count
and digest of every shard.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.models.batching import chunk_stream
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, content_key, judged_rows, listed, load_tokenizer, tokenizer_hash
from seap_ray.models.encoding import Count, Encoding, RenderedText, uses_chat
from seap_ray.models.row_sources import calibration_rows
from seap_ray.models.sequences import CountedSequence, Sequences, counted_of, n_counted
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.draw import Draw, draw_corpus
from seap_ray.pipeline.synthesis import synthesis_state, synthesise
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.digests import digest_of_file, has_digest, stated_digest
from seap_ray.storage.files import atomic_write, read_json, stage, write_json
from seap_ray.storage.paths import StoragePath, inside
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")
MANIFEST_FILE = "manifest.json"
PROMPTS_FILE = "prompts.parquet"
ROWS_FILE = "rows.json"
SCHEMA = 2
"""Version of the shards' contents; raise it when the same rows are encoded or split in another way."""
UNUSED_FIELDS = {"metric", "lm_eval", "weight", "choices", "evaluation_path", "evaluation_split", "held_out"}
"""Fields of a task that its shards do not depend on, but for whether rows of the corpus are held out."""

# --- what is on storage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard file, as the manifest has it: name, number of sequences and tokens, digest of its bytes."""

    task: str
    shard: str
    """The shard's number among those of its task, in five digits, as in the file's name; with an ``s`` before it where
    the dense model has written it."""
    n_sequences: int
    n_tokens: int
    digest: str
    n_uncounted: int = 0
    """Tokens that do not count in the statistics."""
    n_uncounted_first: int = 0
    """First tokens of sequences among them."""
    is_synthetic: bool = False
    """Whether the dense model has written the texts."""

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> "Shard":
        """Return the shard that a manifest's entry states. Raises TypeError or KeyError where a field is missing."""
        fields = {name: value for name, value in about.items() if name != "sha256"}
        return cls(**{**fields, "digest": stated_digest(about)})

    def path(self, run: Run) -> StoragePath:
        """Return where the shard lies."""
        return run.shards(self.task) / f"{self.shard}.parquet"

    def sequences(self, run: Run) -> Sequences:
        """Read the token ids of every sequence, and which of them count."""
        file = stage(self.path(run))
        columns = [name for name in ("ids", "counted") if name in pq.read_schema(file).names]
        table = pq.read_table(file, columns=columns)
        ids = table.column("ids").to_pylist()
        if "counted" not in table.column_names:
            return ids
        return [*map(CountedSequence, ids, table.column("counted").to_pylist())]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All shards of a task, and what became of the rows."""

    task: str
    fingerprint: str
    """Fingerprint of the settings and files that the shards were made from."""
    shards: tuple[Shard, ...]
    """Those that the dense model has written come first: the last one, which is held out, is the corpus's own."""
    n_rows: int
    """Rows in the corpus."""
    n_cut: int
    """Texts cut at the longest sequence."""
    prompts: str
    """Digest of the file of prompts."""
    rows: str
    """Digest of the file of content keys."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows that are left out, or worth a look, by ``corpus.REASONS``. Duplicates are estimated where more than
    ``draw.COUNTED_KEYS`` rows are distinct."""
    chat: bool = False
    """Whether the texts are in the model's chat template."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_counted(self) -> int:
        """Tokens of all shards that count in the statistics (``corpus.count``)."""
        return self.n_tokens - sum(shard.n_uncounted for shard in self.shards)

    @property
    def n_synthetic(self) -> int:
        """Tokens of texts that the dense model has written."""
        return sum(shard.n_tokens for shard in self.shards if shard.is_synthetic)

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
            shards = tuple(Shard.from_json(shard) for shard in content["shards"])
            return cls(**{**content, "shards": shards})
        except (TypeError, KeyError):
            return None

    def digests(self) -> dict[str, str]:
        """Return the digest of every other file in the folder, by its name."""
        digests = {f"{shard.shard}.parquet": shard.digest for shard in self.shards}
        digests[PROMPTS_FILE] = self.prompts
        digests[ROWS_FILE] = self.rows
        return digests


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The format of a task's shards as an artifact: a folder whose manifest holds the key and every file's digest."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the manifest has the key and every file the bytes that the manifest states."""
        manifest = Manifest.read(path)
        if manifest is None or manifest.fingerprint != key:
            return False

        # Last, since it reads every byte.
        return all(has_digest(inside(path, name, path), digest) for name, digest in manifest.digests().items())

    def load(self, path: StoragePath) -> Manifest:
        """Read the manifest of shards that are whole."""
        manifest = Manifest.read(path)
        assert manifest is not None, "only a folder that is whole is loaded"
        return manifest


def shards_artifact(
    config: Config, checkpoint: Checkpoint, run: Run, task: Task, tokenizer: "PreTrainedTokenizerBase"
) -> Artifact[Manifest]:
    """Return a task's shards as an artifact; its key stands for settings, tokenizer, and the source's files.

    Raises ConfigError where a chat template is to be used and there is none.
    """
    key = fingerprint(
        SCHEMA,
        task.model_dump(exclude=UNUSED_FIELDS),
        config.corpus.model_dump(exclude={"synthesis"}),
        config.run.seed,
        tokenizer_hash(checkpoint),
        calibration_rows(task).state(),
        judged_rows(task).is_split_off,
        # The template is in a file of its own, or in the tokenizer's.
        tokenizer.get_chat_template() if uses_chat(config, task, tokenizer) else None,
        # Nothing where nothing is written, so that shards of runs without it stay.
        *filter(None, [synthesis_state(config, checkpoint)]),
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
        ConfigError: A chat template is to be used and there is none.
        DataError: A corpus cannot be had or used; it names the task.
    """
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    artifacts = {task.name: shards_artifact(config, checkpoint, run, task, tokenizer) for task in config.tasks}

    stale = [task for task in config.tasks if not artifacts[task.name].is_made()]
    if stale:
        report(f"reading {', '.join(task.name for task in stale)}")
        keys = [artifacts[task.name].key for task in stale]
        _write_all(config, checkpoint, run, stale, keys)

    return [artifacts[task.name].load() for task in config.tasks]


def _write_all(config: Config, checkpoint: Checkpoint, run: Run, tasks: Sequence[Task], keys: Sequence[str]) -> None:
    """Draw each corpus with Ray Data, then tokenise and write it in a Ray task of its own."""
    corpus = config.corpus
    is_official = corpus.prompt_format == "official"
    write = remote_task(_write_task)

    # Each is written while the next one is drawn; where the model adds texts, all rows are drawn first.
    pending = []
    waiting: list[tuple[Task, str, Draw]] = []
    for task, key in zip(tasks, keys, strict=True):
        drawn = draw_corpus(
            task,
            n=corpus.samples,
            seed=config.run.seed,
            official=is_official,
            is_evaluated=config.evaluation.samples != 0,
        )
        if corpus.synthesis.samples:
            waiting.append((task, key, drawn))
        else:
            pending.append(write.remote(config, run, task, key, drawn))

    shards = {task: _split(drawn.items, corpus.shard_sequences) for task, _, drawn in waiting}
    written = synthesise(config, checkpoint, run, shards)
    for task, key, drawn in waiting:
        pending.append(write.remote(config, run, task, key, drawn, written[task.name]))

    # An error of any task is raised here.
    ray.get(pending)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _EncodedRow:
    """A drawn row as it is calibrated on."""

    item: Item
    text: str
    ids: Sequence[int]


def _write_task(
    config: Config, run: Run, task: Task, key: str, drawn: Draw, synthetic: Sequence[Sequence[Item]] = ()
) -> None:
    """Tokenise the drawn rows, cut them into shards, write these and, last, the manifest.

    What the model itself has written goes into shards apart.
    """
    corpus = config.corpus
    # Opened here, on the node that does the work: a checkpoint's folder may lie elsewhere there.
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    encoding = Encoding.of(config, task, tokenizer)
    longest = min(corpus.sequence_length, checkpoint.architecture.max_position_embeddings)

    counts = Counter(drawn.counts)
    rows = _encode(encoding, task, drawn.items, corpus.count, counts)
    try:
        encoding.check_ids([row.ids for row in rows], checkpoint.vocabulary_size)
    except DataError as error:
        raise DataError(f"tasks.{task.name}: {error}") from None

    # Where a task asks nothing, its text is what a user would write.
    prompts = _write_prompts(run, task.name, [row.item.question or row.item.text for row in rows])

    # Buckets cut long texts; packing has the stream of all texts, so that nothing is lost.
    n_cut = 0
    if corpus.packing == "bucket":
        n_cut = sum(len(row.ids) > longest for row in rows)
        rows = _counting([replace(row, ids=row.ids[:longest]) for row in rows], counts)

    rows = _within_budget(rows, corpus.max_tokens)
    if not rows:
        raise DataError(f"tasks.{task.name}: none of the {drawn.n_rows} rows is left: {listed(counts)}")
    groups = _split(rows, corpus.shard_sequences)
    shards = _write_shards(config, run, task.name, groups, longest, is_synthetic=False)

    # What cannot be used of these is no row of the corpus, and not counted.
    written = [_encode(encoding, task, items, corpus.count, Counter()) for items in synthetic if items]
    synthetic_shards = _write_shards(config, run, task.name, [*filter(None, written)], longest, is_synthetic=True)
    shards = (*synthetic_shards, *shards)

    # Last: a folder without a manifest is made again.
    keys = _write_row_keys(run, task.name, drawn.items)
    manifest = Manifest(task.name, key, shards, drawn.n_rows, n_cut, prompts, keys, dict(counts), encoding.is_chat)
    write_json(run.shards(task.name) / MANIFEST_FILE, asdict(manifest))


def _write_shards(
    config: Config, run: Run, task: str, groups: Sequence[Sequence[_EncodedRow]], longest: int, *, is_synthetic: bool
) -> tuple[Shard, ...]:
    """Write groups of rows, a shard each: every text for itself, or all in chunks of ``longest`` tokens."""
    shards: list[Shard] = []
    for number, rows in enumerate(groups):
        pairs = [(row.ids, row.text) for row in rows]
        if config.corpus.packing == "pack":
            # A chunk holds pieces of several texts, so none is stored with it. No other chunk sees one that has
            # nothing to count.
            chunks = chunk_stream([row.ids for row in rows], longest)
            pairs = [(ids, "") for ids in chunks if n_counted(ids)]
        # Every row has a token that counts, and so has the chunk that this token is in.
        assert pairs, "no shard is without sequences"
        name = f"s{number:05d}" if is_synthetic else f"{number:05d}"
        shards.append(replace(_write_shard(run, task, name, pairs), is_synthetic=is_synthetic))

    return tuple(shards)


def _split(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Spread rows evenly over shards of ``most`` rows at most, in order."""
    groups: list[Sequence[Row]] = []
    start = 0
    for size in shard_sizes(len(rows), most):
        groups.append(rows[start : start + size])
        start += size
    return groups


def shard_sizes(n_rows: int, most: int) -> list[int]:
    """Return how many of a task's rows each shard holds, in order.

    The rows are spread evenly: the last shard is held out when plans and ridges are chosen, so it must not be a small
    remainder of the others.

    Args:
        n_rows: Rows of the task, at least one.
        most: The most rows of a shard (``corpus.shard_sequences``).

    Returns:
        Sizes that sum to ``n_rows`` and differ by one at most, the larger ones first; two of them or more, but for a
        single row.
    """
    # The fewest shards that hold all rows, rounded up; two where there are rows for them.
    n_shards = max(-(-n_rows // most), min(n_rows, 2))
    size, n_larger = divmod(n_rows, n_shards)
    return [size + 1] * n_larger + [size] * (n_shards - n_larger)


def _encode(
    encoding: Encoding, task: Task, items: Sequence[Item], count: Count, counts: Counter[str]
) -> list[_EncodedRow]:
    """Return the items with their ids, and count those that cannot be used.

    Raises DataError where the chat template takes none of them.
    """
    taken: list[tuple[Item, RenderedText]] = []
    refusal: DataError | None = None
    for item in items:
        try:
            taken.append((item, encoding.rendered(item, count)))
        # Conversations that people have collected are not all as a template wants them.
        except DataError as error:
            refusal = refusal or error
            counts["refused"] += 1

    if not taken:
        raise DataError(f"tasks.{task.name}: {refusal}; it takes none of the {len(items)} rows")

    all_ids = encoding.sequences([rendered for _, rendered in taken])
    rows = [_EncodedRow(item, rendered.text, ids) for (item, rendered), ids in zip(taken, all_ids, strict=True)]
    return _counting(rows, counts)


def _counting(rows: list[_EncodedRow], counts: Counter[str]) -> list[_EncodedRow]:
    """Return the rows that have a token that counts, and count the others."""
    counting = [row for row in rows if n_counted(row.ids)]
    if len(counting) < len(rows):
        counts["no_token"] += len(rows) - len(counting)
    return counting


def _within_budget(rows: list[_EncodedRow], max_tokens: int | None) -> list[_EncodedRow]:
    """Keep sequences up to the one that reaches the budget."""
    if max_tokens is None:
        return rows

    # Tokens of all sequences that come before one, so that the one that reaches the budget is kept.
    tokens_before = np.cumsum([0, *(len(row.ids) for row in rows)])[:-1]
    return [row for row, before in zip(rows, tokens_before, strict=True) if before < max_tokens]


def _write_prompts(run: Run, task: str, prompts: list[str]) -> str:
    """Write the file of prompts and return its digest."""
    with atomic_write(run.shards(task) / PROMPTS_FILE) as temporary:
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), temporary)
        return digest_of_file(temporary)


def _write_row_keys(run: Run, task: str, items: Sequence[Item]) -> str:
    """Write the file of content keys and return its digest."""
    path = run.shards(task) / ROWS_FILE
    write_json(path, [content_key(item).hex() for item in items])
    return digest_of_file(stage(path))


def _write_shard(run: Run, task: str, shard: str, pairs: Sequence[tuple[Sequence[int], str]]) -> Shard:
    columns = {
        "ids": pa.array([[*ids] for ids, _ in pairs], pa.list_(pa.int32())),
        "text": pa.array([text for _, text in pairs], pa.string()),
    }
    # Without the column all tokens count.
    if any(isinstance(ids, CountedSequence) for ids, _ in pairs):
        columns["counted"] = pa.array([[*counted_of(ids)] for ids, _ in pairs], pa.list_(pa.bool_()))
    table = pa.table(columns)

    # Hashed before it moves to its place, which may be a bucket.
    path = run.shards(task) / f"{shard}.parquet"
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
        digest = digest_of_file(temporary)

    sequences = [ids for ids, _ in pairs]
    n_tokens = sum(map(len, sequences))
    n_uncounted = n_tokens - sum(map(n_counted, sequences))
    n_uncounted_first = sum(not counted_of(ids)[0] for ids in sequences)
    return Shard(task, shard, len(pairs), n_tokens, digest, n_uncounted, n_uncounted_first)
