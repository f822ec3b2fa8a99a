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
from ray.serve.llm import build_llm_deployment

from seap_ray.config import Config
from seap_ray.errors import SeapError
from seap_ray.router import Router
from seap_ray.run import Run
from seap_ray.vllm_plugin import check_registered
from serve.experts import Expert, find, llm_config
from serve.gate import key_hashes
from serve.ingress import Service, make_ingress


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
    check_registered()
    run = Run.of(config)
    experts = find(config, run)
    return Service(
        experts=tuple(experts),
        router=_router(run, experts),
        threshold=config.serve.router.threshold,
        fallback_named=config.serve.fallback == "all",
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
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        # More than the models hold: what is beyond is refused by the ingress, and not kept waiting before it.
        max_ongoing_requests=per_model * len(deployments) + 1000,
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
