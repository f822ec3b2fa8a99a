"""Needs: the memory, disk and time that a run of a config takes, from the model's dimensions alone.

These are formulas of an ``Architecture`` and a ``Config``: no weight, corpus or cluster is looked at. The doctor prints
them, the check before calibration refuses by them, and benchmarks/cost.py sets them beside measurements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from seap_ray.config import Config, PruningSection
from seap_ray.core.allocation import choose_shapes
from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.core.targets import StoredSizes, Target
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.error_correction import PASSES
from seap_ray.models.forward import COVARIANCE_COPIES, recorded_bytes
from seap_ray.models.input_records import input_files_bytes
from seap_ray.models.records import covariance_widths, sites_of, task_memory
from seap_ray.pipeline.error_correction import MAX_TOKENS
from seap_ray.pipeline.gguf_files import gguf_item_bytes, is_uniform
from seap_ray.pipeline.model_specs import ModelSpec, assumed_specs, compensation_for, model_specs, pruning_section
from seap_ray.pipeline.placement import memory_with_batch
from seap_ray.pipeline.plan_choice import passes_of_choice
from seap_ray.pipeline.run_target import target_of
from seap_ray.pipeline.shards import shard_sizes
from seap_ray.storage.paths import is_uri
from seap_ray.tasks import Task

FLOAT64_BYTES = 8
FLOAT32_BYTES = 4
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the names that a config.json has."""
TENSOR_HEADER_BYTES = 83
"""What a tensor of a statistics file adds to the file's header: name, type, shape and offsets, measured."""
SHARD_TOKEN_BYTES = 12
"""An int32 id, and some four characters of text, which the file of prompts holds again; compression is left out."""
CHOICES = 4
"""Texts that are scored for a row of a multiple-choice task, at most in the built-in tasks."""


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model by its dimensions; its weights need not be here."""

    architecture: Architecture
    outer_parameters: int
    """Weights outside the decoder layers: embeddings, head, last norm."""
    item_bytes: float
    """Mean bytes of a stored weight."""
    dtype: str = "float32"
    """Type in the model's config, which ``model.dtype=auto`` computes in."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSize":
        """Read the dimensions from the contents of a ``config.json``.

        Raises ConfigError for a family that is not supported.
        """
        architecture = Architecture.of(config)
        dtype = _dtype_of(config)
        embeddings = config["vocab_size"] * architecture.hidden_size * (1 if architecture.ties_embeddings else 2)

        # What is left outside of the layers is the last norm, one weight for each number of the hidden state.
        return cls(architecture, embeddings + architecture.hidden_size, ITEM_BYTES[dtype], dtype)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "ModelSize":
        """Count the weights of a checkpoint."""
        parameters = checkpoint.parameters
        outer = parameters - checkpoint.architecture.decoder_parameters

        # Weights may be stored in several types, so their bytes are a mean.
        return cls(checkpoint.architecture, outer, checkpoint.n_bytes / parameters, _dtype_of(checkpoint.config))

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        return self.architecture.decoder_parameters + self.outer_parameters

    @property
    def n_bytes(self) -> float:
        """Bytes of the stored weights."""
        return self.parameters * self.item_bytes

    @property
    def stored(self) -> StoredSizes:
        """What the stored weights take; those that a cut removes are in the config's type."""
        return StoredSizes(self.parameters, round(self.n_bytes), ITEM_BYTES[self.dtype])

    def compute_bytes(self, config: Config) -> int:
        """Return the bytes of a weight in the type that ``config`` computes in."""
        return ITEM_BYTES[self.dtype if config.model.dtype == "auto" else config.model.dtype]


def _dtype_of(config: Mapping[str, Any]) -> str:
    # Older versions of transformers called it torch_dtype; without either weights are float32.
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    # An unknown type is refused, if need be, when the model is opened; here it counts as the widest usual one.
    return name if name in ITEM_BYTES else "float32"


def columns_of_layers(architecture: Architecture) -> list[int]:
    """Return the columns of every layer's ``o_proj`` and ``down_proj``; of a mixture those of every MoE expert."""
    return [sum(covariance_widths(architecture, layer)) for layer in range(architecture.n_layers)]


