"""App: builds the application for Ray Serve's own commands.

    serve run serve.app:build run.name=demo
    serve deploy serve.app:build run.name=demo

The arguments are those of every entry point: config=ray_config.yaml and dotted.key=value.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.serve import Application

from seap_ray.config import load_config
from seap_ray.errors import SeapError
from seap_ray.vllm_plugin.plugin import check_registered


def build(args: Mapping[str, Any]) -> Application:
    """Return the application that ``args`` describe.

    An error that the user can fix ends ``serve run`` with one line.
    """
    try:
        # Through the texts of a command line, so that every entry point reads and refuses keys alike.
        config = load_config([f"{key}={value}" for key, value in _dotted(args)])
        check_registered()

        # These import vLLM. Where it is missing, the check above says so in one line, and an import would not.
        from serve.application import application, prepare
        from serve.engines import engine_groups
        from serve.gate import prepare_environment

        service = prepare(config)
    except SeapError as error:
        if ray.is_initialized():  # `serve deploy` builds inside the cluster, and `serve status` shows the error
            raise
        raise SystemExit(f"error: {error}") from None

    if not ray.is_initialized():  # `serve run` starts or joins a cluster after this
        prepare_environment()

    groups, reason = engine_groups(config, service.experts)
    print(reason, flush=True)
    return application(config, service, groups)


def _dotted(args: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield arguments as dotted keys and texts, as on a command line; a YAML file may nest them."""
    for key, value in args.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            # JSON is YAML, which is what the values of overrides are read as; a text is YAML already.
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
