"""Layers: the import contracts of pyproject.toml hold, and what must stay light does."""

import ast
import json
import subprocess
import sys

import pytest

from tests.support import ROOT


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def imported(path):
    """Top-level packages that a file imports, at its top or inside a function; of its own package none."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_imports_run_downhill():
    done = run("-c", "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())")
    assert done.returncode == 0, done.stdout


def test_every_folder_has_a_layer():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name.strip() for layer in contracts[0]["layers"] for name in layer.split("|")}
    rooms = {f"seap_ray.{path.stem}" for path in (ROOT / "seap_ray").iterdir() if path.suffix in ("", ".py")}
    apart = {"seap_ray.__init__", "seap_ray.__pycache__", "seap_ray.install", "seap_ray.py"}
    assert rooms - apart == {layer for layer in layers if layer.startswith("seap_ray.")}


def test_the_installer_runs_on_a_bare_python():
    assert {*imported("seap_ray/install.py")} <= {*sys.stdlib_module_names}


def test_code_that_travels_with_a_checkpoint_needs_transformers_alone():
    known = {"transformers", "torch", "huggingface_hub", *sys.stdlib_module_names}
    for file in ("configuration_seap.py", "modeling_seap.py"):
        assert {*imported(f"seap_ray/models/hf/{file}")} <= known


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import seap_ray", "numpy torch ray transformers vllm datasets pydantic"),
        ("import seap_ray.config, seap_ray.tasks, seap_ray.errors", "numpy torch ray transformers vllm datasets"),
        ("import seap_ray.core.plan, seap_ray.core.slicing, seap_ray.core.scores", "ray transformers vllm datasets"),
        ("import seap_ray.routing.router", "torch ray transformers vllm datasets sklearn scipy"),
        ("import seap_ray.demo.skills", "numpy torch ray transformers vllm datasets"),
    ],
)
def test_a_fresh_interpreter_stays_light(statement, absent):
    done = run("-c", f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(absent.split()) & set(json.loads(done.stdout))
