"""GGUF files of a run: a config and its base in, refusals and notes out; a written checkpoint in, its GGUF file out."""

from pathlib import Path

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.gguf.companions import preset
from seap_ray.models.gguf.layouts import check_gguf, needs_equal_widths
from seap_ray.models.gguf.vocabulary import read_vocabulary
from seap_ray.models.gguf.writer import GgufExport, require_gguf
from seap_ray.models.model_sources import MODEL_FILES
from seap_ray.pipeline.model_specs import assumed_specs, compensation_for
from seap_ray.progress import say
from seap_ray.storage.artifact import Artifact, ChecksummedFile
from seap_ray.storage.files import atomic_write, read_json, stage
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run

PRESET = "llama-server.ini"
"""File that names every GGUF file of a run, for llama-server's router mode."""
ITEM_BYTES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "Q8_0": 34 / 32,
    "Q5_1": 24 / 32,
    "Q5_0": 22 / 32,
    "Q4_1": 20 / 32,
    "Q4_0": 18 / 32,
}
"""Bytes of a weight by the type of its matrix: a block of 32 weights is integers and a scale, and in _1 its least."""
K_QUANT_BLOCK = 256
"""Weights of a row that llama.cpp's K-quants are made of."""
QUANT_BLOCK = 32
"""The same of the types that a file is written in."""


def is_uniform(config: Config, architecture: Architecture, *, adds_biases: bool) -> bool:
    """Return whether the format of the checkpoints asks for equal widths in all layers.

    Args:
        config: The run's configuration.
        architecture: The base.
        adds_biases: Whether a model's compensation adds biases to output modules.
    """
    if config.export.format == "gguf":
        return needs_equal_widths(architecture, adds_biases=adds_biases)
    return config.export.format == "stock"


def check_gguf_base(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse a base or a tokenizer that llama.cpp does not have; nothing where no GGUF files are asked for.

    Raises:
        ConfigError: One line with the reason and what to do.
    """
    if config.export.format != "gguf":
        return
    require_gguf()
    for spec in assumed_specs(config):
        adds_biases = compensation_for(spec.settings).adds_biases
        check_gguf(completed_config(checkpoint.config), checkpoint.architecture, adds_biases=adds_biases)

    for warning in read_vocabulary(checkpoint.folder, checkpoint.vocabulary_size).warnings:
        say(f"warning: export.format: {warning}")


def gguf_note(config: Config, architecture: Architecture) -> str | None:
    """Return a line on types that the widths of a run's GGUF files do not suit; None where there is nothing to say."""
    if config.export.format != "gguf":
        return None

    align = architecture.align(config.pruning.align)
    # Rows are as long as the residual stream, but for the two output modules, whose rows are cut.
    if architecture.hidden_size % QUANT_BLOCK:
        return (
            f"gguf: rows of {architecture.hidden_size} weights are no multiple of {QUANT_BLOCK}, so most matrices are "
            "F16 in every type but F32 and BF16"
        )
    if architecture.hidden_size % K_QUANT_BLOCK:
        return (
            f"gguf: rows of {architecture.hidden_size} weights are no multiple of {K_QUANT_BLOCK}, so llama-quantize "
            "makes its K-quants of few matrices; Q8_0 and Q4_0 suit this model better"
        )
    if align % K_QUANT_BLOCK:
        return (
            f"gguf: for K-quants by llama-quantize set pruning.align={K_QUANT_BLOCK}; rows of down_proj that are "
            f"multiples of {align} alone get a larger type"
        )
    return None


def gguf_item_bytes(config: Config) -> float:
    """Return the bytes of a weight in the GGUF files of a run; 0 where there are none."""
    return ITEM_BYTES[config.export.gguf_type] if config.export.format == "gguf" else 0.0


def write_gguf(folder: StoragePath, type_: str, name: str, path: StoragePath) -> str:
    """Write the GGUF file of a checkpoint whose other files are there; return its digest.

    Args:
        folder: The checkpoint's folder.
        type_: Type of its matrices.
        name: What the file calls the model.
        path: The file. One that an earlier attempt finished stays.
    """

    def build() -> None:
        """Write the file, then its checksum, which makes it whole."""
        here = stage(folder, MODEL_FILES)
        format_.save_checksum(path, GgufExport.of(Path(here), type_, name).write(path))

    format_ = ChecksummedFile()
    # The name of the hidden folder carries the key.
    return Artifact(path, str(path), format_).get(build)


def write_preset(run: Run) -> None:
    """Write the preset of all GGUF files that a run has, by which one llama-server serves them."""
    files: dict[str, str] = {}
    manifests: list[StoragePath] = [*(run.root / "experts").glob("*/*/seap.json")]
    for manifest in sorted(manifests, key=str):
        content = read_json(manifest)
        # A checkpoint that is not finished lies in a hidden folder.
        if content and content.get("gguf") and not manifest.parent.name.startswith("."):
            model = f"{manifest.parent.parent.name}/{manifest.parent.name}"
            files[model] = f"{model}/{content['gguf']['file']}"

    with atomic_write(run.root / "experts" / PRESET) as temporary:
        temporary.write_text(preset(files))
