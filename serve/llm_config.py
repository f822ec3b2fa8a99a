"""LLM config: a pack in, what ``ray.serve.llm`` is to do with it out."""

import math
from typing import Any

import ray
from ray.serve.llm import LLMConfig

from seap_ray.config import Config
from seap_ray.storage.files import read_json, stage
from seap_ray.vllm_plugin.plugin import END_WITH_PARENT, LOAD_FORMAT
from serve.engine import FOLDER, HEALTH_CHECK_S, ExpertServer
from serve.experts import Expert
from serve.pack_server import PACK, PackServer
from serve.packs import Pack, is_cpu

CPU_KV_CACHE_BYTES = 1 << 30
"""Most that an engine on a CPU takes for its cache where serve.engine does not say; vLLM would take all memory."""


def llm_config(config: Config, pack: Pack) -> LLMConfig:
    """How ``ray.serve.llm`` is to run an engine. Every limit is set: its own defaults are a thousand million."""
    serve, expert, on_cpu, is_shared = config.serve, pack.experts[0], is_cpu(config), len(pack.experts) > 1
    engine: dict[str, Any] = {"dtype": config.model.dtype}
    at_a_time, queued = serve.max_ongoing_requests, serve.max_queued_requests
    if is_shared:
        engine |= {"load_format": LOAD_FORMAT, "enable_prefix_caching": True}
        queued *= len(pack.experts)
        at_a_time += queued + 100  # all wait in the server, by expert; the hundred ask how it stands
    if on_cpu:
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(config, expert)}
    return LLMConfig(
        model_loading_config={"model_id": pack.name, "model_source": str(stage(expert.folder))},
        experimental_configs={FOLDER: str(expert.folder)} | ({PACK: _about(config, pack)} if is_shared else {}),
        accelerator_config={"kind": "cpu" if on_cpu else "gpu"},
        placement_group_config={
            "bundle_per_worker": {"CPU": serve.num_cpus} | ({} if on_cpu else {"GPU": serve.num_gpus})
        },
        engine_kwargs=engine | serve.engine,
        runtime_env={"env_vars": _environment(config)},
        server_cls=PackServer if is_shared else ExpertServer,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": serve.min_replicas,
                "max_replicas": serve.max_replicas,
                "target_ongoing_requests": max(1, serve.max_ongoing_requests * 0.7),
            },
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": at_a_time,
            "max_queued_requests": queued,
            "health_check_period_s": HEALTH_CHECK_S,
            "health_check_timeout_s": 30,
            "graceful_shutdown_wait_loop_s": 1,
            "graceful_shutdown_timeout_s": serve.drain_timeout_s,
        },
    )


def _about(config: Config, pack: Pack) -> dict[str, Any]:
    """What a pack's server is told."""
    serve = config.serve
    return {
        "folders": {expert.name: str(expert.folder) for expert in pack.experts},
        "time_slice_s": serve.pack.time_slice_s,
        "limits": {
            "running": serve.max_ongoing_requests,
            "waiting": serve.max_queued_requests,
            "max_wait_s": serve.pack.max_wait_s,
            "weights": serve.pack.weights,
        },
    }


def _kv_cache_bytes(config: Config, expert: Expert) -> int:
    """Room for every request at its longest, up to the limit; twice, since a cache may be of a wider type."""
    longest = (
        config.serve.engine.get("max_model_len") or read_json(expert.folder / "config.json")["max_position_embeddings"]
    )
    needed = 2 * config.serve.max_ongoing_requests * longest * expert.kv_bytes_per_token
    return min(CPU_KV_CACHE_BYTES, needed)


def _environment(config: Config) -> dict[str, str]:
    """Ray replaces the job's variables by a deployment's, so they are repeated."""
    job = ray.get_runtime_context().runtime_env.get("env_vars") or {} if ray.is_initialized() else {}
    if not is_cpu(config):
        # The older runner shares attention metadata between layers with other numbers of query heads.
        return {**job, END_WITH_PARENT: "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    threads = str(math.ceil(config.serve.num_cpus))
    return {**job, END_WITH_PARENT: "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
