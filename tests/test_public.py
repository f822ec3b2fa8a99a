"""Public surface: the names that ``import seap_ray`` offers, each loaded when it is first used."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_lock_file_pins_every_dependency_with_hashes_and_names_no_source():
    text = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9._-]+)==(\S+) .*\\\n    --hash=sha256:", text, re.M)
    assert len(pins) == len(re.findall(r"^\S+==", text, re.M)) and "://" not in text

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = ("gpu", "eval", "formats", "quantization", "dev", "docs")
    assert {*extras} == {"cpu", *locked}, "the command in CONTRIBUTING.md names all but cpu"
    named = [dependency for extra in locked for dependency in extras[extra]]
    for dependency in (*project["dependencies"], *named):
        requirement = Requirement(dependency)
        # A package may have a version for each of several Pythons.
        versions = [version for name, version in pins if name == canonicalize_name(requirement.name)]
        assert versions and all(map(requirement.specifier.contains, versions)), dependency
