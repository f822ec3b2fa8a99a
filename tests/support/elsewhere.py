"""A Python process on a machine where seap_ray is not installed."""

WITHOUT_SEAP_RAY = """
import json, sys

class NoSeapRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "seap_ray":
            raise ImportError("seap_ray is not installed here")

sys.meta_path.insert(0, NoSeapRay())
"""
"""Beginning of such a process's code: no import finds the package, though it lies on the path."""
