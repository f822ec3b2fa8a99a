"""Quantisation of a run's models: a config and a base in, refusals, notes and a config with nothing left open out.

Groups of columns that share a scale must divide all widths. Channels are cut to multiples of them; heads, and the
widths of the base, suit a group or do not.
"""

from math import lcm

from seap_ray.config import Config, QuantizationSection
from seap_ray.core.architecture import Architecture
from seap_ray.core.widths import widest_unit
from seap_ray.errors import ConfigError
from seap_ray.models.export import CheckpointExport
from seap_ray.models.input_records import PooledInputs
from seap_ray.models.quantization import SCHEMES, QuantizedExport, require_compressed_tensors
from seap_ray.models.records import PooledCovariance
from seap_ray.pipeline.model_specs import model_specs, pruning_section

GROUPS = (128, 64, 32)
"""Groups that ``auto`` tries: engines' kernels have these, and the fewer scales the better."""


def with_quantization(config: Config, architecture: Architecture) -> Config:
    """Return the config with ``export.quantization.group`` closed, and channels that are cut to multiples of it.

    Args:
        config: The run's configuration.
        architecture: The base.

    Raises:
        ConfigError: Widths of the base, or those that heads are cut to, are no multiples of the group; the base is a
            mixture of experts; or the package that knows the format is not installed.
    """
    settings = config.export.quantization
    # Their modules read other inputs than the two that are recorded.
    is_other = architecture.n_experts or architecture.family.is_latent or architecture.family.has_other_parts
    if is_other and (settings.scheme or config.records_inputs):
        what = "a mixture of experts" if architecture.n_experts else f"a {architecture.family_name} model"
        key = "export.quantization" if settings.scheme else "calibration.input_covariances"
        raise ConfigError(f"{key}: not for {what}; vLLM can quantise it as it loads it (serve.engine)")
    if settings.scheme is None:
        return config
    require_compressed_tensors()
    if not SCHEMES[settings.scheme].has_groups:
        return config

    group = _group(config, architecture)
    align = lcm(architecture.align(config.pruning.align), group)
    export = config.export.model_copy(update={"quantization": settings.model_copy(update={"group": group})})
    return config.model_copy(
        update={"export": export, "pruning": config.pruning.model_copy(update={"align": align})},
    )


def _group(config: Config, architecture: Architecture) -> int:
    """Return the columns that share a scale. Raises ConfigError where no group divides all widths."""
    group = config.export.quantization.group
    if group != "auto":
        if reason := _why_not(group, config, architecture):
            smaller = [other for other in GROUPS if other < group and not _why_not(other, config, architecture)]
            remedy = f"use export.quantization.group={smaller[0]}, or w8a8" if smaller else "use w8a8"
            raise ConfigError(f"export.quantization.group: {reason}; {remedy}, which has one scale for each output")
        return group

    for candidate in GROUPS:
        if not _why_not(candidate, config, architecture):
            return candidate
    reason = _why_not(GROUPS[-1], config, architecture)
    raise ConfigError(f"export.quantization: {reason}; use w8a8, which has one scale for each output")


def _why_not(group: int, config: Config, architecture: Architecture) -> str | None:
    """Return which width is no multiple of a group; None where all are."""
    if architecture.hidden_size % group:
        return f"the hidden size {architecture.hidden_size} is no multiple of {group}"
    for number, layer in enumerate(architecture.layers):
        columns = layer.shape.heads * architecture.head_dim
        if columns % group:
            return f"{layer.shape.heads} heads of {architecture.head_dim} in layer {number} are no multiple of {group}"
        if layer.shape.channels % group:
            return f"{layer.shape.channels} channels of layer {number} are no multiple of {group}"

        for unit in _attention_units(config, architecture):
            n_heads = layer.shape.heads_per_group if unit == "group" else layer.shape.groups
            if n_heads * architecture.head_dim % group:
                return (
                    f"attention is cut {n_heads} heads of {architecture.head_dim} at a time, no multiple of {group} "
                    "(pruning.attention_unit=none cuts none)"
                )
    return None


def _attention_units(config: Config, architecture: Architecture) -> set[str]:
    """Return the units of attention that the models of a run may lose."""
    units: set[str] = set()
    # Models that nothing is removed from keep their heads.
    if not any(config.pruning.ratio) and not config.pruning.target.kinds:
        return units
    for spec in model_specs(config):
        section = pruning_section(config, spec.settings)
        # Whole layers go with their heads, and whole MoE experts have none.
        if not spec.settings.cuts_no_module:
            unit = section.attention_unit
            units.add(widest_unit(architecture) if unit == "auto" else unit)
    return units - {"none"}


def quantization_note(config: Config, architecture: Architecture) -> str | None:
    """Return a line on what the weights of a run's models become; None where they stay as they are.

    The config is one from ``with_quantization``.
    """
    settings = config.export.quantization
    if settings.scheme is None:
        return None
    if not SCHEMES[settings.scheme].has_groups:
        return f"quantization: {settings.scheme} by {settings.rounding}, a scale for each output"
    return (
        f"quantization: {settings.scheme} by {settings.rounding} in groups of {settings.group} columns; kept channels "
        f"are multiples of {architecture.align(config.pruning.align)}"
    )


def quantized(
    export: CheckpointExport, settings: QuantizationSection, covariances: PooledCovariance
) -> QuantizedExport:
    """Return a model as it is to be written, with the moments by which its weights are rounded.

    Args:
        export: The model after cut and repair.
        settings: ``export.quantization``, from ``with_quantization``.
        covariances: Those of the model's tasks, each with its weight.
    """
    is_gptq = settings.rounding == "gptq"
    return QuantizedExport(
        export.base,
        export.plan,
        export.statistics,
        stock=export.stock,
        settings=settings,
        covariances=covariances if is_gptq else None,
        inputs=PooledInputs(covariances.sources, covariances.weights) if is_gptq else None,
    )
