"""Plugin: makes the compacted families known to vLLM.

vLLM calls ``register`` in each of its processes, because the installed package names it in the entry point group
``vllm.general_plugins``. This module imports no vLLM until then.
"""

import multiprocessing
import os
import threading
from functools import cache
from importlib.metadata import entry_points

from seap_ray.core.families import FAMILIES
from seap_ray.errors import ConfigError

NAME = "seap_ray"
ARCHITECTURES = {family.model_class: family.vllm_class for family in FAMILIES.values()}
"""Classes of ``seap_ray.vllm_plugin.model`` by the architecture's name in a checkpoint's config.json."""
LOAD_FORMAT = "seap_ray"
"""Value of vLLM's ``load_format`` that selects the loader which reads only the files that differ."""
END_WITH_PARENT = "SEAP_RAY_END_WITH_PARENT"
"""Environment variable that the service sets for its engines, so that they end when their server does."""


def register() -> None:
    """Register every compacted family and the loader with vLLM, and limit its chat templates.

    A second call changes nothing.
    """
    # vLLM calls this in every process of an engine, so it is the place for what each of them should do at its start.
    if os.environ.get(END_WITH_PARENT):
        _end_with_parent()

    from vllm import ModelRegistry

    import seap_ray.models.hf  # noqa: F401  registers the configurations with transformers
    from seap_ray.models.template_limits import limit_chat_templates

    limit_chat_templates()
    _register_loader()
    for architecture, served_by in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            # A name and not a class: importing it would start CUDA in processes that only read configurations.
            ModelRegistry.register_model(architecture, f"seap_ray.vllm_plugin.model:{served_by}")


@cache  # vLLM warns when a loader is registered twice
def _register_loader() -> None:
    """Register the loader under ``LOAD_FORMAT``."""
    from vllm.model_executor.model_loader import register_model_loader

    from seap_ray.vllm_plugin.loader import ExpertLoader

    register_model_loader(LOAD_FORMAT)(ExpertLoader)


@cache  # one thread is enough
def _end_with_parent() -> None:
    """End this process when the one that started it is gone, for whatever reason.

    An engine that outlives its server keeps its memory and answers nobody.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # not started by vLLM, such as the server itself
        return

    def wait() -> None:
        """Wait for the parent's end, then end at once: an exit in order would wait for the engine's own threads."""
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


def check_registered() -> None:
    """Check that vLLM in this environment finds the plugin.

    vLLM itself only logs a plugin that it cannot load, and then reports an unknown architecture.

    Raises:
        ConfigError: The package is not installed here, ``VLLM_PLUGINS`` leaves it out, or vLLM cannot be imported.
    """
    plugins = [point for point in entry_points(group="vllm.general_plugins") if point.name == NAME]
    if not plugins:
        raise ConfigError(
            "the vLLM plugin of seap_ray is not installed in this environment, and a working folder alone does not "
            "carry it: run `python3 -m seap_ray.install`, or `pip install .` in the image of every node"
        )

    # The variable is a list of the plugins that vLLM loads; without it vLLM loads all.
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading seap_ray; add {NAME} to it")

    # Called here as vLLM would call it, since vLLM logs its error and goes on.
    try:
        register_with_vllm = plugins[0].load()
        register_with_vllm()
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); run `python3 -m seap_ray.install`") from None
