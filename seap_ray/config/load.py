"""Load: ``ray_config.yaml`` and ``dotted.key=value`` overrides in, one frozen ``Config`` out; the help of every key."""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError

from seap_ray.config.schema import Baseline, Config, nearest, walk
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES, StudyName
from seap_ray.tasks import BUILT_IN, Section, Task

DEFAULT_PATH = "ray_config.yaml"
"""File that is read where none is named."""
DEMO_PATH = Path(__file__).parents[1] / "demo" / DEFAULT_PATH
"""The demo's settings, which come with the package: a copy of the repository's ``ray_config.yaml``."""
PATH_VARIABLE = "SEAP_RAY_CONFIG"
KEYS_TITLE = """\
Keys of the config file; on the command line: dotted.key=value. Each has the value that holds where neither sets it;
the demo's ray_config.yaml sets some."""
HELP_WIDTH = 100
HELP_INDENT = " " * 6


def load_config(arguments: Sequence[str]) -> Config:
    """Read the configuration of a job from a YAML file and the command line.

    Args:
        arguments: ``dotted.key=value`` overrides, values in YAML; a ratio takes back the file's target, and a target
            its ratio. ``config=PATH`` names the file; without it, the environment variable ``SEAP_RAY_CONFIG`` does, or
            else it is ``ray_config.yaml``, or the demo's settings where the current folder has no such file.
            ``study=NAME`` sets the keys that the study needs, unless they are among the overrides.

    Returns:
        The whole configuration, with defaults for what neither source sets.

    Raises:
        ConfigError: One line that names the file, the key and what would be right.
    """
    overrides = dict(_split(argument) for argument in arguments)
    path = _config_path(overrides.pop("config", None))
    values = _read(path)

    # The study's keys come first, so that a key inside one of them can still be overridden.
    given = {**_preset(values, overrides), **overrides}
    _take_back(values, given)
    for key, value in given.items():
        _set(values, key.split("."), value)

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None

    # A run's own config has both: its target, and the ratio that stands for it.
    pruning = config.pruning
    if pruning.target.kinds and "ratio" in pruning.model_fields_set:
        raise ConfigError(f"{path}: pruning: ratio and target.{pruning.target.kinds[0]} exclude each other; leave one")
    return _in_own_run(config, overrides)


def _config_path(named: Any) -> str:
    """Return the path of the file to read, for the value of ``config=`` or None."""
    if path := named or os.environ.get(PATH_VARIABLE):
        return str(path)
    if Path(DEFAULT_PATH).exists():
        return DEFAULT_PATH

    # A fresh install has no file yet, and should be able to run the demo. The note is no result, so it goes to stderr.
    print(f"there is no {DEFAULT_PATH} here: the demo's settings hold; name a file with config=PATH", file=sys.stderr)
    return str(DEMO_PATH)


def _preset(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that the study of the command line sets, unless the command line sets them itself."""
    name: Any = overrides.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        return {}

    # The cast is for the type checker, which does not conclude it from the look-up above.
    preset: dict[str, Any] = dict(STUDIES[cast(StudyName, name)].preset)
    if "tasks" in preset:
        # A task that the file describes, for example with another path, is taken from there.
        tasks = values.get("tasks") or ()
        described = {task["name"]: task for task in tasks if isinstance(task, dict) and "name" in task}
        preset["tasks"] = [described.get(task, task) for task in preset["tasks"]]

    return preset


def _in_own_run(config: Config, overrides: dict[str, Any]) -> Config:
    """Give a study of other tasks or another corpus a run of its own, ``<run.name>-<study>``."""
    if "study" not in overrides or not STUDIES[config.study].own_run:
        return config
    run = config.run.model_copy(update={"name": f"{config.run.name}-{config.study}"})
    return config.model_copy(update={"run": run})


def _take_back(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Take the file's ratio out of its values where the command line gives a target, and the other way round."""
    pruning = values.get("pruning")
    if not isinstance(pruning, dict):
        return
    has_target = any(f"{key}.".startswith("pruning.target.") for key in given)
    if has_target == ("pruning.ratio" in given):
        return
    values["pruning"] = {key: value for key, value in pruning.items() if key != ("ratio" if has_target else "target")}


def _split(argument: str) -> tuple[str, Any]:
    """Return key and value of an override."""
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"{argument!r} is not an override; write dotted.key=value, for example pruning.ratio=0.35")

    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is not valid YAML") from None


