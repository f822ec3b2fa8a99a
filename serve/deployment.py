"""Deployment: starts the service of a run, on the cluster at hand or on this machine."""

import logging
import math
import os
import signal
import threading
import time

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ReplicaState

from seap_ray.config import Config
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.pipeline.cluster import connect
from serve.application import application, prepare
from serve.engines import engine_groups, is_cpu, n_ranks
from serve.gate import prepare_environment
from serve.keys import KEYS_VARIABLE
from serve.watch import PERIOD_S

logger = logging.getLogger("ray.serve")

NAME = "seap_ray"
"""Name of the Serve application."""
POLL_S = 1.0
"""Seconds between two looks at the service's status."""
SHUTDOWN_MARGIN_S = 30.0
"""Seconds for taking the service down, after those that replies have."""
STATUS_EVERY_S = 60.0
"""Seconds without a new engine after which Serve's own status is printed."""


def deploy(config: Config) -> None:
    """Serve a run: on the cluster of RAY_ADDRESS, where it stays, or on this machine until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The run, a key or the room in the cluster is wrong.
        IncompleteError: The engines do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # First what takes no cluster: a wrong key or run is told within seconds.
    service = prepare(config)
    models = [expert.name for expert in service.experts]
    address = os.environ.get("RAY_ADDRESS", "local")
    # Before Ray starts, since its processes inherit the environment.
    prepare_environment()
    connect(address)
    has_started = False
    try:
        groups, reason = engine_groups(config, service.experts)
        print(reason, flush=True)
        _check_room(config, len(groups))

        has_started = True  # from here on there is something to take down, even where the start itself fails
        serve.start(http_options={"host": config.serve.host, "port": config.serve.port})
        target = serve.RunTarget(application(config, service, groups), name=NAME, route_prefix="/")
        # The wait below names the engines as they come up, and ends when one cannot start.
        serve.run_many([target], wait_for_applications_running=False)
        _await_ready([group.name for group in groups])
        _print_addresses(config, models)
        while address == "local":  # the service ends with this process
            time.sleep(POLL_S)
    finally:
        if address == "local":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the shutdown short
            if has_started:
                _take_down(config.serve.drain_timeout_s)
            ray.shutdown()


def _take_down(drain_timeout_s: float) -> None:
    """Let replies that have begun end, then stop Serve.

    A signal that reached all processes may have ended Ray already, so nothing here waits for it without a bound.
    """

    def drain() -> None:
        """Delete the application, which waits for its replies, and then stop Serve."""
        try:
            serve.delete(NAME)  # `shutdown` alone would cut replies off
            serve.shutdown()
        except Exception as error:
            # Serve has ended already, or is ending. What ended it is what the user reads, not a thread's traceback.
            logger.info(f"Serve could not be stopped in order ({error})")

    # In a thread, since Serve's calls do not end once Ray's processes are gone.
    draining = threading.Thread(target=drain, daemon=True)
    draining.start()
    deadline = time.monotonic() + drain_timeout_s + SHUTDOWN_MARGIN_S
    while draining.is_alive() and time.monotonic() < deadline and _is_alive():
        draining.join(POLL_S)


def _is_alive() -> bool:
    """Return whether a node of the cluster still runs."""
    try:
        return any(node["Alive"] for node in ray.nodes())
    except Exception:  # Ray raises many kinds once its processes are gone
        return False


def _check_room(config: Config, n_engines: int) -> None:
    """Raise ConfigError where the engines do not fit the cluster: Serve would wait for ever, and only log it."""
    total_ranks = n_ranks(config) * config.serve.min_replicas * n_engines
    shares = {"CPU": config.serve.num_cpus}
    if not is_cpu(config):
        shares["GPU"] = config.serve.num_gpus

    for kind, share in shares.items():
        have = ray.cluster_resources().get(kind, 0)
        # What other jobs hold may become free, so the whole cluster counts and not what is free now.
        if total_ranks * share > have:
            reserve = "engines reserve" if n_engines > 1 else "engine reserves"
            fitting = math.floor(have / total_ranks * 100) / 100  # rounded down, so that it does fit
            raise ConfigError(
                f"serve.num_{kind.lower()}s: {n_engines} {reserve} {total_ranks * share:g} {kind}s, and the "
                f"cluster has {have:g}; lower it to {fitting:g}, or serve fewer of serve.experts"
            )


def _await_ready(engines: list[str]) -> None:
    """Print each engine as it comes up. Raises IncompleteError when one cannot start."""
    started = time.monotonic()
    last_line_at = started
    up: set[str] = set()
    print(f"starting {len(engines)} engine{'s' * (len(engines) > 1)}", flush=True)

    while True:
        status = serve.status().applications[NAME]
        now = time.monotonic()
        for name, deployment in status.deployments.items():
            model = name.partition(":")[2]  # an engine's deployment is LLMServer:NAME; the ingress has no colon
            if model and model not in up and deployment.replica_states.get(ReplicaState.RUNNING):
                up.add(model)
                last_line_at = now
                print(f"  {model} is up, {now - started:.0f} s ({len(up)}/{len(engines)})", flush=True)

        if status.status == ApplicationStatus.RUNNING:
            time.sleep(2 * PERIOD_S)  # by then every ingress has queried Serve, and knows that all are up
            return
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise IncompleteError(f"the service did not start: {_last_line(status.message)}")

        # An engine that waits for a GPU looks like one that loads; Serve's message says which it is.
        if now - last_line_at > STATUS_EVERY_S:
            last_line_at = now
            print(f"  {len(up)}/{len(engines)} after {now - started:.0f} s. {_last_line(status.message)}", flush=True)

        time.sleep(POLL_S)


def _last_line(message: str) -> str:
    """Return the last line of Serve's status message, which is often a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "see Serve's log"


def _print_addresses(config: Config, models: list[str]) -> None:
    """Print what is served where, and a first command to try."""
    url = f"http://{config.serve.host}:{config.serve.port}"
    # The variable by its name: the key itself has no place in a log.
    key = "KEY" if config.serve.api_keys_file else f"${KEYS_VARIABLE}"
    header = "" if config.serve.auth == "none" else f' -H "Authorization: Bearer {key}"'
    print(
        f"\n{', '.join(models)} and auto are served at {url}/v1, the playground at {url}/\n\n"
        f"  curl {url}/v1/models{header}\n",
        flush=True,
    )
