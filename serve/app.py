"""App: a run directory in, a Ray Serve application out.

    serve run serve.app:build run.name=demo
    serve deploy serve.app:build run.name=demo

Arguments are those of every entry point: config=ray_config.yaml and dotted.key=value.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from seap_ray.vllm_plugin import check_registered

check_registered()  # before the imports that need vLLM and would end in a traceback without it

from ray.serve.llm import build_llm_deployment  # noqa: E402

from seap_ray.config import Config  # noqa: E402
from seap_ray.errors import SeapError  # noqa: E402
from seap_ray.router import Router  # noqa: E402
from seap_ray.run import Run  # noqa: E402
from serve.experts import Expert, find, llm_config  # noqa: E402
from serve.gate import key_hashes  # noqa: E402
from serve.ingress import Service, make_ingress  # noqa: E402


def build(args: Mapping[str, Any]) -> Application:
    """What ``serve run`` and ``serve deploy`` call."""
    try:
        config = Config.load([f"{key}={value}" for key, value in _flat(args)])
        service = prepare(config)
    except SeapError as error:
        if ray.is_initialized():  # inside the cluster, for `serve deploy`: `serve status` shows the error
            raise
        raise SystemExit(f"error: {error}") from None
    return application(config, service)


def prepare(config: Config) -> Service:
    """Everything that can be refused is refused here, before Ray or an engine starts. Raises ConfigError."""
    hashes = key_hashes(config.serve)
    run = Run.of(config)
    experts = find(config, run)
    return Service(
        experts=tuple(experts),
        router=_router(run, experts),
        threshold=config.serve.router.threshold,
        fallback_named=config.serve.fallback == "all",
        is_single=config.serve.max_replicas == 1,
        key_hashes=hashes,
        max_body_bytes=config.serve.max_body_bytes,
        max_sequences=config.serve.max_sequences,
        timeout_s=config.serve.timeout_s,
    )


def application(config: Config, service: Service) -> Application:
    """One deployment per model, and the ingress before them."""
    deployments = {expert.name: build_llm_deployment(llm_config(config, expert)) for expert in service.experts}
    per_model = config.serve.max_ongoing_requests * config.serve.max_replicas + config.serve.max_queued_requests
    ingress = serve.deployment(
        make_ingress(service),
        name="ExpertIngress",
        num_replicas=config.serve.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        # More than the models hold: the ingress refuses what is beyond in OpenAI's form, before Serve does in its own.
        max_ongoing_requests=per_model * len(deployments) + 1000,
        max_queued_requests=1000,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s,
    )
    return ingress.bind(llm_deployments=deployments, model_cards=dict.fromkeys(deployments), service=service)


def _router(run: Run, experts: list[Expert]) -> Any:
    if all(expert.kind == "general" for expert in experts):
        return None
    Router.load(run.router)
    return run.router.absolute()


def _flat(args: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Arguments as they stand on a command line; a YAML file may nest them."""
    for key, value in args.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
