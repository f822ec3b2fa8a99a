"""Rings: no module imports from a ring above its own, and only the outer ones know Ray or transformers."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RINGS = {
    0: "config methods command errors tasks architecture moments kernels scores reconstruction sparsity plan compact "
    "progress table paper install demo demo.skills bucket",
    1: "storage lock run corpus recorder layerwise records checkpoint compaction fitting router quality harness speed "
    "summary evidence pictures anatomy findings report "
    "hf hf.configuration_seap hf.modeling_seap hf.shapes demo.train "
    "benchmarks benchmarks.measure benchmarks.shapes benchmarks.gpu benchmarks.gpu.device "
    "benchmarks.gpu.calibration benchmarks.gpu.statistics benchmarks.gpu.stream benchmarks.gpu.decoding "
    "benchmarks.gpu.engine benchmarks.gpu.linears",
    2: "cluster shards placement calibrate planner prune evaluation results doctor job bench studies "
    "benchmarks.calibrate benchmarks.merge benchmarks.plan "
    "benchmarks.compact benchmarks.startup benchmarks.official",
    3: "vllm_plugin vllm_model vllm_loader benchmarks.load benchmarks.serve benchmarks.route benchmarks.suites "
    "benchmarks.gpu.served benchmarks.gpu.__main__",
}
RING_OF = {"seap_ray": 0} | {f"seap_ray.{name}": ring for ring, names in RINGS.items() for name in names.split()}
OUTER = {"transformers": 1, "datasets": 1, "safetensors": 1, "tokenizers": 1, "sklearn": 1, "ray": 2, "vllm": 3}
"""Packages and the first ring that may import them."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "seap_ray").rglob("*.py"))
}


def imported(module):
    """Every module that a file imports, at its top or inside a function, for types or for real."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(filter(None, (above, node.module)))
            below = {f"{name}.{alias.name}" for alias in node.names}
            yield from below & FILES.keys() or {name}


def test_every_module_has_a_ring():
    assert set(RING_OF) == set(FILES), "name new modules in RINGS, and in CONTRIBUTING.md"


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_imported_from_a_ring_above(module):
    for name in imported(module):
        ring = RING_OF[name] if name.startswith("seap_ray") else OUTER.get(name.partition(".")[0], 0)
        assert ring <= RING_OF[module], f"{module} is of ring {RING_OF[module]}, {name} of ring {ring}"


def test_the_rings_can_tell():
    assert "seap_ray.checkpoint" in imported("seap_ray.corpus") and "transformers" in imported("seap_ray.corpus")
    assert "seap_ray.hf.configuration_seap" in imported("seap_ray.hf.modeling_seap"), "relative imports"
    assert "seap_ray.demo.skills" in imported("seap_ray.shards"), "imports inside functions, modules from packages"
    assert "ray" in imported("seap_ray.shards")


def test_the_installer_runs_on_a_bare_python():
    names = {name.partition(".")[0] for name in imported("seap_ray.install")}
    assert names <= set(sys.stdlib_module_names)


def test_code_that_travels_with_a_checkpoint_needs_transformers_alone():
    for module in ("seap_ray.hf.configuration_seap", "seap_ray.hf.modeling_seap"):
        others = {name for name in imported(module) if not name.startswith("seap_ray.hf.")}
        known = {"transformers", "torch", "huggingface_hub", *sys.stdlib_module_names}
        assert {name.partition(".")[0] for name in others} <= known


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import seap_ray", "numpy torch ray transformers vllm datasets pydantic"),
        ("import seap_ray.config, seap_ray.tasks, seap_ray.errors", "numpy torch ray transformers vllm datasets"),
        ("import seap_ray.plan, seap_ray.compact, seap_ray.scores", "ray transformers vllm datasets"),
        ("import seap_ray.router", "torch ray transformers vllm datasets sklearn scipy"),
        ("import seap_ray.demo.skills", "numpy torch ray transformers vllm datasets"),
    ],
)
def test_a_fresh_interpreter_stays_light(statement, absent):
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(absent.split()) & set(json.loads(done.stdout))
