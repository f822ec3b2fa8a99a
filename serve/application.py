"""Application: checks a config against its run, and builds the Ray Serve application."""

from collections.abc import Sequence
from dataclasses import replace

from ray import serve
from ray.serve import Application
from ray.serve.llm import build_llm_deployment

from seap_ray.config import Config
from seap_ray.models.corpus import load_tokenizer
from seap_ray.routing.router import Router
from seap_ray.storage.files import stage
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run
from serve.engines import EngineGroup, check_sharing
from serve.experts import Expert, find_experts
from serve.ingress import Service, make_ingress
from serve.keys import read_keys
from serve.llm_config import llm_config
from serve.prompts import PromptBeginning


def prepare(config: Config) -> Service:
    """Read what the service needs, before Ray or an engine starts.

    Raises:
        ConfigError: The keys, the run, its experts or the settings of a shared engine cannot be used.
    """
    # Cheapest first: without keys no bucket need be read.
    keys = read_keys(config.serve)
    run = Run.of(config)
    experts = find_experts(config, run)
    check_sharing(config, experts)
    return Service(
        experts=tuple(experts),
        router=_router_folder(run, experts),
        # All models have the dense model's tokenizer.
        beginning=PromptBeginning.of(load_tokenizer(stage(experts[0].folder))),
        threshold=config.serve.router.threshold,
        named_falls_back=config.serve.fallback == "all",
        has_one_replica=config.serve.max_replicas == 1,
        keys=keys,
        max_body_bytes=config.serve.max_body_bytes,
        max_sequences=config.serve.max_sequences,
        timeout_s=config.serve.timeout_s,
    )


def application(config: Config, service: Service, groups: Sequence[EngineGroup]) -> Application:
    """Return the application: a deployment per engine, and the ingress in front of them."""
    # Models that share an engine have the same deployment; Serve starts it once.
    deployments = {}
    for group in groups:
        deployment = build_llm_deployment(llm_config(config, group))
        for expert in group.experts:
            deployments[expert.name] = deployment

    service = replace(service, is_shared=len(groups) < len(deployments))

    running = config.serve.max_ongoing_requests * config.serve.max_replicas
    per_model = running + config.serve.max_queued_requests
    ingress = serve.deployment(
        make_ingress(service),
        name="ExpertIngress",
        num_replicas=config.serve.ingress_replicas,
        ray_actor_options={"num_cpus": 0},  # all CPUs of the cluster are for engines
        # More than the models hold: so the ingress refuses the rest, in OpenAI's form, before Serve does in its own.
        max_ongoing_requests=per_model * len(deployments) + 1000,
        max_queued_requests=1000,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s,
    )
    return ingress.bind(llm_deployments=deployments, model_cards=dict.fromkeys(deployments), service=service)


def _router_folder(run: Run, experts: list[Expert]) -> StoragePath | None:
    """Return the folder of the run's router once it has been read; None where no expert is served.

    Raises ConfigError when the router is missing or damaged.
    """
    if all(expert.kind == "general" for expert in experts):
        return None

    # Read here so that a damaged one is told before an engine starts; each ingress reads it again.
    Router.load(run.router)
    return run.router.absolute()
