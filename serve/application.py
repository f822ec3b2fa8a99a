"""Application: checks a config against its run, and builds the Ray Serve application."""

from collections.abc import Sequence
from dataclasses import replace

from ray import serve
from ray.serve import Application
from ray.serve.llm import build_llm_deployment

from seap_ray.config import DENSE, GENERAL, Config
from seap_ray.errors import ConfigError
from seap_ray.models.corpus import load_tokenizer
from seap_ray.report.rows import ModelRow, QualityCell, Results
from seap_ray.routing.expected_quality import KeptQuality, kept
from seap_ray.routing.router import Router
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run
from serve.engines import EngineGroup, check_sharing
from serve.experts import Expert, find_experts
from serve.guard_server import GuardServer, GuardSettings
from serve.ingress import Service, make_ingress
from serve.keys import read_keys, read_operator_keys
from serve.llm_config import llm_config
from serve.prompts import PromptBeginning
from serve.tools import tool_parser


def prepare(config: Config) -> Service:
    """Read what the service needs, before Ray or an engine starts.

    Raises:
        ConfigError: The keys, the run, its experts or the settings of a shared engine cannot be used.
    """
    # Cheapest first: without keys no bucket need be read.
    keys = read_keys(config.serve)
    operators = read_operator_keys(config.serve)
    run = Run.of(config)
    experts = find_experts(config, run)
    check_sharing(config, experts)
    tool_parser(config, stage(experts[0].folder))  # an unknown one is told before an engine starts
    return Service(
        experts=tuple(experts),
        router=_router_folder(run, experts),
        # All models have the dense model's tokenizer.
        beginning=PromptBeginning.of(load_tokenizer(stage(experts[0].folder))),
        threshold=config.serve.router.threshold,
        named_falls_back=config.serve.fallback == "all",
        has_one_replica=config.serve.max_replicas == 1,
        keys=keys,
        operators=operators,
        max_body_bytes=config.serve.max_body_bytes,
        max_sequences=config.serve.max_sequences,
        timeout_s=config.serve.timeout_s,
        guard=_guard_settings(config, experts),
        kept=_kept_quality(run, experts) if config.serve.router.rule == "expected_quality" else None,
    )


def _kept_quality(run: Run, experts: Sequence[Expert]) -> KeptQuality:
    """Return what the served models keep of the dense one's quality.

    Raises ConfigError where the job has not judged all of them on all tasks.
    """
    content = read_json(run.results)
    models = Results.from_json(content).models if content else ()
    dense = next((row for row in models if row.kind == DENSE and row.quality), None)
    if dense is None:
        raise ConfigError(f"serve.router.rule: {run.root} has no results of jobs/prune.py with evaluation.samples")

    # All that are served have one ratio.
    ratio = experts[0].ratio
    by_model: dict[str, dict[str, float]] = {}
    for row in models:
        if row.ratio == ratio and row.kind in ("expert", GENERAL):
            by_model[row.name] = _kept_by_task(row, dense)
    # Models are compared on the tasks that all of them were judged on.
    for name, shares in by_model.items():
        if shares.keys() != dense.quality.keys():
            raise ConfigError(f"serve.router.rule: {name} was not judged on every task; run jobs/prune.py again")
    return KeptQuality(by_model)


def _kept_by_task(row: ModelRow, dense: ModelRow) -> dict[str, float]:
    """Return what a model keeps of the dense one's quality on every task that both were judged on."""
    shares: dict[str, float] = {}
    for task, whole in dense.quality.items():
        cell = row.quality.get(task)
        if isinstance(whole, QualityCell) and isinstance(cell, QualityCell):
            shares[task] = kept(cell.metric, cell.value, whole.value)
    return shares


def _guard_settings(config: Config, experts: Sequence[Expert]) -> GuardSettings | None:
    """Return what experts are judged by; None where none is."""
    settings = config.serve.guard
    judged = [expert for expert in experts if expert.kind == "expert"]
    if not settings.share or not judged:
        return None

    best = DENSE if config.serve.dense else GENERAL
    reference = best if settings.reference == "auto" else settings.reference
    floors = {expert.name: _floor(config, expert, reference) for expert in judged}
    return GuardSettings(reference, floors, settings.error_probability, settings.share)


def _floor(config: Config, expert: Expert, reference: str) -> float | None:
    """Return an expert's least mean share of agreement; None where the job has measured none and the config says none.

    One that does not agree with the reference as often as ``margin`` to begin with cannot be held to anything.
    """
    settings = config.serve.guard
    if settings.floor is not None:
        return settings.floor
    measured = expert.agreements.get(reference)
    return measured - settings.margin if measured is not None and measured > settings.margin else None


def application(config: Config, service: Service, groups: Sequence[EngineGroup]) -> Application:
    """Return the application: a deployment per engine, and the ingress in front of them."""
    # Models that share an engine have the same deployment; Serve starts it once.
    deployments = {}
    for group in groups:
        deployment = build_llm_deployment(llm_config(config, group))
        for expert in group.experts:
            deployments[expert.name] = deployment

    service = replace(service, is_shared=any(group.is_shared for group in groups))
    guard = _guard_deployment(service)

    running = config.serve.max_ongoing_requests * config.serve.max_replicas
    per_model = running + config.serve.max_queued_requests
    deploy_ingress = serve.deployment(
        name="ExpertIngress",
        num_replicas=config.serve.ingress_replicas,
        ray_actor_options={"num_cpus": 0},  # all CPUs of the cluster are for engines
        # More than the models hold: so the ingress refuses the rest, in OpenAI's form, before Serve does in its own.
        max_ongoing_requests=per_model * len(deployments) + 1000,
        max_queued_requests=1000,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s,
    )
    cards = dict.fromkeys(deployments)
    ingress = deploy_ingress(make_ingress(service))
    return ingress.bind(llm_deployments=deployments, model_cards=cards, service=service, guard=guard)


def _guard_deployment(service: Service) -> Application | None:
    """Return the deployment of the guard; None where no expert is judged."""
    if service.guard is None:
        return None
    deploy_guard = serve.deployment(
        name="Guard",
        num_replicas=1,  # one process knows who is demoted, however many take requests
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
    )
    return deploy_guard(GuardServer).bind(settings=service.guard)


def _router_folder(run: Run, experts: list[Expert]) -> StoragePath | None:
    """Return the folder of the run's router once it has been read; None where no expert is served.

    Raises ConfigError when the router is missing or damaged.
    """
    if not any(expert.kind == "expert" for expert in experts):
        return None

    # Read here so that a damaged one is told before an engine starts; each ingress reads it again.
    Router.load(run.router)
    return run.router.absolute()
