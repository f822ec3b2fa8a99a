"""Public surface: the names that ``import seap_ray`` offers, each loaded when it is first used."""

import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest

import seap_ray
from tests.support import ROOT


def test_every_public_name_is_there_and_listed():
    for name in seap_ray.__all__:
        assert getattr(seap_ray, name) is not None
        assert name in dir(seap_ray)


def test_the_version_is_that_of_the_installed_package():
    assert seap_ray.__version__ == version("seap-ray")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="seap_ray.*nothing"):
        seap_ray.nothing  # noqa: B018


def test_a_fresh_interpreter_loads_a_name_when_it_is_used():
    code = """
import sys, seap_ray
assert "torch" not in sys.modules
from seap_ray import *
assert "torch" in sys.modules and Architecture.__module__ == "seap_ray.core.architecture"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_lock_file_is_of_this_project_and_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (own,) = (package for package in packages if package["name"] == project["name"])
    assert own["version"] == project["version"]
    assert {*own["optional-dependencies"]} >= {*project["optional-dependencies"]} - {"cpu"}

    sources = {package["source"]["registry"] for package in packages if package is not own}
    assert len(sources) == 1 and all(source.startswith("https://") for source in sources)
