"""Schema: every key of the configuration, with its type, default and meaning, as one frozen ``Config``."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from seap_ray.methods import METHODS, StudyName
from seap_ray.tasks import BUILT_IN, Section, Task, complete

Score = Literal["wifv", "wifn", "wanda_sp", "energy", "official_wifn", "magnitude", "random", "block_wifv", "obs"]
FROM_COVARIANCES = ("block_wifv", "obs", "least_squares")
"""Scores and compensations that need ``calibration.statistics=covariance``."""
Placement = Literal["auto", "single", "device_map", "stream"]
Allocation = Literal["uniform", "logistic", "global", "standardised", "depth"]
Budget = Literal["exact", "official"]
Compensation = Literal["none", "mean", "least_squares"]
Pooling = Literal["pooled", "score_average"]
Ratio = Annotated[float, Field(ge=0, lt=1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
AtLeastZero = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
GENERAL, AUTO = "general", "auto"
"""Names of the one model for all tasks, and, in a request, of whichever the router chooses."""
RESERVED = (GENERAL, "dense", AUTO, "weight_norms")
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


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class RunSection(Section):
    name: FolderName = "demo"
    """Name of the run; its files lie in <storage>/<name>."""
    storage: str = "runs"
    """Folder that holds runs, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. On several nodes: one that every node sees
    under this path. A relative one is below the current folder, or in a job submitted with --working-dir, which Ray
    runs in a copy, below the home folder."""
    seed: int = 0
    """Seed of everything drawn at random."""


class ModelSection(Section):
    source: str = "demo"
    """`demo`, a folder with safetensors, one in a bucket (s3://..., gs://...), or a hub id such as
    meta-llama/Llama-3.1-8B. Of a bucket and of the hub every node makes a copy of its own, once."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the model computes in; `auto` is the checkpoint's own."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run. Off unless you have read it."""


class CorpusSection(Section):
    samples: int = Field(default=200, ge=1)
    """Rows drawn per task, at random over the whole corpus."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Token budget per task; the draw ends with the row that reaches it."""
    sequence_length: int = Field(default=2048, ge=2)
    """Longest sequence, in tokens; longer texts are cut (never beyond what the model was made for)."""
    packing: Literal["bucket", "pack"] = "bucket"
    """`bucket`: a text is a sequence, and sees no other. `pack`: texts are joined to full sequences."""
    prompt_format: Literal["clean", "official"] = "clean"
    """`official` reproduces the texts of the SEAP authors' code, lower-casing included."""
    shard_sequences: int = Field(default=64, ge=1)
    """Rows per shard. A shard is the unit of work, and all that a fault can cost."""


class CalibrationSection(Section):
    workers: AtLeastOne | Literal["auto"] = "auto"
    """Model replicas; `auto`: as many as the cluster holds and the shards occupy."""
    num_cpus: int = Field(default=1, ge=1)
    """CPUs, and so threads, per worker."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per worker; several are for placement `device_map`."""
    placement: Placement = "auto"
    """`single`: the model whole on a worker's device. `device_map`: whole, over a worker's GPUs. `stream`: one decoder
    layer at a time, read from disk, so any model fits. `auto`: the first of them that the workers have memory for."""
    stream_tokens: AtLeastOne = 262144
    """Tokens whose hidden states a worker keeps under `stream`: it reads the model once for so many."""
    statistics: Literal["moments", "covariance"] = "moments"
    """`covariance`: all pairs of columns, too, for compensation least_squares and the scores block_wifv and obs. Each
    shard and each task takes disk, 8.8 GB of a Llama-2-7B, so let shards be large; docs/method.md."""
    covariance_layers: AtLeastOne | Literal["auto"] = "auto"
    """Layers whose covariances a worker holds; so many at a time, the model runs over a shard again. `auto`: as many as
    its memory has room for."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per forward pass, padding included; halved where memory runs out, but not under `stream`."""
    skip_first_token: bool = False
    """Leave position 0, where many models put outsized activations, out of the statistics."""

    @model_validator(mode="after")
    def _gpus_are_used(self) -> "CalibrationSection":
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus={self.num_gpus:g}: more than one are a whole number")
        if self.num_gpus > 1 and self.placement in ("single", "stream"):
            raise ValueError(f"num_gpus={self.num_gpus:g}: placement {self.placement} works on one; choose device_map")
        return self


class AllocationSection(Section):
    """How much each layer gives."""

    kind: Allocation = "logistic"
    """`uniform`; `logistic` in depth, the paper's; `global`: by score per parameter over all layers; `standardised`:
    by standardised score over all layers, as FLAP has it; `depth`: whole layers go, those that change least."""
    k: float = Field(default=1.0, allow_inf_nan=False)
    """Steepness of the logistic curve."""
    x0: float = Field(default=0.3, allow_inf_nan=False)
    """Midpoint of the logistic curve, as a share of the depth."""
    protect_first: AtLeastZero | Literal["auto"] = "auto"
    """First layers left whole; `auto`: 2 (1 under 24 layers), fewer where the ratio cannot be met otherwise."""
    protect_last: AtLeastZero | Literal["auto"] = "auto"
    """Last layers left whole; `auto` as above."""
    max_sparsity: float = Field(default=0.9, gt=0, lt=1)
    """Largest share that one layer gives."""


class PlanSettings(Section):
    """Settings of one kind of plan; what is left out is taken from the pruning section."""

    score: Score | None = None
    """Score of heads and channels."""
    allocation: Allocation | None = None
    """Allocation of sparsity to layers."""
    compensation: Compensation | None = None
    """What stands for the columns that are cut."""
    budget: Budget | None = None
    """Whether the ratio is met exactly, or as the authors' schedule does."""
    k: float | None = Field(default=None, allow_inf_nan=False)
    """Steepness of the logistic curve."""
    x0: float | None = Field(default=None, allow_inf_nan=False)
    """Midpoint of the logistic curve, as a share of the depth."""
    seed: int | None = None
    """Seed of the score `random`; left out: run.seed."""


class ExpertSettings(PlanSettings):
    """The model of each task."""

    mix: float = Field(default=0, ge=0, le=1)
    """Share of the statistics of all tasks in an expert's own: it forgets less of the others, and does less well."""


class GeneralSettings(PlanSettings):
    """The one model for all tasks."""

    score: Score | None = None
    """Score of heads and channels; left out: energy where nothing is compensated, or else as in pruning."""
    compensation: Compensation | None = None
    """What stands for the columns that are cut; left out: none where pruning has `mean`, or else as in pruning."""
    pooling: Pooling = "pooled"
    """`pooled`: statistics of all tasks, with what lies between them; `score_average`: the paper's sum of scores."""


class Baseline(PlanSettings):
    """A named plan to compare with."""

    tasks: tuple[str, ...] | None = None
    """Tasks whose statistics it uses; all of them if left out."""
    pooling: Pooling = "pooled"
    """As in general."""
    per_task: bool = False
    """One model for each task, from its statistics alone, instead of one for all."""


class PruningSection(Section):
    ratio: Annotated[tuple[Ratio, ...], BeforeValidator(_as_list), Field(min_length=1)] = (0.2, 0.5)
    """Share of the decoder layers' parameters to remove; one number or a list."""
    budget: Budget = "exact"
    """`exact` meets the ratio within a tile; `official` repeats the authors' schedule, which removes less."""
    score: Score = "wifv"
    """Score of heads and channels."""
    compensation: Compensation = "mean"
    """What stands for the columns that are cut: `mean`: their calibration mean, as a bias on o_proj and down_proj;
    `least_squares`: what the kept columns say of them, in the weight and the bias, from covariances."""
    ridge: Annotated[float, Field(ge=1e-5, le=100)] | Literal["auto"] = "auto"
    """Regularisation of least_squares and obs, relative to each column's variance; `auto`: chosen for every task, layer
    and site on the tokens of the task's last shard, which is held out for that."""
    allocation: AllocationSection = AllocationSection()
    attention_unit: Literal["group", "head", "none"] = "group"
    """`group`: key-value heads with their query heads; `head`: equally many query heads of each; `none`: MLP only."""
    align: AtLeastOne | Literal["auto"] = "auto"
    """Kept channels are a multiple of this; `auto`: 128, less for small models."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Tensor-parallel size that the experts must be servable with."""
    experts: ExpertSettings = ExpertSettings()
    general: GeneralSettings = GeneralSettings()
    baselines: dict[FolderName, Baseline] = {}
    """Plans to compare with at equal size: {NAME: {tasks, score, allocation, compensation, pooling, ...}}; what is left
    out is as in pruning. A built-in name stands for its authors' settings: {flap: {}}."""

    @field_validator("baselines", mode="before")
    @classmethod
    def _complete_baselines(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: {**METHODS.get(name, {}), **(own or {})} if isinstance(own, dict | None) else own
            for name, own in values.items()
        }

    @field_validator("ratio")
    @classmethod
    def _ratios_are_single(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) < len(ratios):
            raise ValueError(f"{max(ratios, key=ratios.count):g} is named twice")
        return ratios


class ExportSection(Section):
    format: Literal["seap", "stock"] = "seap"
    """`seap`: any plan; `stock`: an ordinary checkpoint of the family, where all layers are equal."""
    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?\s*[KMG]B$")
    """Largest weight file of a checkpoint."""


class SpeedSection(Section):
    """How speed is measured; every model in turn, on a machine that does nothing else."""

    rounds: int = Field(default=3, ge=0)
    """Times that every model is measured, in turn; the median counts. 0 leaves speed out."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences at a time."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens that are generated after it."""


class EvaluationSection(Section):
    samples: AtLeastZero | None = 200
    """Evaluation rows, or windows of text, per task and model, drawn at random; null: all. 0 leaves evaluation out."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per forward pass."""
    window: int | None = Field(default=None, ge=2)
    """Tokens per window of the metric window_perplexity; left out: corpus.sequence_length."""
    num_fewshot: int | None = Field(default=0, ge=0)
    """Examples before each question of a task that lm-eval judges; null: as lm-eval has it for the task."""
    speed: SpeedSection = SpeedSection()
    models: dict[FolderName, str] = {}
    """Other checkpoints to judge in jobs/eval.py: {NAME: FOLDER}, with the tokenizer of model.source."""


class RouterSection(Section):
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Least probability at which a task's expert answers; below it the general model does. Left out: as fitted."""


class PackSection(Section):
    """Experts that share an engine; one of them is in it at a time."""

    max_wait_s: float = Field(default=2.0, ge=0)
    """Seconds that a request waits before it may end the turn of the expert in the engine."""
    time_slice_s: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Least seconds of a turn while requests of other experts wait as well; `auto`: five times what a swap takes."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Of experts, or `general`, whose waiting counts for more, or less, than 1."""


class ServeSection(Section):
    """The service; what a job writes does not depend on it."""

    ratio: Ratio | None = None
    """Ratio of the models to serve; left out: the smallest of pruning.ratio."""
    experts: tuple[str, ...] | None = None
    """Tasks whose experts are served; left out: all. Prompts of other tasks go to the general model."""
    packing: Literal["auto", "shared", "separate"] = "auto"
    """`shared`: one engine for all models, which must have equal shapes; `separate`: one each; `auto`: shared where
    shapes allow it and models outnumber accelerators."""
    pack: PackSection = PackSection()
    router: RouterSection = RouterSection()
    fallback: Literal["all", "auto"] = "all"
    """While an expert is down the general model answers for it: `all` its requests, or only those with model `auto`."""
    host: str = "127.0.0.1"
    """Address that jobs/deploy.py listens on; `serve run` and `serve deploy` have their own setting."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that jobs/deploy.py listens on."""
    auth: Literal["keys", "none"] = "keys"
    """`keys`: a request needs one of the API keys. `none`: only clients on this machine are answered."""
    api_keys_file: str | None = None
    """File with an API key on each line; left out: the environment variable SEAP_API_KEYS, separated by commas."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: what the installed build of vLLM is for."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs that each rank of an engine reserves; with device `cpu` also its threads, rounded up."""
    num_gpus: float = Field(default=1, gt=0, le=1)
    """GPUs that each rank of an engine reserves; a part lets models share, engine.gpu_memory_utilization as small."""
    ingress_replicas: int = Field(default=1, ge=1)
    """Processes that take requests and route them."""
    min_replicas: int = Field(default=1, ge=1)
    """Engines per model."""
    max_replicas: int = Field(default=1, ge=1)
    """Engines per model under load."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that an engine works on at a time."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests that wait for a model, in each ingress; those beyond are answered 429."""
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    """Largest request body; larger ones are answered 413."""
    max_sequences: int = Field(default=16, ge=1)
    """Sequences that one request may ask for: its prompts times `n`."""
    timeout_s: float = Field(default=600, gt=0)
    """Seconds until the first token of a stream, or the whole of a reply that is none."""
    drain_timeout_s: float = Field(default=120, ge=0)
    """Seconds that a model which is taken down has to finish what it works on."""
    engine: dict[str, Any] = {}
    """Engine arguments of vLLM: {max_model_len: 4096, tensor_parallel_size: 2, gpu_memory_utilization: 0.3, ...}."""

    @model_validator(mode="after")
    def _is_safe(self) -> "ServeSection":
        if self.auth == "none" and self.host not in LOOPBACK:
            raise ValueError(f"auth=none is for host {LOOPBACK[0]} only, not {self.host}")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        if refused := sorted({*NOT_FOR_ENGINES} & {*self.engine}):
            raise ValueError(f"engine.{refused[0]} {NOT_FOR_ENGINES[refused[0]]}")
        return self


class BenchmarksSection(Section):
    """What jobs/bench.py measures; no other job looks at it."""

    rounds: int = Field(default=5, ge=1)
    """Times that everything is measured, in turns; the median counts."""
    shape: Literal["7b", "70b"] = "7b"
    """Llama that records, plans and checkpoints have the shape of."""
    records: int = Field(default=200, ge=1)
    """Records to merge."""
    official: str | None = None
    """A checkout of the SEAP authors' code, github.com/IAAR-Shanghai/SEAP, to calibrate beside; left out: not."""
    folder: str = "docs/benchmarks"
    """Folder of the numbers, a file a suite; the page is beside it."""


class Config(Section):
    """The whole configuration of a run."""

    study: StudyName = "table"
    """What jobs/eval.py measures; on the command line it also sets keys, as docs/evaluation.md says."""
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    tasks: tuple[Task, ...] = Field(
        default=tuple(BUILT_IN[t] for t in ("arithmetic", "reverse", "sort", "logic", "facts", "prose")),
        min_length=1,
    )
    """Built-in names, or tasks of your own: a list of names and mappings."""
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
        if isinstance(values, dict) and isinstance(values.get("tasks"), list):
            return {**values, "tasks": [complete(task) for task in values["tasks"]]}
        return values

    @model_validator(mode="after")
    def _names_are_known_and_single(self) -> "Config":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {max(names, key=names.count)} is named twice")
        for name in {*names} & {*RESERVED}:
            raise ValueError(f"tasks: {name} is a name that every run uses itself")
        taken = {*names, *RESERVED}
        for name, baseline in self.pruning.baselines.items():
            if name in taken:
                raise ValueError(f"pruning.baselines: {name} is the name of another model of this run")
            for task in baseline.tasks or ():
                if task not in names:
                    known = nearest(task, names)
                    raise ValueError(f"pruning.baselines.{name}.tasks: {task}{known} (pruning.baselines={{}}: none)")
        for name in {*self.evaluation.models} & {*taken, *self.pruning.baselines}:
            raise ValueError(f"evaluation.models: {name} is the name of another model of this run")
        return self

    @model_validator(mode="after")
    def _covariances_are_there(self) -> "Config":
        """Plans that need covariances ask for them, and those that rank columns one by one have scores of columns."""
        plans: dict[str, PlanSettings] = {"experts": self.pruning.experts, "general": self.pruning.general}
        for name, of in {**plans, **{f"baselines.{name}": of for name, of in self.pruning.baselines.items()}}.items():
            settings = self.plan_settings(of)
            needs = [value for value in (settings.score, settings.compensation) if value in FROM_COVARIANCES]
            if needs and self.calibration.statistics != "covariance":
                raise ValueError(f"pruning.{name}: {needs[0]} needs calibration.statistics=covariance")
            if settings.allocation == "standardised" and settings.score in FROM_COVARIANCES:
                raise ValueError(
                    f"pruning.{name}: allocation standardised ranks single columns, and {settings.score} scores whole "
                    "units; choose global"
                )
        return self

    def plan_settings(self, of: PlanSettings) -> PlanSettings:
        """Fill what ``of`` leaves out from the pruning section.

        The mean of many tasks is no task's mean, so the general model has none unless it is told to.
        """
        score, compensation = self.pruning.score, self.pruning.compensation
        if isinstance(of, GeneralSettings):
            compensation = of.compensation or ("none" if compensation == "mean" else compensation)
            score = "energy" if compensation == "none" else score
        return PlanSettings(
            score=of.score or score,
            allocation=of.allocation or self.pruning.allocation.kind,
            compensation=of.compensation or compensation,
            budget=of.budget or self.pruning.budget,
            k=self.pruning.allocation.k if of.k is None else of.k,
            x0=self.pruning.allocation.x0 if of.x0 is None else of.x0,
            seed=self.run.seed if of.seed is None else of.seed,
        )


def nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key below ``section`` with its pydantic field."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
