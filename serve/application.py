"""Application: a config in, all that can be refused refused, a Ray Serve application out."""

from collections.abc import Sequence
from dataclasses import replace

from ray import serve
from ray.serve import Application
from ray.serve.llm import build_llm_deployment

from seap_ray.config import Config
from seap_ray.routing.router import Router
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run
from serve.experts import Expert, find
from serve.gate import key_hashes
from serve.ingress import Service, make_ingress
from serve.llm_config import llm_config
from serve.packs import Pack, check


def prepare(config: Config) -> Service:
    """Everything that can be refused is refused here, before Ray or an engine starts. Raises ConfigError."""
    hashes = key_hashes(config.serve)
    run = Run.of(config)
    experts = find(config, run)
    check(config, experts)
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


def application(config: Config, service: Service, engines: Sequence[Pack]) -> Application:
    """One deployment per engine, and the ingress before them."""
    built = [(pack, build_llm_deployment(llm_config(config, pack))) for pack in engines]
    deployments = {expert.name: deployment for pack, deployment in built for expert in pack.experts}
    service = replace(service, is_packed=len(engines) < len(deployments))
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


def _router(run: Run, experts: list[Expert]) -> StoragePath | None:
    if all(expert.kind == "general" for expert in experts):
        return None
    Router.load(run.router)
    return run.router.absolute()