# --- the corpora -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """The sequences, tokens and shards of one task."""

    sequences: int
    tokens: int
    shards: int


def largest_corpora(config: Config, architecture: Architecture) -> dict[str, CorpusSize]:
    """Return by task what a config draws at most: every row there, and as long as the longest sequence."""
    corpus = config.corpus
    longest = min(corpus.sequence_length, architecture.max_position_embeddings)

    tokens = corpus.samples * longest
    if corpus.max_tokens is not None:  # the draw ends with the row that reaches the budget
        tokens = min(tokens, corpus.max_tokens + longest)

    shards = len(shard_sizes(corpus.samples, corpus.shard_sequences))
    return {task.name: CorpusSize(corpus.samples, tokens, shards) for task in config.tasks}


# --- disk ------------------------------------------------------------------------------------------------------------


def moments_bytes(architecture: Architecture) -> int:
    """Return the bytes of a record's numbers: mean and squares of every column and of each layer's cosine, float64."""
    return 2 * FLOAT64_BYTES * sum(columns + 1 for columns in columns_of_layers(architecture))


def record_bytes(architecture: Architecture) -> int:
    """Return the size of a record, or of a task's statistics, without covariances."""
    n_sites = sum(1 for _ in sites_of(architecture))
    # Mean, squares and count of every site are a tensor each.
    return moments_bytes(architecture) + 3 * n_sites * TENSOR_HEADER_BYTES


