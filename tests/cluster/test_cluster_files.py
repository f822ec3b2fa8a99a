"""The files in cluster/, as Ray's launcher, KubeRay, Ray Serve and our own config read them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from seap_ray.config import load_config
from serve.app import _dotted
from tests.support import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SPEC = {"RayCluster": ["spec"], "RayJob": ["spec", "rayClusterSpec"], "RayService": ["spec", "rayClusterConfig"]}
"""Where each kind has its cluster."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def cluster_of(manifest: dict) -> dict:
    found = manifest
    for key in SPEC[manifest["kind"]]:
        found = found[key]
    return found


def ids(path: Path) -> str:
    return path.stem


# --- Ray's launcher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHER, ids=ids)
def test_the_launcher_accepts_its_files(path):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(path), schema)
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", LAUNCHER, ids=ids)
def test_a_launched_head_does_no_work_and_shows_its_dashboard_to_nobody_else(path):
    config = read(path)
    start = next(command for command in config["head_start_ray_commands"] if "--head" in command)
    types = config.get("available_node_types")
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0 if types else "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start, "without it no worker is launched"
    assert "RAY_AUTH_MODE=token" in path.read_text()
    if types:
        assert types["gpu"]["max_workers"] <= config["max_workers"]


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def test_there_is_a_manifest_of_each_kind():
    assert {read(path)["kind"] for path in KUBERAY} == set(SPEC)
    assert {read(path)["apiVersion"] for path in KUBERAY} == {"ray.io/v1"}


@pytest.mark.parametrize("path", KUBERAY, ids=ids)
def test_a_manifest_has_a_token_a_head_without_work_and_workers_with_gpus(path):
    spec = cluster_of(read(path))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    head, worker = (of["template"]["spec"] for of in (spec["headGroupSpec"], workers))
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for pod in (head, worker):
        (container,) = pod["containers"]
        assert container["image"] == head["containers"][0]["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", KUBERAY, ids=ids)
def test_the_ray_of_a_manifest_is_the_one_that_is_tested(path):
    assert cluster_of(read(path))["rayVersion"] == ray.__version__


@pytest.mark.parametrize("path", KUBERAY, ids=ids)
@pytest.mark.skipif("SEAP_RAY_KUBERAY_CRDS" not in os.environ, reason="SEAP_RAY_KUBERAY_CRDS: KubeRay's folder of CRDs")
def test_kuberays_published_schema_accepts_a_manifest(path):
    """Strictly: a key that the schema does not know, which the API server would drop in silence, fails."""
    manifest = read(path)
    crd = read(Path(os.environ["SEAP_RAY_KUBERAY_CRDS"]) / f"ray.io_{manifest['kind'].lower()}s.yaml")
    version = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
    jsonschema.validate(manifest, closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """A CRD's schema as JSON schema: no other keys than those it has, and integers or strings where it says so."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key != "x-kubernetes-int-or-string"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
        if set(schema["properties"]) >= {"apiVersion", "kind", "metadata"}:
            made["properties"] = {**made["properties"], "metadata": {}}
    return made


def test_the_job_of_a_manifest_has_a_valid_config():
    job = next(read(path) for path in KUBERAY if read(path)["kind"] == "RayJob")
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script.removeprefix("/app/")).is_file()
    config = load_config([argument.replace("/app/", f"{ROOT}/") for argument in arguments])
    assert config.run.name == "llama70b" and config.calibration.num_gpus == 1 and config.evaluation.samples == 0


# --- Ray Serve -------------------------------------------------------------------------------------------------------


def serve_configs() -> dict[str, Any]:
    service = next(read(path) for path in KUBERAY if read(path)["kind"] == "RayService")
    return {
        "serve.yaml": read(CLUSTER / "serve.yaml"),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", serve_configs())
def test_serve_accepts_its_configs_and_so_do_we(name):
    (application,) = ServeDeploySchema.model_validate(serve_configs()[name]).applications
    assert application.import_path == "serve.app:build" and application.args["config"] == "/app/ray_config.yaml"
    arguments = {**application.args, "config": str(ROOT / "ray_config.yaml")}
    config = load_config([f"{key}={value}" for key, value in _dotted(arguments)])
    assert config.serve.num_gpus == 1 and config.run.name == "llama8b"


# --- the image -------------------------------------------------------------------------------------------------------


def steps(keyword: str) -> list[str]:
    text = (CLUSTER / "Dockerfile").read_text()
    return re.findall(rf"^{keyword} (.+)$", text, re.M)


def test_the_image_holds_the_tree_where_manifests_look_for_it():
    assert steps("WORKDIR") == ["/app"] and steps("COPY") == ["--chown=ray . /app"] and steps("USER") == ["ray"]
    environment = " ".join(steps("ENV"))
    assert "PYTHONPATH=/app" in environment and "PATH=/opt/seap_ray/bin" in environment


@pytest.mark.slow
@pytest.mark.skipif("SEAP_RAY_IMAGE" not in os.environ, reason="SEAP_RAY_IMAGE=1 runs the image's steps: some minutes")
def test_the_steps_of_the_image_leave_a_working_environment(tmp_path):
    app, venv = tmp_path / "app", tmp_path / "seap_ray"
    subprocess.run(["git", "clone", "--quiet", ROOT, app], check=True)
    (install,) = [step for step in steps("RUN") if "seap_ray.install" in step]
    script = install.replace("/opt/seap_ray", str(venv)).replace("python3 ", f"{sys.executable} ", 1)
    environment = {"VLLM": "cpu", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["bash", "-euc", script], cwd=app, env=environment, check=True, timeout=1200)
    shutil.rmtree(app / ".venv", ignore_errors=True)
    job = [venv / "bin" / "python", app / "jobs" / "prune.py", f"config={app}/ray_config.yaml", "--help"]
    said = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and "pruning.ratio" in said.stdout, said.stderr
    assert (venv / "bin" / "ray").exists()
