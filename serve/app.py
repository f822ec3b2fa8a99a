"""App: what Ray Serve's own commands call.

    serve run serve.app:build run.name=demo
    serve deploy serve.app:build run.name=demo

Arguments are those of every entry point: config=ray_config.yaml and dotted.key=value.
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
    """The application that ``args`` describe; what a user can mend ends ``serve run`` with one line."""
    try:
        config = load_config([f"{key}={value}" for key, value in _flat(args)])
        check_registered()
        from serve.application import application, prepare  # these need vLLM, and would not say so in one line
        from serve.gate import close_environment
        from serve.packs import packs

        service = prepare(config)
    except SeapError as error:
        if ray.is_initialized():  # inside the cluster, for `serve deploy`: `serve status` shows the error
            raise
        raise SystemExit(f"error: {error}") from None
    if not ray.is_initialized():  # `serve run` starts a cluster, or joins one, after this
        close_environment()
    engines, why = packs(config, service.experts)
    print(why, flush=True)
    return application(config, service, engines)


def _flat(args: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Arguments as they stand on a command line; a YAML file may nest them."""
    for key, value in args.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
