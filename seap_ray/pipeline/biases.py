"""Biases: a config and a model's architecture in; whether compensation may add biases to output modules, out.

Only some families have biases there, and a checkpoint that every tool loads can have no others.
"""

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.errors import ConfigError
from seap_ray.models.export import why_no_biases
from seap_ray.pipeline.model_specs import ModelSpec, model_specs
from seap_ray.progress import say


def with_bias(config: Config, architecture: Architecture) -> Config:
    """Return the config with ``pruning.bias`` closed where the checkpoints' format cannot hold biases.

    Where it can, ``auto`` stays, which is the same as true.

    Raises:
        ConfigError: A model is asked to have biases that its checkpoint cannot hold, or the base has some already.
    """
    reason = why_no_biases(config.export.format, architecture)
    if reason is None:
        return config
    if architecture.has_added_biases:
        raise ConfigError(f"export.format: {reason}, and this model was given some; use export.format=seap")

    # What a plan says for itself stays, and so does an explicit true, to be refused.
    if config.pruning.bias == "auto":
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"bias": False})})
    for spec in _compensated(config):
        if spec.settings.compensation == "mean":
            raise ConfigError(
                f"pruning.compensation: mean is a bias, and {reason} ({spec.name}); use least_squares with "
                "calibration.statistics=covariance, none, or export.format=seap"
            )
        if spec.settings.bias:
            raise ConfigError(
                f"pruning.bias: true, but {reason} ({spec.name}); use pruning.bias=false, which leaves least squares "
                "without an intercept, or export.format=seap"
            )
    return config


def say_bias(config: Config, architecture: Architecture) -> None:
    """Say where ``with_bias`` has decided for a config whose models may be compensated."""
    if line := bias_line(config, architecture):
        say(line)


def bias_line(config: Config, architecture: Architecture) -> str | None:
    """Return a line where a config leaves the bias open and the format decides; None where nothing was decided."""
    reason = why_no_biases(config.export.format, architecture)
    if reason is None or config.pruning.bias != "auto" or not _compensated(config):
        return None
    consequence = "least squares is fitted without an intercept"
    if config.calibration.statistics != "covariance":
        consequence = "nothing is compensated, as least squares needs calibration.statistics=covariance"
    return f"pruning.bias: false, since {reason}; {consequence}"


def _compensated(config: Config) -> list[ModelSpec]:
    """Return the models that are compensated, or may be: where layers or MoE experts go as a whole none is."""
    specs = model_specs(config)
    return [spec for spec in specs if spec.settings.compensation != "none" and not spec.settings.cuts_no_module]
