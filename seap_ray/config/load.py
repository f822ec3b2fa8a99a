"""Load: ``ray_config.yaml`` and ``dotted.key=value`` overrides in, one frozen ``Config`` out; the help of every key."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError

from seap_ray.config.schema import Baseline, Config, nearest, walk
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES, StudyName
from seap_ray.tasks import BUILT_IN, Task

DEFAULT_PATH = "ray_config.yaml"
PATH_VARIABLE = "SEAP_RAY_CONFIG"


def load_config(arguments: Sequence[str]) -> Config:
    """Read the file that ``config=PATH`` names (or the default one) and apply ``dotted.key=value`` arguments.

    Raises ConfigError, one line that names the file, the key and what would be right.
    """
    overrides = dict(_split(argument) for argument in arguments)
    path = overrides.pop("config", None) or os.environ.get(PATH_VARIABLE) or DEFAULT_PATH
    values = _read(str(path))
    for key, value in {**_preset(values, overrides), **overrides}.items():
        _set(values, key.split("."), value)
    try:
        return _in_own_run(Config.model_validate(values), overrides)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None


def _preset(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Keys that the study of the command line sets, unless the command line sets them itself."""
    name: Any = overrides.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        return {}
    preset: dict[str, Any] = dict(STUDIES[cast(StudyName, name)].preset)
    if "tasks" in preset:  # where the file says of one of them where it lies, that holds
        told = {task["name"]: task for task in values.get("tasks") or () if isinstance(task, dict) and "name" in task}
        preset["tasks"] = [told.get(task, task) for task in preset["tasks"]]
    return preset


def _in_own_run(config: Config, overrides: dict[str, Any]) -> Config:
    """A study of other tasks or another corpus has a run of its own, ``<run.name>-<study>``."""
    if "study" not in overrides or not STUDIES[config.study].own_run:
        return config
    return config.model_copy(
        update={"run": config.run.model_copy(update={"name": f"{config.run.name}-{config.study}"})}
    )


def _split(argument: str) -> tuple[str, Any]:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"{argument!r} is no override; write dotted.key=value, for example pruning.ratio=0.35")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is no YAML value") from None


def _read(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with config=PATH") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}: no YAML{f', see line {mark.line + 1}' if mark else ''}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: should hold sections such as model: and pruning:")
    return values or {}


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys[:-1]):
        inner = values.get(key) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)}: {'.'.join(keys[: i + 1])} is {inner!r} and has no keys")
        values[key] = dict(inner)
        values = values[key]
    values[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = _where(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where, _siblings(where))}"
    reason = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float) and where:
        reason += f", not {first['input']!r}"
    if where == "tasks" or where.endswith(".path") and first["type"] == "missing":
        reason += f"; built-in tasks are {', '.join(BUILT_IN)}"
    return f"{where}: {reason}" if where else reason


def _where(loc: tuple[int | str, ...]) -> str:
    """Dotted key of an error, without the name that pydantic gives the alternative of a union."""
    where = ".".join(str(part) for part in loc)
    above = where.rpartition(".")[0]
    unions = [key for key, field in walk(Config) if get_origin(field.annotation) is Union]
    return above if above in unions else where


def _siblings(where: str) -> list[str]:
    """Keys that may have been meant by an unknown one: a task's, a baseline's, or any section and key."""
    above = where.rpartition(".")[0]
    for listed, section in (("tasks", Task), ("pruning.baselines", Baseline)):
        if above.rpartition(".")[0] == listed:
            return [f"{above}.{key}" for key, _ in walk(section)]
    keys = [key for key, _ in walk(Config)]
    return [*keys, *sorted({key.rpartition(".")[0] for key in keys} - {""})]


def help_text(usage: str) -> str:
    """Every key with its meaning, default and possible values, for ``--help``."""
    lines = [usage.strip(), "", "Keys of ray_config.yaml; on the command line: dotted.key=value", ""]
    for key, field in walk(Config):
        lines.append(f"  {key} = {_shown(field.default)}{_options(field.annotation)}")
        lines += textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "A task of your own is a mapping in the list `tasks`, with these keys:", ""]
    for key, field in walk(Task):
        shown = "(required)" if field.is_required() else f"= {_shown(field.default)}"
        lines.append(f"  {key} {shown}{_options(field.annotation)}")
        lines += textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", f"Built-in tasks: {', '.join(BUILT_IN)}"]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return "[" + ", ".join(_shown(getattr(item, "name", item)) for item in default) + "]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _options(annotation: Any) -> str:
    literals = [
        value for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal for value in get_args(part)
    ]
    return f"   ({' | '.join(map(str, literals))})" if len(literals) > 1 else ""
