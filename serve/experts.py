"""Experts: finds the checkpoints of a run that are to be served."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from seap_ray.config import DENSE, GENERAL, Config
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.multimodal import multimodal_of
from seap_ray.models.row_sources import calibration_rows
from seap_ray.pipeline.checkpoint_writer import kv_bytes
from seap_ray.storage.files import read_json, readable, stage
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import Run, fingerprint, ratio_name


@dataclass(frozen=True, slots=True)
class Expert:
    """A checkpoint to serve. ``name`` is the model's name in the API."""

    name: str
    kind: str
    folder: StoragePath
    shape: str
    """Hash of config.json, from which an engine is built: models of equal hashes can share an engine."""
    ratio: float
    parameters: int
    kv_bytes_per_token: int
    has_chat_template: bool
    created: int
    """Unix time."""
    draft: StoragePath | None = None
    """Folder of the model that drafts for it; None where none does."""
    example: str | None = None
    """A prompt to try in the playground."""
    agreements: Mapping[str, float] = field(default_factory=dict)
    """Share of an expert's tokens that are those of the dense and of the general model, by their names, as the job has
    measured it on held-out prompts, less two standard errors; empty where it has not."""

    @property
    def card(self) -> dict[str, Any]:
        """Metadata of the model in ``/v1/models``."""
        return {
            "kind": self.kind,
            **({"task": self.name} if self.kind == "expert" else {}),
            "ratio": self.ratio,
            "parameters": self.parameters,
            "chat": self.has_chat_template,
            **({"example": self.example} if self.example else {}),
        }


def find_experts(config: Config, run: Run) -> list[Expert]:
    """Return the general model and the experts to serve, and where the config says so the dense model.

    The first of them answers what no expert does. In mode ``speculative`` the dense model is alone, with its draft.

    Raises:
        ConfigError: The run, its ratio or an expert is not there, or a folder is damaged. The message names the key.
    """
    # In a bucket that does not answer, a run is not missing.
    with readable(run.root):
        is_there = run.config.is_file()

    if not is_there:
        raise ConfigError(f"{run.root}: no such run; make it with jobs/prune.py, or name another by run.name")

    # A checkpoint's manifest is written last, so one without is still being written and is not served.
    folder = run.experts(_ratio(config, run))
    manifests = {path.parent.name: read_json(path) for path in folder.sorted_glob("*/seap.json")}
    kinds = {name: manifest["plan"]["kind"] for name, manifest in manifests.items() if manifest}
    # Baselines are there to be compared with, not to be served.
    tasks = [name for name, kind in kinds.items() if kind == "expert"]
    wanted = tasks if config.serve.experts is None else list(config.serve.experts)
    for name in wanted:
        if name not in tasks:
            raise ConfigError(f"serve.experts: {folder} holds no expert {name}; it holds {', '.join(tasks) or 'none'}")

    # The general model answers what the router is not sure of, and for experts that are down. It comes first: a shared
    # engine starts with the first.
    if GENERAL not in kinds:
        raise ConfigError(f"{folder} holds no whole general model; run jobs/prune.py to its end")
    if config.serve.mode == "speculative":
        name = config.serve.draft.model
        if name not in (GENERAL, *tasks):
            raise ConfigError(f"serve.draft.model: {folder} holds no {name}; it holds {', '.join([GENERAL, *tasks])}")
        draft = _expert(config, run, folder / name, kinds[name], manifests[name])
        return [_drafted(_dense(config), draft)]

    served = [_expert(config, run, folder / name, kinds[name], manifests[name]) for name in (GENERAL, *wanted)]
    return [*served, _dense(config)] if config.serve.dense else served


def _drafted(dense: Expert, draft: Expert) -> Expert:
    """Return the dense model with a draft, whose keys and values are kept beside its own."""
    kv_bytes_per_token = dense.kv_bytes_per_token + draft.kv_bytes_per_token
    return replace(dense, draft=draft.folder, kv_bytes_per_token=kv_bytes_per_token)