def _read(path: str) -> dict[str, Any]:
    """Return what a YAML file holds."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with config=PATH") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}: not valid YAML{f', see line {mark.line + 1}' if mark else ''}") from None

    # An empty file is read as None, and stands for all defaults.
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: should hold sections such as model: and pruning:")
    return values or {}


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a dotted key, with the sections above it where they are missing."""
    for i, key in enumerate(keys[:-1]):
        inner = values.get(key) or {}  # a section without keys is None in YAML
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)}: {'.'.join(keys[: i + 1])} is {inner!r} and has no keys")

        values[key] = dict(inner)  # a copy: what a study sets is shared by all that read it
        values = values[key]

    values[keys[-1]] = value


# --- errors ----------------------------------------------------------------------------------------------------------


def _one_line(error: ValidationError) -> str:
    """Return the first fault with its key, and what would be right."""
    # One fault is enough for one line; those that are left are told when it is mended.
    first = error.errors()[0]
    where = _where(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where, _siblings(where))}"

    # Pydantic's own words would name a class.
    if first["type"] == "model_type" and (keys := [key for key, _ in walk(Config) if key.startswith(f"{where}.")]):
        return f"{where}: is a section with keys of its own, such as {keys[0]}"

    # Pydantic puts this in front of what our own validators say.
    reason = first["msg"].removeprefix("Value error, ")
    # A whole mapping or list would not fit the line.
    if isinstance(first["input"], str | int | float) and where:
        reason += f", not {first['input']!r}"

    # A task without a path is most often a misspelt built-in name.
    if where == "tasks" or (where.endswith(".path") and first["type"] == "missing"):
        reason += f"; built-in tasks are {', '.join(BUILT_IN)}"

    return f"{where}: {reason}" if where else reason


def _where(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key of an error, without the name that pydantic gives the alternative of a union."""
    where = ".".join(str(part) for part in loc)
    above = where.rpartition(".")[0]
    unions = [key for key, field in walk(Config) if get_origin(field.annotation) is Union]
    return above if above in unions else where


def _siblings(where: str) -> list[str]:
    """Return keys that may have been meant by an unknown one: a task's, a baseline's, or any section and key."""
    above = where.rpartition(".")[0]

    # The keys of a task (tasks.0.path) and of a baseline (pruning.baselines.NAME.score) are in no section of Config.
    for listed, section in (("tasks", Task), ("pruning.baselines", Baseline)):
        if above.rpartition(".")[0] == listed:
            return [f"{above}.{key}" for key, _ in walk(section)]

    keys = [key for key, _ in walk(Config)]
    return [*keys, *sorted({key.rpartition(".")[0] for key in keys} - {""})]


# --- help ------------------------------------------------------------------------------------------------------------


def help_text(usage: str) -> str:
    """Return ``usage`` and every key with its meaning, default and possible values, for ``--help``."""
    lines = [usage.strip(), "", KEYS_TITLE, ""]

    titles = dict(_titles(Config))
    for key, field in walk(Config):
        section = key.rpartition(".")[0]
        if title := titles.pop(section, None):  # once, before the section's first key
            lines += ["", title, ""]

        lines += _key_help(key, f"= {_shown(field.default)}", field)

    lines += ["", "A task of your own is a mapping in the list `tasks`, with these keys:", ""]
    for key, field in walk(Task):
        lines += _key_help(key, "(required)" if field.is_required() else f"= {_shown(field.default)}", field)

    lines += ["", f"Built-in tasks: {', '.join(BUILT_IN)}"]
    return "\n".join(lines)


def _titles(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every section below ``section`` with its title."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield f"{prefix}{name}", f"{prefix}{name}: {inner.__doc__}"
            yield from _titles(inner, f"{prefix}{name}.")


def _key_help(key: str, default: str, field: Any) -> list[str]:
    """Return the lines of one key."""
    text = textwrap.wrap(field.description or "", HELP_WIDTH, initial_indent=HELP_INDENT, subsequent_indent=HELP_INDENT)
    return [f"  {key} {default}{_options(field.annotation)}", *text]


def _shown(default: Any) -> str:
    """Return a default as it would stand in the file; a list of tasks by their names."""
    if isinstance(default, tuple):
        return "[" + ", ".join(_shown(getattr(item, "name", item)) for item in default) + "]"
    if default is None:
        return "null"

    return str(default).lower() if isinstance(default, bool) else str(default)


def _options(annotation: Any) -> str:
    """Return the possible values of a key that has a few, in brackets."""
    literals: list[Any] = []
    # A Literal may stand alone or beside other types, as in ``int | Literal["auto"]``.
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            literals += get_args(part)

    # One value beside other types is explained by the key's text.
    return f"   ({' | '.join(map(str, literals))})" if len(literals) > 1 else ""
