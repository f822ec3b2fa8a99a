"""Quick imports: transformers without the seconds that each new process would spend on what no model here uses."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

DEFERRED = {"sklearn.metrics": "roc_curve", "scipy.optimize": "linear_sum_assignment"}
"""Functions that transformers takes from other packages when it is imported, by their modules.

It needs them in assisted generation and for objects in pictures. Their packages, with pandas, take a second and more.
"""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import transformers, and what it brings, in two thirds of the time; no behaviour changes.

    The functions of ``DEFERRED`` import their modules at their first call. Python's garbage collector waits: it would
    look a hundred times through objects that all stay.
    """
    stand_ins = {name: _stand_in(name) for name in DEFERRED if name not in sys.modules}
    sys.modules.update(stand_ins)
    collects = gc.isenabled()
    gc.disable()

    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name, stand_in in stand_ins.items():
            _remove(name, stand_in)


def _stand_in(name: str) -> ModuleType:
    """Return a module that has the function of ``DEFERRED``, and becomes the true one for whoever asks for more."""
    stand_in = ModuleType(name)

    def attribute(attribute_name: str) -> Any:
        """Return an attribute of the true module. Dunder names are asked for by the import system itself."""
        if attribute_name.startswith("__"):
            raise AttributeError(attribute_name)
        _remove(name, stand_in)
        return getattr(import_module(name), attribute_name)

    setattr(stand_in, DEFERRED[name], _deferred(name, DEFERRED[name]))
    stand_in.__getattr__ = attribute  # type: ignore[method-assign]
    return stand_in


def _deferred(module: str, function: str) -> Callable[..., Any]:
    """Return a function that imports another one when it is called, and calls that."""

    def call(*arguments: Any, **named: Any) -> Any:
        """Import the function, and call it."""
        return getattr(import_module(module), function)(*arguments, **named)

    return call


def _remove(name: str, stand_in: ModuleType) -> None:
    """Let the next import of a module find the true one."""
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
