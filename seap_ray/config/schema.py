"""Schema: every key of the configuration, with its type, default and meaning, as one frozen ``Config``.

The docstring of a key is its text in ``--help``.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from seap_ray.methods import METHODS, StudyName
from seap_ray.tasks import BUILT_IN, Section, Task, complete

Score = Literal[
    "wifv", "wifn", "wanda_sp", "energy", "official_wifn", "magnitude", "random", "block_wifv", "obs", "reap"
]
FROM_COVARIANCES = ("block_wifv", "obs", "least_squares")
"""Scores and compensations that need ``calibration.statistics=covariance``."""
Placement = Literal["auto", "single", "device_map", "stream"]
Allocation = Literal["uniform", "logistic", "global", "standardised", "measured", "depth"]
Budget = Literal["exact", "official"]
Compensation = Literal["none", "mean", "least_squares"]
AttentionUnit = Literal["group", "head", "none"]
MlpUnit = Literal["channel", "expert"]
TargetKind = Literal["parameters", "weights", "memory", "latency"]
Auto = Literal["auto"]
"""What is left to be chosen on held-out tokens of the calibration."""
Pooling = Literal["pooled", "score_average"]
Ratio = Annotated[float, Field(ge=0, lt=1)]
QuantizationScheme = Literal["w4a16", "w4a16_asym", "w8a16", "w8a8"]
GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0, le=1)]
AtLeastZero = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
GENERAL = "general"
"""Name of the model for all tasks."""
AUTO = "auto"
"""Name of the model in a request that leaves the choice to the router."""
DENSE = "dense"
"""Name of the model that everything is cut from."""
RESERVED = (GENERAL, DENSE, AUTO, "weight_norms")
"""Names of models and files that every run has."""
NOT_FOR_ENGINES = {
    **dict.fromkeys(("model", "tokenizer", "served_model_name"), "is set by the service itself"),
    **dict.fromkeys(
        ("trust_remote_code", "trust_request_chat_template", "enable_prompt_embeds", "tool_parser_plugin"),
        "would let code in that is not ours, or not safe to read",
    ),
}
"""Engine arguments that are refused, and why."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only clients on the same machine can reach."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
"""Endings of a number of parameters."""
BYTES = {
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
"""Endings of a number of bytes."""
NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
"""A number with or without a unit."""


def _in_units(units: Mapping[str, int], example: str) -> Callable[[Any], Any]:
    """Return a reader of numbers with a unit behind them."""

    def read(value: Any) -> Any:
        """Read ``value``; what is no text is left to the field's own type."""
        if not isinstance(value, str):
            return value
        match = NUMBER.fullmatch(value.strip())
        if match is None or match[2] not in units:
            endings = ", ".join(filter(None, units))
            raise ValueError(f"should be a whole number, or one with {endings} behind it, such as {example}")
        # Decimal, since 6.7 times a power of ten is no whole number in binary.
        return int(Decimal(match[1]) * units[match[2]])

    return read


Parameters = Annotated[int, BeforeValidator(_in_units(THOUSANDS, "6.5B")), Field(ge=1)]
"""A number of parameters: 6500000000 or 6.5B."""
Bytes = Annotated[int, BeforeValidator(_in_units(BYTES, "12GB")), Field(ge=0)]
"""A number of bytes: 12000000000, 12GB or 11.2GiB."""


class RunSection(Section):
    """Where the files of a run lie."""

    name: FolderName = "demo"
    """Name of the run. Its files lie in <run.storage>/<run.name>; a command with the same name continues the run."""
    storage: str = "runs"
    """Folder that holds runs, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. On several nodes it must be a bucket, or a
    folder that every node sees under this path. A relative path starts at the current folder; in a job submitted with
    --working-dir, which Ray runs in a temporary copy, it starts at the home folder."""
    seed: int = 0
    """Seed of every random draw: calibration rows, evaluation rows and the score `random`."""


class ModelSection(Section):
    """The model to prune."""

    source: str = "demo"
    """The model to prune: `demo` (comes with the package), a folder, a folder in a bucket (s3://..., gs://...), an id
    on the Hugging Face hub such as meta-llama/Llama-3.1-8B, or a GGUF file. A folder holds a checkpoint of
    transformers, or a LoRA adapter, which is merged into its base. Every node downloads from a bucket or the hub once,
    and converts pickled weights, GGUF files and adapters once."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null means its main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the model computes during calibration and evaluation; `auto` is the type of its
    weights. Pruned checkpoints always have the type of the source's weights."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run. Set it only after you have read that code."""


class SynthesisSection(Section):
    """Texts of a task that the dense model itself writes."""

    samples: AtLeastZero = 0
    """Texts for each task, added to its corpus: the task's own questions, or the beginnings of mere texts, each with
    what the model writes behind it, as long as the row's own at most. 0: none. More than the task's drawn rows go on
    from these again."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits before a token is drawn; 0 takes the likeliest one."""


class CorpusSection(Section):
    """The calibration data of a task."""

    samples: int = Field(default=200, ge=1)
    """Rows drawn per task for calibration, at random over the whole corpus."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens drawn per task: the draw ends with the row that reaches this number, even before `samples` rows.
    null means no limit."""
    sequence_length: int = Field(default=2048, ge=2)
    """Longest calibration sequence in tokens. Longer texts are cut there, or earlier where the model's context ends."""
    packing: Literal["bucket", "pack"] = "bucket"
    """How texts become sequences. `bucket`: each text is its own sequence, batched with texts of like length. `pack`
    (sequence packing): texts are joined, one after another, into full sequences of sequence_length tokens."""
    prompt_format: Literal["clean", "official"] = "clean"
    """Calibration text of a row. `clean`: the task's question, a space and the right answer. `official`: the text that
    the SEAP authors' code builds, lower-casing included, to reproduce their results."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether calibration, evaluation and the router see a question as the model's chat template writes it, as the
    endpoint's chats do. `auto`: where the model has a template, and the task a question or messages. A task's own
    `chat` wins."""
    count: Literal["all", "assistant"] = "all"
    """Tokens that count in the statistics: `all`, or `assistant`, those of the assistant's messages (of a plain text
    the right answer's) alone."""
    synthesis: SynthesisSection = SynthesisSection()
    shard_sequences: int = Field(default=64, ge=1)
    """At most this many rows per shard; the rows of a task are spread evenly over at least two. A shard is what one
    worker records at a time, and the most that is lost when a worker dies. The last one is held out where something is
    chosen. With statistics `covariance` every shard takes disk: choose half of `samples` or more."""


class CalibrationSection(Section):
    """How statistics of activations are recorded."""

    workers: AtLeastOne | Literal["auto"] = "auto"
    """Model replicas that record at the same time; `auto`: as many as fit on the cluster and have a shard to do."""
    num_cpus: int = Field(default=1, ge=1)
    """CPUs, and so threads, of each worker."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each worker. 0 computes on CPUs; a part such as 0.5 lets workers share a GPU; more than 1 is for
    placement `device_map`."""
    placement: Placement = "auto"
    """How a worker holds the model. `single`: whole, on its one device. `device_map`: whole, spread over its GPUs.
    `stream`: one decoder layer at a time, read from disk, for a model larger than the memory. `auto`: the first of
    these three that the workers have memory for."""
    stream_tokens: AtLeastOne = 262144
    """Only for placement `stream`: tokens whose hidden states a worker keeps in memory. The model is read from disk
    once for this many tokens."""
    statistics: Literal["moments", "covariance"] = "moments"
    """What is recorded. `moments`: mean and variance of every column. `covariance`: covariances of all pairs of
    columns as well, which compensation `least_squares` and the scores `block_wifv` and `obs` need. Covariances of each
    shard and each task take disk, for example 8.8 GB each for Llama-2-7B (docs/method.md)."""
    covariance_layers: AtLeastOne | Literal["auto"] = "auto"
    """Layers whose covariances a worker holds at a time. With fewer than the model has, the model runs over each shard
    again for the next layers. `auto`: as many as the worker's memory has room for."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Most tokens of one forward pass, padding included. Where memory runs out it is halved, except under `stream`."""
    skip_first_token: bool = False
    """Leave the first token of every sequence out of the statistics; many models have outsized activations there."""
    input_covariances: bool | Auto = "auto"
    """Record the covariances of a layer's other inputs as well: before queries, keys and values, and before the MLP.
    They are what export.quantization rounds by; needs statistics `covariance`. `auto`: where export.quantization is
    set."""

    @model_validator(mode="after")
    def _gpus_are_used(self) -> "CalibrationSection":
        # Ray gives parts of one GPU, and beyond that whole ones alone.
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus={self.num_gpus:g}: more than one are a whole number")
        # The other GPUs would be reserved and stay idle.
        if self.num_gpus > 1 and self.placement in ("single", "stream"):
            raise ValueError(f"num_gpus={self.num_gpus:g}: placement {self.placement} works on one; choose device_map")
        return self


class AllocationSection(Section):
    """How much of each layer is removed."""

    kind: Allocation | Auto = "auto"
    """How the ratio is shared out among layers. `uniform`: every layer equally. `logistic`: more in deeper layers,
    along a logistic curve, as in the SEAP paper. `global`: units with the lowest score per parameter, in any layer.
    `standardised`: units with the lowest score after each layer's scores are standardised, as in FLAP. `measured`: the
    widths whose cuts together cost least by what each costs on held-out tokens. `depth`: whole layers, those that
    change their input least. `auto`: whole plans by measured, uniform, logistic and global are judged on held-out
    tokens, and the best is taken."""
    shared: bool = True
    """Whether under `auto` and `measured` all experts of a ratio have the widths that suit the general model, so that
    one engine can hold them all. Otherwise each has its own."""
    k: float = Field(default=1.0, allow_inf_nan=False)
    """Only for `logistic`: steepness of the curve. 0 removes equally from every layer that is not protected; negative
    values remove more from early layers."""
    x0: float = Field(default=0.3, allow_inf_nan=False)
    """Only for `logistic`: midpoint of the curve, as a share of the depth (0: first layer, 1: last layer)."""
    protect_first: AtLeastZero | Literal["auto"] = "auto"
    """Number of first layers that stay whole. `auto`: 2 (1 for models under 24 layers), or fewer where the ratio could
    not be met otherwise."""
    protect_last: AtLeastZero | Literal["auto"] = "auto"
    """Number of last layers that stay whole; `auto` as for protect_first."""
    max_sparsity: float = Field(default=0.9, gt=0, lt=1)
    """Largest share of a layer that is removed; what would be beyond it is removed from other layers."""


class PlanSettings(Section):
    """Settings of one kind of model; what is left out is taken from the pruning section."""

    score: Score | Auto | None = None
    """Score that ranks heads and channels; null: pruning.score."""
    allocation: Allocation | Auto | None = None
    """How the ratio is shared out among layers; null: pruning.allocation.kind."""
    compensation: Compensation | Auto | None = None
    """What makes up for removed columns; null: pruning.compensation."""
    bias: bool | None = None
    """Whether compensation may add biases; null: pruning.bias."""
    error_correction: Share | Auto | None = None
    """Share of earlier layers' error that is corrected, or `auto`; null: pruning.error_correction."""
    attention_unit: AttentionUnit | Auto | None = None
    """What is removed from attention; null: pruning.attention_unit."""
    mlp_unit: MlpUnit | None = None
    """What is removed from the MLP; null: pruning.mlp_unit."""
    budget: Budget | None = None
    """How the ratio is met; null: pruning.budget."""
    k: float | None = Field(default=None, allow_inf_nan=False)
    """Steepness of the logistic curve; null: pruning.allocation.k."""
    x0: float | None = Field(default=None, allow_inf_nan=False)
    """Midpoint of the logistic curve, as a share of the depth; null: pruning.allocation.x0."""
    seed: int | None = None
    """Seed of the score `random`; null: run.seed."""

    @property
    def cuts_no_module(self) -> bool:
        """Whether layers or MoE experts go as a whole, so that no module is left that compensation could change."""
        return self.allocation == "depth" or self.mlp_unit == "expert"


class ExpertSettings(PlanSettings):
    """Settings of the task experts, one model per task."""

    mix: float = Field(default=0, ge=0, le=1)
    """Share of all tasks' statistics in those of an expert's own task, from 0 to 1. A larger share keeps more of the
    other tasks, and less of its own."""


class GeneralSettings(PlanSettings):
    """Settings of the general model, one for all tasks."""

    score: Score | Auto | None = None
    """Score that ranks heads and channels; null: `energy` where nothing is compensated, else pruning.score."""
    compensation: Compensation | Auto | None = None
    """What makes up for removed columns; null: `none` where pruning.compensation is `mean`, because the mean of many
    tasks is no task's mean, else pruning.compensation."""
    pooling: Pooling = "pooled"
    """How the tasks are combined, each with its weight. `pooled`: their statistics, as of one stream of tokens, the
    spread between the tasks' means included. `score_average`: the sum of their scores, as in the SEAP paper."""


class Baseline(PlanSettings):
    """A named pruned model to compare with."""

    tasks: tuple[str, ...] | None = None
    """Tasks whose statistics are used; null: all of them."""
    pooling: Pooling = "pooled"
    """How the tasks are combined; see pruning.general.pooling."""
    per_task: bool = False
    """Whether there is one model for each task, from its statistics alone, instead of one for all tasks."""


class MemoryTarget(Section):
    """Memory that a model may take while it serves. `memory: 24GB` stands for `memory: {total: 24GB}`."""

    total: Bytes | None = None
    """Memory of weights, key-value cache and workspace together, such as 24GB or 22GiB; null: no such target."""
    tokens: int = Field(default=8192, ge=1)
    """Tokens of each sequence whose keys and values the cache holds. A layer with a sliding window holds no more than
    the window."""
    sequences: int = Field(default=16, ge=1)
    """Sequences that are served at a time."""
    workspace: Bytes = 2 * 10**9
    """Memory that the engine takes besides weights and cache: activations, graphs, the CUDA context."""


class LatencyTarget(Section):
    """How fast a model shall answer, by a table of times that `python jobs/bench.py widths` measured on the device."""

    tokens_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Generated tokens per second of the whole batch, the time of the prompts included; null: no such target."""
    table: str = "widths.json"
    """File with the times, for the dimensions of model.source."""
    batch: int = Field(default=1, ge=1)
    """Sequences that are generated at a time; the table must be measured with as many."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each prompt; the table must be measured with as many."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens that are generated after each prompt."""


class TargetSection(Section):
    """What every pruned model may take, instead of a ratio: one of these, and as much goes as meets it."""

    parameters: Parameters | None = None
    """Most parameters, embeddings included, such as 6.5B or 900M."""
    weights: Bytes | None = None
    """Most bytes of the weights, in the types that they are stored in, such as 12GB."""
    memory: MemoryTarget = MemoryTarget()
    latency: LatencyTarget = LatencyTarget()

    @field_validator("memory", mode="before")
    @classmethod
    def _total_alone(cls, value: Any) -> Any:
        return {"total": value} if isinstance(value, str | int) else value

    @property
    def kinds(self) -> list[TargetKind]:
        """Names of the targets that are set: none or one."""
        numbers: dict[TargetKind, float | None] = {
            "parameters": self.parameters,
            "weights": self.weights,
            "memory": self.memory.total,
            "latency": self.latency.tokens_per_second,
        }
        return [kind for kind, number in numbers.items() if number is not None]

    @model_validator(mode="after")
    def _one_is_complete(self) -> "TargetSection":
        """Refuse two targets at once, and one whose number is missing."""
        if len(self.kinds) > 1:
            raise ValueError(f"{' and '.join(self.kinds)} exclude each other; leave one")
        if self.memory.total is None and self.memory != MemoryTarget():
            raise ValueError("memory needs its total, such as 24GB")
        if self.latency.tokens_per_second is None and self.latency != LatencyTarget():
            raise ValueError("latency needs its tokens_per_second")
        if self.memory.total is not None and self.memory.total <= self.memory.workspace:
            raise ValueError(f"memory: the workspace alone takes {self.memory.workspace / 1e9:g} GB; set it lower")
        return self


class PruningSection(Section):
    """What is removed, and what makes up for it."""

    ratio: Annotated[tuple[Ratio, ...], BeforeValidator(_as_list), Field(min_length=1)] = (0.2, 0.5)
    """Share of the decoder layers' parameters to remove, at least 0 and below 1: a number, or a list, which gives a set
    of models for each ratio. Not beside pruning.target."""
    target: TargetSection = TargetSection()
    budget: Budget = "exact"
    """How the ratio is met. `exact`: to within one tile of channels. `official`: by the schedule of the SEAP authors'
    code, which removes less than the ratio says."""
    score: Score | Auto = "auto"
    """Score that ranks query heads and MLP channels; those with the lowest are removed. `wifv`: variance of the
    activation times squared weight norm, the SEAP paper's default. `obs`: the error that is left after the best repair
    by the others, usually the best and slowest; it and `block_wifv` need statistics `covariance`. These two are for
    use, and `energy` where nothing is compensated; the others are there to compare with. `auto`: wifv, or energy
    without compensation, whichever is better on held-out tokens. `reap`: only for mlp_unit `expert`, and its `auto`:
    the mean of gate times norm of an expert's output, over the tokens that are routed to it; the scores of channels
    score an expert by its channels' sum, times its share of the tokens. All formulas are in docs/method.md."""
    compensation: Compensation | Auto = "auto"
    """What makes up for removed columns of o_proj and down_proj. `none`: nothing. `mean`: their mean over the
    calibration tokens, as a bias. `least_squares`: what the kept columns predict of them, in the weight and, unless
    `bias` forbids it, a bias; needs statistics `covariance`. `auto`: of those that the statistics allow, the best on
    held-out tokens."""
    bias: bool | Auto = "auto"
    """Whether compensation may add biases to o_proj and down_proj, which most families do not have there. `false`:
    `least_squares` is the best linear map, without an intercept, and `mean` is refused; checkpoints then have the
    modules of their family alone. `auto`: true, unless export.format is one that cannot hold biases in this family."""
    ridge: Annotated[float, Field(ge=1e-5, le=100)] | Literal["auto"] = "auto"
    """Regularisation of `least_squares` and `obs`, relative to each column's variance. `auto`: chosen for every task,
    layer and site by the error on the task's last shard, which is held out for that."""
    error_correction: Share | Auto = 0.0
    """Share of the error of all layers before that `least_squares` corrects, too, in down_proj of every cut layer; 0:
    none. The dense and the cut model are then run side by side over the calibration's tokens, three forward passes a
    model. `auto`: for each layer the share and the ridge that leave least error on each task's last shard, which is
    held out for that; few tokens then correct little. For families whose down_proj writes to the residual stream as it
    is: neither mixtures of experts nor Gemma."""
    allocation: AllocationSection = AllocationSection()
    attention_unit: AttentionUnit | Auto = "auto"
    """What is removed from attention. `group`: key-value heads together with their query heads, which also shrinks the
    key-value cache. `head`: the same number of query heads from every group. `none`: nothing, the MLP alone is
    pruned. `auto`: `group`, or where no engine serves that `head`, else `none`; under allocation `auto` and `measured`
    `none`, unless cutting is better on held-out tokens beyond the noise."""
    mlp_unit: MlpUnit = "channel"
    """What is removed from the MLP. `channel`: its channels, in a mixture those of every expert. `expert`: only for
    mixtures: whole experts, the same number in every layer that has any, and nothing else; the ratio is met to the
    nearest number, nothing is compensated, and the router chooses as many for a token as before. With
    export.format=stock the checkpoint is an ordinary one of its family with fewer experts."""
    held_out_tokens: int = Field(default=1024, ge=1)
    """Tokens of each task, from its last shard, on which `auto` and `measured` judge plans. The statistics that
    compensate these plans leave this shard's covariances out."""
    align: AtLeastOne | Literal["auto"] = "auto"
    """The number of kept channels is a multiple of this, so that kernels run at full speed; `auto`: 128, less for small
    models."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Tensor-parallel size with which the pruned models will be served: kept heads and channels divide by it."""
    experts: ExpertSettings = ExpertSettings()
    general: GeneralSettings = GeneralSettings()
    baselines: dict[FolderName, Baseline] = {}
    """Pruned models to compare with, at the same ratios: {NAME: {tasks, score, allocation, compensation, pooling,
    per_task, ...}}; what is left out is taken from pruning. The names wanda_sp, flap, magnitude, random, depth, seap
    and seap_official stand for their authors' settings: {flap: {}}."""

    @field_validator("baselines", mode="before")
    @classmethod
    def _complete_baselines(cls, values: Any) -> Any:
        """Fill the settings of built-in names; what the user writes beside a name wins."""
        if not isinstance(values, dict):
            return values  # refused by the field's own type

        return {name: _completed_baseline(name, settings) for name, settings in values.items()}

    @field_validator("ratio")
    @classmethod
    def _ratios_are_single(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) < len(ratios):
            raise ValueError(f"{max(ratios, key=ratios.count):g} is named twice")
        return ratios


def _completed_baseline(name: str, settings: Any) -> Any:
    if not isinstance(settings, dict | None):
        return settings  # refused by the field's own type
    return {**METHODS.get(name, {}), **(settings or {})}


class QuantizationSection(Section):
    """How checkpoints are quantised. `quantization: w4a16` stands for `quantization: {scheme: w4a16}`."""

    scheme: QuantizationScheme | None = None
    """What weights of decoder layers become, in the format of compressed-tensors, which vLLM and transformers load;
    null: they stay as they are. `w4a16`: integers of 4 bits, a scale for each output and group of columns.
    `w4a16_asym`: the same with zero points. `w8a16`: 8 bits, a scale for each output. `w8a8`: the same, and engines
    round activations to 8 bits, too, with a scale for each token. Norms, biases, embeddings and the head stay."""
    group: AtLeastOne | Literal["auto"] = "auto"
    """Only for four bits: columns that share a scale. All widths must be multiples of it, so kept channels are rounded
    to multiples of it and of pruning.align. `auto`: the largest of 128, 64 and 32 that the model's widths allow."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """How weights are rounded. `gptq`: column by column, each making up for the errors of those before by the
    covariances of its input; needs calibration.statistics=covariance. `nearest`: each by itself."""


class ExportSection(Section):
    """How checkpoints are written."""

    format: Literal["seap", "stock", "gguf"] = "seap"
    """Format of the checkpoints. `seap`: every plan can be written; loading needs trust_remote_code, an import of
    seap_ray.models.hf, or vLLM with seap_ray installed. `stock`: an ordinary checkpoint of the model's family, which
    needs a plan that gives all layers the same shape. `gguf`: as `seap`, and beside it one file that llama.cpp loads as
    it is, and so Ollama and LM Studio; docs/families.md says which families it has for layers of different shapes."""
    gguf_type: GgufType = "Q8_0"
    """Type of the matrices in a GGUF file, of a format `gguf`. Norms and biases are F32; with four or five bits the
    embedding and the head have eight. K-quants are made of such a file by llama.cpp's own llama-quantize."""
    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?\s*[KMG]B$")
    """Largest weight file of a checkpoint, for example 5GB or 500MB."""
    quantization: QuantizationSection = QuantizationSection()

    @field_validator("quantization", mode="before")
    @classmethod
    def _scheme_alone(cls, value: Any) -> Any:
        return {"scheme": value} if isinstance(value, str) or value is None else value

    @model_validator(mode="after")
    def _is_quantised_once(self) -> "ExportSection":
        """Refuse a quantisation that the format has not, and a group where there are none."""
        scheme = self.quantization.scheme
        if scheme and self.format == "gguf":
            raise ValueError(
                "quantization: not for format gguf, whose matrices are of gguf_type; choose format seap or stock"
            )
        if scheme in ("w8a16", "w8a8") and self.quantization.group != "auto":
            raise ValueError(f"quantization.group: {scheme} has one scale for each output, and no groups")
        return self


class SpeedSection(Section):
    """How generation speed is measured: every model in turn, so leave the machine to it alone."""

    rounds: int = Field(default=3, ge=0)
    """How many times every model is measured, in turn; the median counts. 0 measures no speed."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences that are generated at a time."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens that are generated after each prompt."""


class EvaluationSection(Section):
    """How models are evaluated."""

    samples: AtLeastZero | None = 200
    """Evaluation rows (or windows of text) per task and model, drawn at random. null uses all of them, 0 evaluates
    nothing."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Most tokens of one forward pass."""
    window: int | None = Field(default=None, ge=2)
    """Tokens of each window of the metric window_perplexity; null: corpus.sequence_length."""
    num_fewshot: int | None = Field(default=0, ge=0)
    """Solved examples before each question of a task that lm-eval judges; null: as many as lm-eval sets for it."""
    cells: str | None = None
    """Folder, or one in a bucket, that keeps each model's result on each task and may be shared by runs or carried to
    another machine: what it has is not judged again. null: `cells` in the run's folder."""
    agreement: AtLeastZero = 64
    """Held-out prompts of each task that its expert answers, to see how many of its tokens the dense and the general
    model would have chosen, too: what the service holds it to (serve.guard). 0: not measured."""
    speed: SpeedSection = SpeedSection()
    models: dict[FolderName, str] = {}
    """Other checkpoints that seap-ray eval compares with: {NAME: FOLDER}. They must have the tokenizer of
    model.source."""


class RouterSection(Section):
    """When the router trusts itself."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    """Least probability of a task at which its expert answers a request for `auto`; below it the general model answers.
    null: the value fitted on held-out prompts."""
    rule: Literal["threshold", "expected_quality"] = "threshold"
    """When the likeliest task's expert answers. `threshold`: where its probability is high enough. `expected_quality`:
    where it is expected to keep at least as much of the dense model's quality as the general model, by what the job has
    measured of both on every task."""


class GuardSection(Section):
    """Checks of experts while they serve, by a reference model, which answers for those that fail."""

    share: Share = 0.01
    """Share of the requests to experts that are judged, after the client has its reply; 0: none."""
    reference: Literal["auto", "dense", "general"] = "auto"
    """Model that judges, and answers for a demoted expert; `dense` needs serve.dense. `auto`: `dense` where it is
    served, else `general`."""
    floor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Mean share of an expert's tokens that have to be the reference's likeliest, below which it is demoted; null: what
    the job has measured on the task's held-out prompts, less two standard errors and `margin`."""
    margin: float = Field(default=0.05, gt=0, lt=1)
    """How far the floor is below what was surely measured: how much worse an expert may be on its clients' prompts."""
    error_probability: float = Field(default=0.001, gt=0, lt=1)
    """Probability that an expert at its floor is ever demoted, however long it serves; a smaller one needs more
    replies. The same holds for a demoted one that comes back."""
    operator_keys_file: str | None = None
    """File with one API key a line, whose holders may demote experts and bring them back (`POST /v1/guard`); all other
    keys then get status 403 there. null: every API key may."""


class DraftSection(Section):
    """Speculative decoding: a pruned model drafts, and the dense one answers."""

    model: str = GENERAL
    """Model that drafts in mode `speculative`: `general`, or a task, whose expert drafts best for that task's prompts.
    One for all requests, since vLLM cannot change it by request."""
    tokens: int = Field(default=4, ge=1)
    """Tokens that it drafts before the dense model checks them in one pass."""


class PackSection(Section):
    """Shared engines: several models in one vLLM engine, which holds one of them at a time."""

    max_wait_s: float = Field(default=2.0, ge=0)
    """Seconds that a request waits for its model before the shared engine may swap the present one out for it."""
    time_slice_s: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Least seconds that a model stays in the shared engine while requests wait for others; `auto`: five times as long
    as a swap takes."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Weights of models in the choice of the next one: {NAME: WEIGHT}, NAME a task or `general`. Waiting for a model of
    weight 2 counts twice; others have 1."""


class ServeSection(Section):
    """The service. No file of a run depends on it."""

    ratio: Ratio | None = None
    """Pruning ratio of the models to serve; null: the smallest ratio that the run holds."""
    experts: tuple[str, ...] | None = None
    """Tasks whose experts are served, beside the general model; null: all. Prompts of other tasks go to the general
    model."""
    mode: Literal["experts", "speculative"] = "experts"
    """Who answers. `experts`: the expert of the prompt's task. `speculative`: the dense model, with greedy tokens that
    are its own, and a pruned model drafts them: nothing is lost. No expert then answers by itself."""
    draft: DraftSection = DraftSection()
    packing: Literal["auto", "shared", "separate"] = "auto"
    """How models share engines. `separate`: an engine for each model. `shared`: one shared engine for all, which must
    have equal shapes. `auto`: shared where shapes are equal and there are more models than accelerators."""
    dense: bool = False
    """Whether the dense model is served as well, under the name `dense`, by an engine of its own."""
    pack: PackSection = PackSection()
    router: RouterSection = RouterSection()
    guard: GuardSection = GuardSection()
    tools: str | None = None
    """How models call tools: the name of vLLM's parser of the calls that they write, such as `hermes`, or `auto` for
    the one that their chat template tells. null: a request with tools that asks for calls gets status 400."""
    fallback: Literal["all", "auto"] = "all"
    """Which requests the general model answers while an expert is down: `all`, or only those for model `auto`; the
    others then get status 503."""
    host: str = "127.0.0.1"
    """Address on which seap-ray deploy listens; 0.0.0.0 is every address of the machine. `serve run` and `serve deploy`
    have a setting of their own."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port on which seap-ray deploy listens."""
    auth: Literal["keys", "none"] = "keys"
    """Who is answered. `keys`: requests with one of the API keys. `none`: every request, which is allowed only where
    `host` is an address of this machine alone."""
    api_keys_file: str | None = None
    """File with one API key a line; null: keys are taken from the environment variable SEAP_API_KEYS, separated by
    commas."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What engines run on; `auto`: what the installed build of vLLM is made for."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs that each rank (process) of an engine reserves; on device `cpu` also its threads, rounded up."""
    num_gpus: float = Field(default=1, gt=0, le=1)
    """GPUs that each rank of an engine reserves. A part such as 0.5 lets engines share a GPU; then set
    serve.engine.gpu_memory_utilization to no more than that part."""
    ingress_replicas: int = Field(default=1, ge=1)
    """Processes that take requests and route them."""
    min_replicas: int = Field(default=1, ge=1)
    """Engines of each model while there is little to do."""
    max_replicas: int = Field(default=1, ge=1)
    """Most engines of each model under load."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one engine works on at a time."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests that may wait for a model in each ingress process; further ones get status 429."""
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    """Largest request body in bytes; larger ones get status 413."""
    max_sequences: int = Field(default=16, ge=1)
    """Most sequences that one request may ask for: its prompts times `n`."""
    timeout_s: float = Field(default=600, gt=0)
    """Most seconds until the first token of a streamed reply, or until the whole of another one."""
    drain_timeout_s: float = Field(default=120, ge=0)
    """Seconds that a model has to finish its requests when it is taken down."""
    engine: dict[str, Any] = {}
    """Arguments for vLLM's engines: {max_model_len: 4096, tensor_parallel_size: 2, gpu_memory_utilization: 0.3, ...}.
    The model, the tokenizer, and arguments that would let foreign code in are refused."""

    @model_validator(mode="after")
    def _is_safe(self) -> "ServeSection":
        # Without keys whoever reaches the port could use the GPUs.
        if self.auth == "none" and self.host not in LOOPBACK:
            raise ValueError(f"auth=none is for the hosts {', '.join(LOOPBACK)} only, not {self.host}")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        if self.guard.operator_keys_file and self.auth == "none":
            raise ValueError("guard.operator_keys_file needs auth=keys: without keys nobody can be told from others")
        if self.guard.reference == "dense" and not self.dense:
            raise ValueError("guard.reference=dense needs dense=true, so that the dense model is served")
        if refused := sorted({*NOT_FOR_ENGINES} & {*self.engine}):
            raise ValueError(f"engine.{refused[0]} {NOT_FOR_ENGINES[refused[0]]}")
        return self


class BenchmarksSection(Section):
    """What seap-ray bench measures; no other command reads it."""

    rounds: int = Field(default=5, ge=1)
    """How many times everything is measured, in turns; the median counts."""
    shape: Literal["7b", "70b"] = "7b"
    """Size of the Llama whose shapes the records, plans and checkpoints have."""
    records: int = Field(default=200, ge=1)
    """Number of records that the suite `merge` merges."""
    official: str | None = None
    """Folder with a checkout of the SEAP authors' code, github.com/IAAR-Shanghai/SEAP, to compare the calibration with;
    null: no comparison."""
    batch: int = Field(default=1, ge=1)
    """Sequences that the suite `widths` generates at a time."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each of its prompts."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens that it generates after each prompt."""
    clock: Literal["wall", "cpu"] = "wall"
    """What its seconds are: `wall`, or `cpu`, those that the engine's threads compute. For an engine of one thread on a
    CPU both are the same, but for what other jobs on the machine take from it."""
    table: str = "widths.json"
    """File that it writes its times to, for pruning.target.latency.table."""
    folder: str = "docs/benchmarks"
    """Folder that the numbers are written to, a file for each suite; the page is <folder>.md."""


class Config(Section):
    """The whole configuration of a run."""

    study: StudyName = "table"
    """The study that seap-ray eval makes (docs/evaluation.md). On the command line it also sets the keys that the study
    needs, unless they are given there too."""
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    tasks: tuple[Task, ...] = Field(
        default=tuple(BUILT_IN[t] for t in ("arithmetic", "reverse", "sort", "logic", "facts", "prose")),
        min_length=1,
    )
    """Tasks, each with a corpus and an expert of its own: a list of names of built-in tasks, and of mappings for your
    own tasks (their keys are below)."""
    corpus: CorpusSection = CorpusSection()
    calibration: CalibrationSection = CalibrationSection()
    pruning: PruningSection = PruningSection()
    export: ExportSection = ExportSection()
    evaluation: EvaluationSection = EvaluationSection()
    serve: ServeSection = ServeSection()
    benchmarks: BenchmarksSection = BenchmarksSection()

    @model_validator(mode="before")
    @classmethod
    def _complete_tasks(cls, values: Any) -> Any:
        # Before the fields are validated, since a name alone is no task yet; a value of another type they refuse.
        if isinstance(values, dict) and isinstance(values.get("tasks"), list):
            return {**values, "tasks": [complete(task) for task in values["tasks"]]}
        return values

    @model_validator(mode="after")
    def _names_are_known_and_single(self) -> "Config":
        """Refuse a task or model name that is used twice, and a baseline's task that is not there."""
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {max(names, key=names.count)} is named twice")

        # Each model has a folder under its name in the run, so no two may have the same.
        for name in {*names} & {*RESERVED}:
            raise ValueError(f"tasks: {name} is a name that every run uses itself")

        taken = {*names, *RESERVED}
        for name, baseline in self.pruning.baselines.items():
            if name in taken:
                raise ValueError(f"pruning.baselines: {name} is the name of another model of this run")
            # The advice is for who changes the tasks of the demo's file, whose baseline names one of them.
            for task in baseline.tasks or ():
                if task not in names:
                    raise ValueError(f"pruning.baselines.{name}.tasks: {_task_is_missing(task, names)}")

        for name in {*self.evaluation.models} & {*taken, *self.pruning.baselines}:
            raise ValueError(f"evaluation.models: {name} is the name of another model of this run")

        return self

    @model_validator(mode="after")
    def _chats_are_possible(self) -> "Config":
        """Refuse a chat template for what has no conversation."""
        if self.corpus.chat != "always":
            return self
        if self.corpus.prompt_format == "official":
            raise ValueError("corpus.chat: always is not for prompt_format official, whose texts are the authors'")

        for task in self.tasks:
            if task.has_templates and not task.has_prompt and not task.chat:
                raise ValueError(
                    f"corpus.chat: always is not for mere texts such as those of {task.name}; give the task a question "
                    "or messages, or set its chat to never"
                )
        return self

    @model_validator(mode="after")
    def _covariances_are_there(self) -> "Config":
        """Refuse plans whose covariances are not recorded, and those that rank columns by scores of whole units."""
        for name, plan in self._plans().items():
            # What a plan leaves out comes from the pruning section, so only the completed settings can be checked.
            settings = self.plan_settings(plan)
            needs = [value for value in (settings.score, settings.compensation) if value in FROM_COVARIANCES]
            if needs and self.calibration.statistics != "covariance":
                raise ValueError(
                    f"pruning.{name}: {needs[0]} needs calibration.statistics=covariance (with moments: "
                    "pruning.score=wifv pruning.compensation=mean)"
                )

            if settings.allocation == "standardised" and settings.score in FROM_COVARIANCES:
                raise ValueError(
                    f"pruning.{name}: allocation standardised ranks single columns, and {settings.score} scores whole "
                    "units; choose global"
                )

        return self

    @model_validator(mode="after")
    def _experts_go_alone(self) -> "Config":
        """Refuse settings that have no meaning where whole MoE experts go, and what cannot hold such a plan."""
        for name, plan in self._plans().items():
            settings = self.plan_settings(plan)
            if settings.mlp_unit == "channel":
                if settings.score == "reap":
                    raise ValueError(
                        f"pruning.{name}: reap scores whole experts; set mlp_unit=expert, or another score"
                    )
                continue
            reason = _why_no_experts(settings)
            if self.export.format == "gguf":
                reason = "export.format gguf is not written of it; choose stock, which llama.cpp's own script converts"
            elif self.export.quantization.scheme:
                reason = "export.quantization is not for it; quantise a stock checkpoint"
            if reason:
                raise ValueError(f"pruning.{name}: mlp_unit expert removes whole experts alone, so {reason}")
        return self

    @model_validator(mode="after")
    def _inputs_are_there(self) -> "Config":
        """Refuse a quantisation whose covariances are not recorded, and targets that count no quantised weights."""
        quantization = self.export.quantization
        if self.calibration.input_covariances is True and self.calibration.statistics != "covariance":
            raise ValueError("calibration.input_covariances: needs calibration.statistics=covariance")
        if quantization.scheme and quantization.rounding == "gptq":
            if self.calibration.statistics != "covariance":
                raise ValueError(
                    "export.quantization: gptq rounds by covariances, which calibration.statistics=covariance records; "
                    "or set export.quantization.rounding=nearest"
                )
            if self.calibration.input_covariances is False:
                raise ValueError(
                    "export.quantization: gptq rounds by the covariances of all inputs; leave "
                    "calibration.input_covariances at auto, or set export.quantization.rounding=nearest"
                )
        bytes_targets = {"weights", "memory"} & {*self.pruning.target.kinds}
        if quantization.scheme and bytes_targets:
            raise ValueError(
                f"pruning.target.{bytes_targets.pop()}: counts weights as the model has them, not as "
                "export.quantization stores them; choose a ratio or target parameters"
            )
        return self

    @property
    def records_inputs(self) -> bool:
        """Whether the calibration records the covariances of all inputs of a layer."""
        setting = self.calibration.input_covariances
        if setting != "auto":
            return setting
        quantization = self.export.quantization
        return quantization.scheme is not None and quantization.rounding == "gptq"

    @model_validator(mode="after")
    def _biases_are_allowed(self) -> "Config":
        """Refuse plans without biases whose compensation is nothing else."""
        for name, plan in self._plans().items():
            settings = self.plan_settings(plan)
            if settings.compensation == "mean" and not settings.bias and not settings.cuts_no_module:
                raise ValueError(
                    f"pruning.{name}: compensation mean is a bias, and bias is false; choose least_squares (with "
                    "calibration.statistics=covariance) or none"
                )
        return self

    def _plans(self) -> dict[str, PlanSettings]:
        """Return the settings of every kind of model, by what follows ``pruning`` in their keys."""
        plans: dict[str, PlanSettings] = {"experts": self.pruning.experts, "general": self.pruning.general}
        for name, baseline in self.pruning.baselines.items():
            plans[f"baselines.{name}"] = baseline
        return plans

    def plan_settings(self, plan: PlanSettings) -> PlanSettings:
        """Return ``plan`` with what it leaves out taken from the pruning section.

        The mean of many tasks is no task's mean, so the general model has no compensation by means unless ``plan``
        says so; where nothing is compensated, its score is ``energy``, the error that a cut then leaves.
        """
        score = self.pruning.score
        compensation = self.pruning.compensation
        mlp_unit = plan.mlp_unit or self.pruning.mlp_unit

        if isinstance(plan, GeneralSettings) and mlp_unit == "channel":
            compensation = plan.compensation or ("none" if compensation == "mean" else compensation)
            score = "energy" if compensation == "none" else score

        return PlanSettings(
            score=plan.score or score,
            allocation=plan.allocation or self.pruning.allocation.kind,
            compensation=plan.compensation or compensation,
            # ``auto`` is true wherever the checkpoint's format has not decided otherwise.
            bias=self.pruning.bias is not False if plan.bias is None else plan.bias,
            attention_unit=plan.attention_unit or self.pruning.attention_unit,
            mlp_unit=mlp_unit,
            budget=plan.budget or self.pruning.budget,
            # Numbers may be 0, so ``or`` would not do.
            error_correction=(
                self.pruning.error_correction if plan.error_correction is None else plan.error_correction
            ),
            k=self.pruning.allocation.k if plan.k is None else plan.k,
            x0=self.pruning.allocation.x0 if plan.x0 is None else plan.x0,
            seed=self.run.seed if plan.seed is None else plan.seed,
        )


def _why_no_experts(settings: PlanSettings) -> str | None:
    """Return which of a model's settings does not go with whole MoE experts that are removed; None where all do."""
    if settings.allocation not in ("auto", "uniform"):
        return f"allocation {settings.allocation} is not for it; choose uniform"
    if settings.attention_unit not in ("auto", "none"):
        return f"attention_unit {settings.attention_unit} is not for it; choose none"
    if settings.budget == "official":
        return "budget official is not for it; choose exact"
    if settings.score in FROM_COVARIANCES:
        return f"score {settings.score}, which compares channels, is not for it; choose reap or energy"
    return None


def _task_is_missing(task: str, names: Sequence[str]) -> str:
    """Return what is wrong with a baseline's task that is not among the config's, and what would be right."""
    # A misspelt name is very similar to the right one. A task that was left out is similar to none.
    near = difflib.get_close_matches(task, names, n=1, cutoff=0.75)
    advice = f"did you mean {near[0]}?" if near else "add it there, or set pruning.baselines={} for no baselines"
    return f"{task} is not among tasks ({', '.join(names)}); {advice}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the end of an error message about an unknown word: the most similar known one, or else all of them."""
    # 0.4 is below difflib's default of 0.6: a poor guess helps more than a list of all keys.
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key below ``section`` with its pydantic field, a section's own keys before its subsections."""
    sections: list[tuple[str, type[Section]]] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            sections.append((name, inner))
        else:
            yield f"{prefix}{name}", field

    # Last, since help has a heading for each: a key behind one would seem to belong to it.
    for name, inner in sections:
        yield from walk(inner, f"{prefix}{name}.")