def covariance_files_bytes(architecture: Architecture) -> int:
    """Return the size of the covariances of one shard, or one task: a triangle for each layer and site, float32."""
    n_numbers = 0
    for layer in range(architecture.n_layers):
        n_numbers += sum(width * (width + 1) // 2 for width in covariance_widths(architecture, layer))
    return FLOAT32_BYTES * n_numbers


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """Bytes that a run leaves in its folder, by kind. The report and the tables are small beside them."""

    shards: int
    """At most: parquet compresses them."""
    records: int
    covariances: int
    """Of every shard and every task."""
    statistics: int
    """Of every task, with the weights' norms and the scores that were made from covariances."""
    checkpoints: int

    @property
    def total(self) -> int:
        """The sum over all kinds."""
        return sum(getattr(self, kind.name) for kind in fields(self))


def disk_needs(model: ModelSize, config: Config, corpora: Mapping[str, CorpusSize]) -> DiskNeeds:
    """Return what the files of a run take."""
    architecture = model.architecture
    n_shards = sum(size.shards for size in corpora.values())
    n_tasks = len(corpora)

    covariances = 0
    if config.calibration.statistics == "covariance":
        covariances = (n_shards + n_tasks) * covariance_files_bytes(architecture)
    if config.records_inputs:
        covariances += (n_shards + n_tasks) * input_files_bytes(architecture)

    # The norms of the weights are one more file of the same form.
    statistics = (n_tasks + 1) * record_bytes(architecture) + _unit_score_bytes(architecture, config)

    return DiskNeeds(
        shards=SHARD_TOKEN_BYTES * sum(size.tokens for size in corpora.values()),
        records=n_shards * record_bytes(architecture),
        covariances=covariances,
        statistics=statistics,
        checkpoints=checkpoint_bytes(model, config),
    )


def _unit_score_bytes(architecture: Architecture, config: Config) -> int:
    """Return the size of scores from covariances, which are made once for every set of tasks, whatever the ratio."""
    scored = set()
    for spec in assumed_specs(config):
        if spec.settings.score in UNIT_SCORES:
            scored.add((spec.settings.score, spec.pooling, tuple(spec.weights.items())))

    # A score for each head and channel; a layer's two sites are a tensor each.
    numbers = sum(layer.shape.heads + layer.shape.channels for layer in architecture.layers)
    per_file = FLOAT64_BYTES * numbers + 2 * architecture.n_layers * TENSOR_HEADER_BYTES
    return len(scored) * per_file


def checkpoint_bytes(model: ModelSize, config: Config) -> int:
    """Return the size of all checkpoints of a run: every model at every ratio.

    On a disk the tensors that models have unchanged from the base are there once; in a bucket in every checkpoint.
    """
    # Models that leave the same layers whole share the files of what they have unchanged.
    parameters = 0
    in_gguf = 0
    shared: dict[frozenset[int], int] = {}
    target = target_of(config, model.architecture, model.stored)
    for ratio in config.pruning.ratio:
        for spec in assumed_specs(config):
            size = _pruned_size(model, config, spec, ratio, target)
            parameters += size.changed
            # A GGUF file has all of a model's weights once more.
            in_gguf += size.changed + size.carried
            if is_uri(config.run.storage):
                parameters += size.carried
            else:
                shared[size.whole_layers] = size.carried

    return round(model.item_bytes * (parameters + sum(shared.values())) + gguf_item_bytes(config) * in_gguf)


@dataclass(frozen=True, slots=True)
class _PrunedSize:
    """Weights of a pruned model."""

    changed: int
    """Those that are in its own files."""
    carried: int
    """Those that it has unchanged from the base."""
    whole_layers: frozenset[int]
    """Layers that are not cut: models with the same ones share their files."""


def _pruned_size(model: ModelSize, config: Config, spec: ModelSpec, ratio: float, target: Target | None) -> _PrunedSize:
    architecture = model.architecture
    adds_biases = compensation_for(spec.settings).adds_biases
    pruning = pruning_section(config, spec.settings)
    shapes = _shapes(architecture, pruning, config, ratio, target, adds_biases=adds_biases)

    # The widths depend on scores: all that stays of the layers counts as changed.
    if not shapes:
        changed = round((1 - ratio) * architecture.decoder_parameters)
        return _PrunedSize(changed, model.outer_parameters, frozenset())

    is_stock = config.export.format == "stock"
    changed = 0
    carried = model.outer_parameters
    whole_layers = []
    for i, (given, shape) in enumerate(zip(architecture.layers, shapes, strict=True)):
        after = architecture.layer_parameters(architecture.resized(i, shape, adds_biases=adds_biases))
        if shape == given.shape and not is_stock:
            carried += after
            whole_layers.append(i)
        else:
            unchanged = _unchanged_parameters(architecture, given)
            carried += unchanged
            changed += after - unchanged

    return _PrunedSize(changed, carried, frozenset(whole_layers))


def _shapes(
    architecture: Architecture,
    pruning: PruningSection,
    config: Config,
    ratio: float,
    target: Target | None,
    *,
    adds_biases: bool,
) -> Sequence[Shape]:
    """Return the widths of every layer where they do not depend on scores; else none.

    Raises ConfigError for a ratio that cannot be met.
    """
    if pruning.allocation.kind not in ("uniform", "logistic"):
        return []

    stock = is_uniform(config, architecture, adds_biases=adds_biases)
    return choose_shapes(
        architecture, pruning, ratio=ratio, adds_biases=adds_biases, scores_L=(), stock=stock, target=target
    )


def _unchanged_parameters(architecture: Architecture, layer: Layer) -> int:
    """Return the weights of a layer that a cut leaves as they are: norms, and the router of a mixture."""
    # Every product of attention and MLP loses rows or columns, so it is written anew.
    cut = architecture.attention_parameters(layer.shape) + layer.shape.channels * architecture.channel_cost(layer)
    return architecture.layer_parameters(layer) - cut


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes of memory, by process. Of ``single``, ``device_map`` and ``stream`` a worker has one."""

    single: int
    """Device memory of a worker that holds the whole model, with a batch."""
    device_map: int
    """Device memory of each GPU of a worker that spreads the model over its GPUs."""
    stream: int
    """Device memory of a worker that holds two decoder layers and the hidden states."""
    host: int
    """Host memory of a worker with a GPU, while the model is loaded through it."""
    driver: int
    """Host memory of the job's own process: the statistics of all tasks."""
    covariance_task: int
    """Host memory of a task on one layer's covariances; 0 where none are recorded."""


def memory_needs(model: ModelSize, config: Config, corpora: Mapping[str, CorpusSize]) -> MemoryNeeds:
    """Return the memory that processes of a job need, beside what Python and torch themselves take (about 1 GB)."""
    architecture = model.architecture
    item_bytes = model.compute_bytes(config)
    has_covariances = config.calibration.statistics == "covariance"

    # One layer's covariances at least; where there is room a worker takes more of them in one pass.
    layer_bytes = recorded_bytes(architecture, inputs=config.records_inputs)
    recording = COVARIANCE_COPIES * layer_bytes if has_covariances else 0
    whole = memory_with_batch(model.parameters, item_bytes)

    largest_layer = max(architecture.layer_parameters(layer) for layer in architecture.layers)
    n_tokens = min(config.calibration.stream_tokens, sum(size.tokens for size in corpora.values()))
    hidden_states = n_tokens * architecture.hidden_size * item_bytes
    # Two layers, since one is loaded while the other computes. The input embedding goes before the first layer comes.
    streamed = max(2 * largest_layer, model.outer_parameters // 2)

    return MemoryNeeds(
        single=whole + recording,
        device_map=round(whole / max(1, config.calibration.num_gpus)) + recording,
        stream=memory_with_batch(streamed, item_bytes) + hidden_states + recording,
        host=model.parameters * item_bytes,
        # One more for the weights' norms, one for a mean over tasks.
        driver=(len(corpora) + 2) * moments_bytes(architecture),
        covariance_task=task_memory(architecture) if has_covariances else 0,
    )


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one worker and the run's storage are."""

    name: str
    flop_per_s: float
    """Products of matrices in the model's type."""
    read_bytes_per_s: float
    """Weights that are read from storage."""
    write_bytes_per_s: float
    """Checkpoints that are written to storage."""


STORAGE_READ_BYTES_PER_S = 2e9
"""Assumed rate at which a node reads from shared storage."""
STORAGE_WRITE_BYTES_PER_S = 1e9
"""Assumed rate at which a node writes to shared storage."""
STORAGE_NAME = "storage read at 2 GB/s and written at 1 GB/s"
H100 = Rates(
    name=f"an H100 at 40 % of 989 TFLOP/s, {STORAGE_NAME}",
    flop_per_s=0.4 * 989e12,
    read_bytes_per_s=STORAGE_READ_BYTES_PER_S,
    write_bytes_per_s=STORAGE_WRITE_BYTES_PER_S,
)
"""Assumed rates of a GPU; an H200 calibrates a Llama-2-7B at 44 % (docs/benchmarks.md)."""
CPU_CORE_FLOP_PER_S = 40e9
"""Assumed rate of a CPU core in float32."""


def assumed_rates(config: Config) -> Rates:
    """Return the rates of a worker as the config describes it."""
    if config.calibration.num_gpus:
        return H100

    flop_per_s = config.calibration.num_cpus * CPU_CORE_FLOP_PER_S
    return Rates(
        name=f"CPUs at {flop_per_s / 1e9:.0f} GFLOP/s, {STORAGE_NAME}",
        flop_per_s=flop_per_s,
        read_bytes_per_s=STORAGE_READ_BYTES_PER_S,
        write_bytes_per_s=STORAGE_WRITE_BYTES_PER_S,
    )


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """FLOP of a token on its way through the decoder layers."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Products and attention."""
        return self.products + self.attention


def token_flops(architecture: Architecture, sequence: int) -> TokenFlops:
    """Return the FLOP of a token in a sequence: 2 a weight, and 2 A n of a layer's attention over n tokens.

    A is the width of ``o_proj``; attention is half of 4 A n, as it is causal. All experts of a mixture count here,
    though a token goes to some of them only.
    """
    attn, _ = architecture.widths

    return TokenFlops(2 * architecture.decoder_parameters, 2 * architecture.n_layers * attn * sequence)


@dataclass(frozen=True, slots=True)
class TimeNeeds:
    """Seconds of one worker by stage, at most; None for judging where all rows of a corpus are judged."""

    calibration: float
    choice: float
    """Judging plans on held-out tokens, without repairing the models that are judged, and correcting their errors."""
    judging: float | None
    writing: float


def time_needs(model: ModelSize, config: Config, corpora: Mapping[str, CorpusSize], rates: Rates) -> TimeNeeds:
    """Return the seconds of one worker. Starting processes, reading corpora and planning are not counted."""
    architecture = model.architecture
    longest = min(config.corpus.sequence_length, architecture.max_position_embeddings)
    flop_per_token = token_flops(architecture, longest).total
    reading = model.n_bytes / rates.read_bytes_per_s

    n_tokens = sum(size.tokens for size in corpora.values())
    recording = 0
    if config.calibration.statistics == "covariance":
        # A sum of outer products is 2 FLOP for each pair of columns; on a GPU there are two such sums.
        attn, mlp = architecture.widths
        # In a mixture a token's MLP is as many MoE experts as the router chooses.
        pairs = attn**2 + mlp**2 * max(architecture.experts_per_token, 1)
        recording = 4 * architecture.n_layers * pairs
    calibration = n_tokens * (flop_per_token + recording) / rates.flop_per_s + reading

    # Each task's held-out tokens pass for every model whose plan is made from that task's statistics.
    choice = 0.0
    for spec in model_specs(config):
        held_out = sum(min(config.pruning.held_out_tokens, corpora[task].tokens) for task in spec.weights)
        passed = passes_of_choice(config, spec) * held_out
        if spec.settings.error_correction:
            passed += PASSES * min(MAX_TOKENS, sum(corpora[task].tokens for task in spec.weights))
        choice += len(config.pruning.ratio) * passed * flop_per_token / rates.flop_per_s

    judging = None
    judged_tokens = _judged_tokens(config, corpora)
    if judged_tokens is not None:
        # The dense model is judged too.
        n_models = 1 + len(assumed_specs(config)) * len(config.pruning.ratio)
        # Each model is loaded once; where nothing is judged, none is.
        judging = n_models * (judged_tokens * flop_per_token / rates.flop_per_s + reading) if judged_tokens else 0.0

    # The base is read about once for all models of a run (docs/scale.md).
    writing = checkpoint_bytes(model, config) / rates.write_bytes_per_s + reading
    return TimeNeeds(calibration, choice, judging, writing)


def _judged_tokens(config: Config, corpora: Mapping[str, CorpusSize]) -> int | None:
    """Return the tokens that a model is judged on, rows as long as those of the calibration; None for all rows."""
    n_rows = config.evaluation.samples
    if n_rows is None:
        return None

    return sum(_row_tokens(config, task, corpora[task.name]) * n_rows for task in config.tasks)


def _row_tokens(config: Config, task: Task, corpus: CorpusSize) -> int:
    if task.metric == "window_perplexity":
        return config.evaluation.window or config.corpus.sequence_length

    # Every choice of a multiple-choice row is scored as a text with the question before it.
    mean_length = -(-corpus.tokens // max(corpus.sequences, 1))
    return mean_length * CHOICES if task.metric in ("acc", "acc_norm") else mean_length


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """The memory, disk and time that a run takes."""

    memory: MemoryNeeds
    disk: DiskNeeds
    time: TimeNeeds
    rates: Rates


def needs(
    model: ModelSize,
    config: Config,
    corpora: Mapping[str, CorpusSize] | None = None,
    rates: Rates | None = None,
) -> Needs:
    """Return the memory, disk and time that a run of a config takes.

    Args:
        model: The model to prune; ``ModelSize.from_config`` makes one without weights.
        config: The run's configuration.
        corpora: Sizes of the tasks' corpora, where they are known; else the largest that the config allows.
        rates: What a worker does in a second; else ``assumed_rates``.

    Raises:
        ConfigError: A ratio of the config cannot be met by this model.
    """
    corpora = corpora or largest_corpora(config, model.architecture)
    rates = rates or assumed_rates(config)
    return Needs(
        memory_needs(model, config, corpora),
        disk_needs(model, config, corpora),
        time_needs(model, config, corpora, rates),
        rates,
    )