def _dense(config: Config) -> Expert:
    """Return the dense model to serve. Raises ConfigError where it cannot be read."""
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    folder = parse_path(str(checkpoint.folder))
    _check_computed(folder, checkpoint.config)
    return Expert(
        name=DENSE,
        kind=DENSE,
        folder=folder.absolute(),
        shape=fingerprint(read_json(folder / "config.json")),
        ratio=0.0,
        parameters=checkpoint.parameters,
        kv_bytes_per_token=kv_bytes([layer.shape for layer in checkpoint.architecture.layers], checkpoint),
        has_chat_template="chat_template" in config.serve.engine or _has_chat_template(folder),
        created=int((folder / "config.json").stat().st_mtime),
    )


def _ratio(config: Config, run: Run) -> float:
    """Return the ratio to serve: ``serve.ratio``, or the smallest one that has a whole general model."""
    there = sorted(path.name for path in run.root.glob("experts/*") if path.is_dir())
    if config.serve.ratio is None:
        whole = [name for name in there if (run.root / "experts" / name / GENERAL / "seap.json").is_file()]
        if not whole:
            raise ConfigError(f"{run.root} holds no whole general model; run jobs/prune.py to its end")
        return min(map(float, whole))

    if ratio_name(config.serve.ratio) not in there:
        raise ConfigError(f"serve.ratio: {run.root} holds {', '.join(there) or 'none'}, not {config.serve.ratio:g}")
    return config.serve.ratio


def check_servable(folder: StoragePath) -> None:
    """Raise ConfigError where vLLM could not load a checkpoint, whose headers are read."""
    check_folder(stage(folder))
    content = read_json(folder / "config.json")
    if multimodal_of(content) and content["model_type"].startswith("seap_"):
        raise ConfigError(
            f"{folder} reads pictures, too, and layers of unequal widths are not served by vLLM in such a model; prune "
            "with export.format=stock"
        )
    _check_computed(folder, content)


def _check_computed(folder: StoragePath, config: Mapping[str, Any]) -> None:
    """Raise ConfigError where vLLM is known to compute otherwise than transformers (``findings/`` shows it)."""
    if config.get("model_type") == "phimoe" and config.get("lm_head_bias"):
        raise ConfigError(
            f"{folder}: vLLM leaves out the bias of Phi-3.5 MoE's output layer (lm_head_bias), and its answers would "
            "be others; load it with transformers"
        )


def _expert(config: Config, run: Run, folder: StoragePath, kind: str, manifest: dict[str, Any]) -> Expert:
    """Return one checkpoint to serve, checked. Raises ConfigError where vLLM could not load it."""
    check_servable(folder)
    return Expert(
        name=folder.name,
        kind=kind,
        folder=folder.absolute(),
        shape=fingerprint(read_json(folder / "config.json")),
        ratio=manifest["requested_ratio"],
        parameters=manifest["parameters"],
        kv_bytes_per_token=manifest["kv_bytes_per_token"],
        has_chat_template="chat_template" in config.serve.engine or _has_chat_template(folder),
        created=int((folder / "seap.json").stat().st_mtime),  # the manifest is written last
        example=_example(config, folder.name),
        agreements=_agreements(run, manifest["requested_ratio"], folder.name),
    )


def _agreements(run: Run, ratio: float, name: str) -> dict[str, float]:
    """Return what the job has measured of an expert.

    It is a promise about the expert of this name, so it holds for whatever checkpoint lies there.
    """
    measured = read_json(run.agreement(ratio, name)) or {}
    references = {reference: measured.get(reference) for reference in (DENSE, GENERAL)}
    return {
        reference: about["share"] - 2 * about["stderr"]
        for reference, about in references.items()
        if about and about["n"]
    }


def _example(config: Config, name: str) -> str | None:
    """Return a prompt to try, for a task of the demo alone: other corpora may hold what not every user may see."""
    for task in config.tasks:
        if task.name == name:
            return calibration_rows(task).public_example(config.run.seed)
    return None


def _has_chat_template(folder: StoragePath) -> bool:
    """Return whether the tokenizer in a folder has a chat template, in a file of its own or in its settings."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
