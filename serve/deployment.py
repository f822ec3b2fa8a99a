"""Deployment: a config in, a running service out, on the cluster at hand or on this machine."""

import logging
import math
import os
import signal
import threading
import time

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from seap_ray.config import Config
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.pipeline.cluster import connect
from serve.application import application, prepare
from serve.gate import KEYS_VARIABLE, close_environment
from serve.packs import is_cpu, packs, ranks
from serve.watch import PERIOD_S

NAME = "seap_ray"
POLL_S = 1.0
MARGIN_S = 30.0
"""For taking the service down, beside the time that replies have."""
PATIENCE_S = 60.0
"""Without a new model, after which Serve's own word on the matter is shown."""


def deploy(config: Config) -> None:
    """Serve a run: on the cluster of RAY_ADDRESS, where it stays, or on this machine until Ctrl-C or SIGTERM.

    Raises ConfigError for what is wrong with the run, the settings or the room in the cluster, IncompleteError when
    the engines do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    service = prepare(config)
    models = [expert.name for expert in service.experts]
    address = os.environ.get("RAY_ADDRESS", "local")
    close_environment()
    connect(address)
    try:
        engines, why = packs(config, service.experts)
        print(why, flush=True)
        _check_room(config, len(engines))
        serve.start(http_options={"host": config.serve.host, "port": config.serve.port})
        target = serve.RunTarget(application(config, service, engines), name=NAME, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _await_ready([pack.name for pack in engines])
        _tell(config, models)
        while address == "local":
            time.sleep(POLL_S)
    finally:
        if address == "local":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
            _take_down(config.serve.drain_timeout_s)


def _take_down(drain_timeout_s: float) -> None:
    """Let what is being answered end, then stop Ray; also where a signal to all of our processes took Ray before."""

    def drain() -> None:
        serve.delete(NAME)  # `shutdown` alone would cut replies off
        serve.shutdown()

    draining = threading.Thread(target=drain, daemon=True)
    draining.start()
    deadline = time.monotonic() + drain_timeout_s + MARGIN_S
    while draining.is_alive() and time.monotonic() < deadline and _is_alive():
        draining.join(POLL_S)
    ray.shutdown()


def _is_alive() -> bool:
    try:
        return any(node["Alive"] for node in ray.nodes())
    except Exception:  # whatever Ray says where nothing of it is left
        return False


def _check_room(config: Config, n_engines: int) -> None:
    """Serve would wait for ever, and say so in its log alone."""
    n_ranks = ranks(config) * config.serve.min_replicas * n_engines
    for kind, share in (("CPU", config.serve.num_cpus), ("GPU", 0 if is_cpu(config) else config.serve.num_gpus)):
        have = ray.cluster_resources().get(kind, 0)
        if n_ranks * share > have:
            fitting = math.floor(have / n_ranks * 100) / 100
            raise ConfigError(
                f"serve.num_{kind.lower()}s: {n_engines} engines reserve {n_ranks * share:g} {kind}s, and the cluster "
                f"has {have:g}; lower it to {fitting:g}, or serve fewer of serve.experts"
            )


def _await_ready(engines: list[str]) -> None:
    """Print each engine as it comes up. Raises IncompleteError when one cannot."""
    started = said = time.monotonic()
    told = set[str]()
    print(f"starting {len(engines)} engine{'s' * (len(engines) > 1)}", flush=True)
    while True:
        status = serve.status().applications[NAME]
        now = time.monotonic()
        for name, deployment in status.deployments.items():
            model = name.partition(":")[2]
            if model and model not in told and deployment.replica_states.get("RUNNING"):
                told.add(model)
                said = now
                print(f"  {model} is up, {now - started:.0f} s ({len(told)}/{len(engines)})", flush=True)
        if status.status == ApplicationStatus.RUNNING:
            time.sleep(2 * PERIOD_S)  # by then every ingress has looked, and knows as well
            return
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise IncompleteError(f"the service did not start: {_last_line(status.message)}")
        if now - said > PATIENCE_S:
            said = now
            print(f"  {len(told)}/{len(engines)} after {now - started:.0f} s. {_last_line(status.message)}", flush=True)
        time.sleep(POLL_S)


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "see Serve's log"


def _tell(config: Config, models: list[str]) -> None:
    url = f"http://{config.serve.host}:{config.serve.port}"
    key = "KEY" if config.serve.api_keys_file else f"${KEYS_VARIABLE}"
    header = "" if config.serve.auth == "none" else f' -H "Authorization: Bearer {key}"'
    print(
        f"\n{', '.join(models)} and auto are served at {url}/v1, the playground at {url}/\n\n"
        f"  curl {url}/v1/models{header}\n",
        flush=True,
    )
