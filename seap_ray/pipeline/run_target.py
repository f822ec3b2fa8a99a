"""Run target: ``pruning.target`` and a model's sizes in; the target, and the ratio that stands for it in the run, out.

The ratio names the run's folders and is the same for all its models, whatever each removes to meet the target.
"""

from seap_ray.config import Config
from seap_ray.core.allocation import check_target, even_ratio
from seap_ray.core.architecture import Architecture
from seap_ray.core.targets import StoredSizes, Target, WidthTable, make_target
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import DTYPES, Checkpoint
from seap_ray.pipeline.gguf_files import is_uniform
from seap_ray.pipeline.model_specs import assumed_specs, compensation_for, pruning_section
from seap_ray.progress import say
from seap_ray.storage.files import read_json
from seap_ray.storage.paths import parse_path


def target_of(config: Config, architecture: Architecture, stored: StoredSizes) -> Target | None:
    """Return the target that a config names; None where it names none.

    Raises ConfigError for a table of times that is missing, or that of another model or batch.
    """
    settings = config.pruning.target
    return make_target(settings, architecture, stored, read_table(config) if "latency" in settings.kinds else None)


def checkpoint_target(config: Config, checkpoint: Checkpoint) -> Target | None:
    """Return the target of a config for an opened model; raises as ``target_of``."""
    if not config.pruning.target.kinds:
        return None
    return target_of(config, checkpoint.architecture, stored_sizes(checkpoint))


def stored_sizes(checkpoint: Checkpoint) -> StoredSizes:
    """Return what the weights of a checkpoint take in its files."""
    architecture = checkpoint.architecture
    # Weights that a cut removes are of one type; norms and the like may be of another.
    dtype = checkpoint.tensors[architecture.first_output].dtype
    return StoredSizes(checkpoint.parameters, checkpoint.n_bytes, DTYPES[dtype].itemsize)


def with_target_ratio(config: Config, checkpoint: Checkpoint) -> Config:
    """Return the config with the ratio that stands for its target, and say so; without a target the config as it is.

    Raises ConfigError as ``with_ratio`` and ``target_of``.
    """
    target = checkpoint_target(config, checkpoint)
    if target is None:
        return config
    config = with_ratio(config, checkpoint.architecture, target)
    say(target_line(config, target))
    return config


def with_ratio(config: Config, architecture: Architecture, target: Target) -> Config:
    """Return the config with the ratio that stands for a target.

    Raises ConfigError for a target that one of the run's models cannot meet, or that the model meets without a cut.
    """
    may_add_biases = False
    for spec in assumed_specs(config):
        pruning = pruning_section(config, spec.settings)
        adds_biases = compensation_for(spec.settings).adds_biases
        stock = is_uniform(config, architecture, adds_biases=adds_biases)
        check_target(architecture, pruning, target, adds_biases=adds_biases, stock=stock)
        may_add_biases |= adds_biases

    stock = is_uniform(config, architecture, adds_biases=may_add_biases)
    ratio = even_ratio(architecture, config.pruning, target, adds_biases=may_add_biases, stock=stock)
    return config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratio": (ratio,)})})


def target_line(config: Config, target: Target) -> str:
    """Return a line that says what is asked for, what the model takes, and the ratio that stands for the target."""
    (ratio,) = config.pruning.ratio
    return (
        f"target {target.kind}: {target.bound} {target.shown(target.limit)}, where the model has "
        f"{target.shown(target.dense)}; evenly cut layers meet it at ratio {ratio:g}"
    )


def read_table(config: Config) -> WidthTable:
    """Read the table of times that a config names. Raises ConfigError where there is none."""
    name = config.pruning.target.latency.table
    content = read_json(parse_path(name))
    if content is None:
        raise ConfigError(
            f"pruning.target.latency.table: there is no {name}; python jobs/bench.py widths measures one on this device"
        )
    return WidthTable.from_json(content, name)
