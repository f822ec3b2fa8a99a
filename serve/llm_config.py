"""LLM config: settings of an engine for ``ray.serve.llm``, from the service's config."""

import math
from typing import Any

import ray
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig

from seap_ray.config import Config
from seap_ray.models.multimodal import language_config
from seap_ray.storage.files import read_json, stage
from seap_ray.vllm_plugin.plugin import END_WITH_PARENT, LOAD_FORMAT
from serve.engine import FOLDER, HEALTH_CHECK_S, ExpertServer
from serve.engines import EngineGroup, is_cpu
from serve.experts import Expert
from serve.shared_engine import SHARED_ENGINE, SharedEngineServer
from serve.tools import tool_parser

CPU_KV_CACHE_BYTES = 1 << 30
"""Largest key-value cache of an engine on a CPU, where serve.engine sets none. vLLM would take all memory."""
STATUS_REQUESTS = 100
"""Requests for its state that a shared engine may answer at a time, beside those for replies."""
SILENCE_S = 30
"""Seconds for which a server may answer no health check; after three such silences Serve ends it."""
SHARED_SILENCE_S = 600
"""The same for a shared engine's server: it answers nobody while it starts its engine again, minutes for 70B."""


def llm_config(config: Config, group: EngineGroup) -> LLMConfig:
    """Return how ``ray.serve.llm`` runs an engine. Every limit is set: Ray's own default is 10^9 requests."""
    expert = group.experts[0]
    # The classes that it is made into are not public.
    accelerator: Any = {"kind": "cpu" if is_cpu(config) else "gpu"}
    return LLMConfig(
        model_loading_config={"model_id": group.name, "model_source": str(stage(expert.folder))},
        experimental_configs=_experimental_configs(config, group),
        accelerator_config=accelerator,
        placement_group_config={"bundle_per_worker": _resources(config)},
        engine_kwargs=_engine_arguments(config, group),
        runtime_env={"env_vars": _environment(config)},
        server_cls=SharedEngineServer if group.is_shared else ExpertServer,
        deployment_config=_deployment_config(config, group),
    )


def _experimental_configs(config: Config, group: EngineGroup) -> dict[str, Any]:
    """Return what the server of an engine reads at its start; ``ray.serve.llm`` hands it on."""
    configs: dict[str, Any] = {FOLDER: str(group.experts[0].folder)}
    if group.is_shared:
        configs[SHARED_ENGINE] = _sharing(config, group)
    return configs


def _sharing(config: Config, group: EngineGroup) -> dict[str, Any]:
    """Return the folders, the limits and the time slice of a shared engine."""
    serve = config.serve
    return {
        "folders": {expert.name: str(expert.folder) for expert in group.experts},
        "time_slice_s": serve.pack.time_slice_s,
        "limits": {
            "running": serve.max_ongoing_requests,
            "waiting": serve.max_queued_requests,
            "max_wait_s": serve.pack.max_wait_s,
            "weights": serve.pack.weights,
        },
    }


def _resources(config: Config) -> dict[str, float]:
    """Return what each rank of an engine reserves."""
    resources = {"CPU": config.serve.num_cpus}
    if not is_cpu(config):
        resources["GPU"] = config.serve.num_gpus
    return resources


def _engine_arguments(config: Config, group: EngineGroup) -> dict[str, Any]:
    """Return vLLM's engine arguments; those of ``serve.engine`` come last and so take precedence."""
    arguments: dict[str, Any] = {"dtype": config.model.dtype}
    if group.is_shared:
        # The loader can put another expert's files in later; cached prefixes outlive a swap by each expert's salt.
        arguments |= {"load_format": LOAD_FORMAT, "enable_prefix_caching": True}

    if is_cpu(config):
        # Without compilation, which every start of an engine would wait for.
        cache_bytes = _kv_cache_bytes(config, group.experts[0])
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": cache_bytes}

    if draft := group.experts[0].draft:
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": str(stage(draft)),
            "num_speculative_tokens": config.serve.draft.tokens,
        }
    if parser := tool_parser(config, stage(group.experts[0].folder)):
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": parser}
    return arguments | config.serve.engine


def _kv_cache_bytes(config: Config, expert: Expert) -> int:
    """Return room for every request at its longest, up to ``CPU_KV_CACHE_BYTES``."""
    # Without a limit of its own a model takes requests as long as its context.
    longest = config.serve.engine.get("max_model_len")
    if not longest:
        longest = language_config(read_json(expert.folder / "config.json"))["max_position_embeddings"]

    # Twice, since the cache may be of a wider type than the checkpoint.
    needed = 2 * config.serve.max_ongoing_requests * longest * expert.kv_bytes_per_token
    return min(CPU_KV_CACHE_BYTES, needed)


def _deployment_config(config: Config, group: EngineGroup) -> dict[str, Any]:
    """Return Ray Serve's settings of an engine's deployment."""
    serve = config.serve
    ongoing = serve.max_ongoing_requests
    queued = serve.max_queued_requests
    if group.is_shared:
        # All requests wait inside the server, by expert, and not in Serve's queue.
        queued *= len(group.experts)
        ongoing += queued + STATUS_REQUESTS

    return {
        **({"request_router_config": _replica_router(config, group)} if group.is_shared else {}),
        "autoscaling_config": {
            "min_replicas": serve.min_replicas,
            "max_replicas": serve.max_replicas,
            # Below the most, so that another engine is started before requests have to wait.
            "target_ongoing_requests": max(1, serve.max_ongoing_requests * 0.7),
        },
        # The server only hands on; what computes is reserved by the ranks (``_resources``).
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": ongoing,
        "max_queued_requests": queued,
        "health_check_period_s": HEALTH_CHECK_S,
        "health_check_timeout_s": SHARED_SILENCE_S if group.is_shared else SILENCE_S,
        "graceful_shutdown_wait_loop_s": 1,
        "graceful_shutdown_timeout_s": serve.drain_timeout_s,
    }


def _replica_router(config: Config, group: EngineGroup) -> RequestRouterConfig:
    """Return how Serve chooses a replica of a shared engine."""
    # Requests are worth a swap elsewhere where an engine has as many more as it runs at a time.
    settings = {"experts": [expert.name for expert in group.experts], "spill": config.serve.max_ongoing_requests}
    router: Any = "serve.replicas.ExpertReplicaRouter"
    return RequestRouterConfig(request_router_class=router, request_router_kwargs=settings)


def _environment(config: Config) -> dict[str, str]:
    """Return an engine's environment variables, with the job's: Ray replaces those by a deployment's own."""
    variables: dict[str, str] = {}
    if ray.is_initialized():
        variables |= ray.get_runtime_context().runtime_env.get("env_vars") or {}

    # vLLM's processes would outlive a replica that is killed, and hold its memory.
    variables[END_WITH_PARENT] = "1"
    if is_cpu(config):
        # The engines share the machine's cores: none binds its threads to some of them, and each has as many threads
        # as it reserves CPUs.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        variables["OMP_NUM_THREADS"] = str(math.ceil(config.serve.num_cpus))
    else:
        # The older runner shares attention metadata between layers with unequal numbers of query heads.
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"

    return variables
