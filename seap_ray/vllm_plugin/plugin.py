"""vLLM plugin: names the compacted families to vLLM. vLLM calls ``register`` in each of its processes, by the entry
point ``vllm.general_plugins`` of the installed package. Imports no vLLM until it is called.
"""

import multiprocessing
import os
import threading
from functools import cache
from importlib.metadata import entry_points

from seap_ray.core.architecture import FAMILIES
from seap_ray.errors import ConfigError

NAME = "seap_ray"
ARCHITECTURES = {family.model_class: family.vllm_class for family in FAMILIES.values() if family.vllm_class}
"""By the names in a checkpoint's config.json, the classes that serve them."""
LOAD_FORMAT = "seap_ray"
"""vLLM's name of the loader that reads only what differs (``vllm_loader``)."""
END_WITH_PARENT = "SEAP_RAY_END_WITH_PARENT"
"""Environment variable that the service sets for its engines."""


def register() -> None:
    """Make vLLM load compacted checkpoints. May be called again."""
    if os.environ.get(END_WITH_PARENT):
        _end_with_parent()
    from vllm import ModelRegistry

    import seap_ray.models.hf  # noqa: F401  names the configurations to transformers

    _register_loader()

    for architecture, served_by in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            # By name: importing the class would start CUDA in processes that only look at configurations.
            ModelRegistry.register_model(architecture, f"seap_ray.vllm_plugin.model:{served_by}")


@cache  # vLLM warns of a second time
def _register_loader() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from seap_ray.vllm_plugin.loader import ExpertLoader

    register_model_loader(LOAD_FORMAT)(ExpertLoader)


@cache
def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: an engine that outlives its server keeps
    its memory and answers nobody."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


def check_registered() -> None:
    """Raises ConfigError when vLLM in this environment would not find the plugin.

    vLLM only logs a plugin that it cannot load, and then calls the architecture unknown.
    """
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == NAME]
    if not found:
        raise ConfigError(
            "the vLLM plugin of seap_ray is not installed in this environment, and a working folder alone does not "
            "carry it: run `python3 -m seap_ray.install`, or `pip install .` in the image of every node"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading seap_ray; add {NAME} to it")
    try:
        found[0].load()()
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); run `python3 -m seap_ray.install`") from None
