"""What the doctor says of nodes, versions, storage and keys, and what keeps a job from starting."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.model_sources import parse_model_source
from seap_ray.pipeline import preflight as doctor
from seap_ray.pipeline.needs import CorpusSize, ModelSize, disk_needs, largest_corpora
from seap_ray.pipeline.preflight import (
    Finding,
    Node,
    _check_clocks,
    _check_corpora,
    _check_model,
    _check_storage,
    _check_versions_alike,
    check_config,
    corpus_sizes,
    family_findings,
    local_checks,
    needs_findings,
    raise_on_error,
)
from seap_ray.storage.run import Run
from tests.support import ROOT
from tests.support.builders import CONFIGS, MORE_CONFIGS

DEMO = Checkpoint.open("demo")
NODE = Node(
    name="a",
    versions={"torch": "2.13.0", "transformers": "5.19.0"},
    has_plugin=True,
    sees_storage=True,
    model=DEMO.fingerprint,
    unseen=(),
    clock=0.0,
)
OTHER = replace(NODE, name="b")


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def only(findings) -> Finding:
    (finding,) = findings
    return finding


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_whole_experts_of_a_model_that_has_none_are_refused(dense):
    settings = {"model": {"source": str(dense("llama_gqa"))}, "tasks": ["sort"], "pruning": {"mlp_unit": "expert"}}
    with pytest.raises(ConfigError, match=r"pruning.mlp_unit: expert is for mixtures of experts \(general\), .* llama"):
        check_config(Config.model_validate(settings), check_evaluation_rows=False)


def test_a_mixture_has_covariances_but_no_scores_of_units(dense, tmp_path):
    settings = {
        "model": {"source": str(dense("mixtral"))},
        "tasks": ["sort"],
        "calibration": {"statistics": "covariance"},
    }
    pruning = {"score": "obs", "compensation": "least_squares"}
    with pytest.raises(ConfigError, match="pruning.score: obs does not compare the channels of several MoE experts"):
        check_config(Config.model_validate({**settings, "pruning": pruning}), check_evaluation_rows=False)
    check_config(Config.model_validate(settings), check_evaluation_rows=False)


def test_nodes_that_are_alike_say_nothing():
    for check in (_check_versions_alike, _check_corpora, _check_clocks):
        assert not list(check([NODE, OTHER]))


def test_another_release_on_a_node_is_wrong_for_its_bits_would_differ():
    strange = replace(OTHER, versions={**NODE.versions, "torch": "2.12.0"})
    assert only(_check_versions_alike([NODE, strange])).level == "error"
    assert "torch is 2.13.0 on a, and 2.12.0 on b" in only(_check_versions_alike([NODE, strange])).message
    assert not list(_check_versions_alike([NODE, replace(OTHER, versions={**NODE.versions, "torch": "2.13.0+cpu"})])), (
        "another build"
    )


def test_a_node_without_the_plugin_is_a_warning():
    found = only(_check_versions_alike([NODE, replace(OTHER, has_plugin=False)]))
    assert found.level == "warning" and "no vLLM plugin on b" in found.message


def test_a_node_that_does_not_see_the_runs_folder_is_wrong(tmp_path):
    found = only(_check_storage(Config(), DEMO, Run(tmp_path), [NODE, replace(OTHER, sees_storage=False)]))
    assert found.level == "error" and f"run.storage: {tmp_path} is not seen by b" in found.message


@pytest.mark.parametrize(
    ("model", "level", "said"),
    [
        (DEMO.fingerprint, "ok", "2,735,520 parameters, 5.47 MB"),
        (None, "error", "is not on b"),
        ("else", "error", "differs on b"),
    ],
)
def test_the_model_is_to_be_the_same_on_every_node(model, level, said):
    found = only(_check_model(DEMO, [NODE, replace(OTHER, model=model)]))
    assert found.level == level and said in found.message


def test_a_model_of_the_hub_comes_to_the_nodes_that_do_not_have_it():
    cached = replace(DEMO, folder=Path("/cache/models--a--b/snapshots/0123"), source=parse_model_source("a/b"))
    found = only(_check_model(cached, [NODE, replace(OTHER, model=None)]))
    assert (found.level, found.message) == ("warning", "b will first copy 5.47 MB of a/b")


def test_a_corpus_that_a_node_does_not_have_is_wrong():
    assert (
        "tasks: /data/x is not on b" in only(_check_corpora([NODE, replace(OTHER, unseen=("/data/x", "/y"))])).message
    )


def test_a_clock_that_is_off_is_worth_a_word():
    assert levels(_check_clocks([NODE, replace(OTHER, skew=4.0)])) == []
    assert "b is 90 s off" in only(_check_clocks([NODE, replace(OTHER, skew=90.0)])).message


# --- disk ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_the_run_may_fill_is_a_warning_less_what_is_there(tmp_path, monkeypatch):
    config = Config()
    model = ModelSize.from_checkpoint(DEMO)
    needed = disk_needs(model, config, largest_corpora(config, model.architecture)).total
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": int(needed) - 1000}))

    assert only(_check_storage(config, DEMO, Run(tmp_path), [NODE])).level == "warning"
    (tmp_path / "records").write_bytes(bytes(1000))
    assert only(_check_storage(config, DEMO, Run(tmp_path), [NODE])).level == "ok"


# --- needs -----------------------------------------------------------------------------------------------------------


def test_needs_of_a_model_are_told_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEMO.config))
    lines = needs_findings(Config.model_validate({"model": {"source": str(tmp_path)}}), Run(tmp_path / "run"))
    assert [line.subject for line in lines] == ["needs"] * 4 and levels(lines) == ["ok"] * 4
    assert lines == needs_findings(Config(), Run(tmp_path / "run")), "the same as with the weights"
    assert lines[0].message.startswith("memory of a worker 6.57 MB (placement single)")
    assert needs_findings(Config.model_validate({"model": {"source": str(tmp_path / "none")}}), Run(tmp_path)) == []


def test_what_of_a_model_can_be_cut_is_told_from_its_config_alone(tmp_path):
    config = Config.model_validate({"model": {"source": str(tmp_path)}})
    assert family_findings(config) == []

    told = {
        "olmo2": "attention stays whole, since",
        "dots1": "query heads and key-value heads; vLLM serves a stock export",
        "falcon_h1": "vLLM serves a stock export",
        "deepseek_v3": "vLLM does not serve it",
        "phimoe": "vLLM does not serve it",
        "gemma2": "query heads, equally many",
        "llama_gqa": "query heads and",
    }
    for name, part in told.items():
        (tmp_path / "config.json").write_text(json.dumps((MORE_CONFIGS | CONFIGS)[name]().to_dict()))
        assert part in only(family_findings(config)).message
    assert "vLLM serves it by its own layers" in only(family_findings(config)).message

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="'mamba' is not supported: its layers mix tokens by a recurrent state"):
        family_findings(config)


def test_needs_of_a_model_of_the_hub_take_its_config_and_no_weight(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEMO.config))
    asked = []

    def download(*arguments, **settings):
        asked.append((arguments, settings))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = Config.model_validate({"model": {"source": "owner/name", "revision": "v2"}})
    disk = needs_findings(config, Run(tmp_path / "run"))[2].message

    assert asked == [(("owner/name", "config.json"), {"revision": "v2"})]
    assert disk.endswith("; and 5.47 MB for the model in each node's cache")


def test_without_a_config_to_be_had_nothing_is_said_of_needs(monkeypatch, tmp_path):
    def download(*_arguments, **_settings):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert needs_findings(Config.model_validate({"model": {"source": "owner/name"}}), Run(tmp_path)) == []


def test_the_shards_of_a_run_count_in_place_of_the_longest_possible(tmp_path):
    run = Run(tmp_path)
    model = ModelSize.from_checkpoint(DEMO)
    folder = run.shards("sort")
    folder.mkdir(parents=True)
    shards = [{"n_sequences": 64, "n_tokens": 1200}, {"n_sequences": 36, "n_tokens": 700}]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))
    sizes = corpus_sizes(Config(), model, run)

    assert sizes["sort"] == CorpusSize(100, 1900, 2)
    assert sizes["logic"] == CorpusSize(200, 200 * 256, 4), "the demo's longest sequence is 256"


# --- here ------------------------------------------------------------------------------------------------------------


def test_versions_beside_those_tested_are_named(monkeypatch):
    assert [finding for finding in local_checks(Config()) if finding.subject == "versions"][0].level == "ok"
    monkeypatch.setattr(doctor, "requires", lambda _name: ["torch==9.*", "ray[data]>=2", "x; extra == 'dev'"])
    said = [finding for finding in local_checks(Config()) if finding.subject == "versions"]
    assert said[0].level == "warning" and re.search(r"not tested with torch 2\.", said[0].message)


def test_keys_and_tokens_that_will_be_missed_are_warned_of(monkeypatch, tmp_path):
    monkeypatch.delenv("SEAP_API_KEYS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    config = Config.model_validate({"model": {"source": "meta-llama/Llama-3.1-8B"}})
    found = {finding.subject: finding for finding in local_checks(config)}

    assert found["keys"].level == found["hub"].level == "warning" and "meta-llama/Llama-3.1-8B" in found["hub"].message
    monkeypatch.setenv("SEAP_API_KEYS", "a-key-of-mine")
    found = {finding.subject: finding for finding in local_checks(Config())}

    assert "keys" not in found and "hub" not in found
    assert not any("a-key-of-mine" in finding.message for finding in local_checks(Config()))


def test_a_job_heeds_what_is_wrong_and_says_what_it_is_warned_of(capsys):
    findings = [Finding("ok", "a", "fine"), Finding("warning", "b", "mind"), Finding("error", "c", "x: mend it")]
    with pytest.raises(ConfigError, match="^x: mend it$"):
        raise_on_error(findings)
    assert capsys.readouterr().out == "warning: b: mind\n"


# --- on a real cluster -----------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_doctor_says_what_one_machine_has(cluster, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "jobs" / "doctor.py"))["main"]
    assert main([f"config={ROOT / 'ray_config.yaml'}", f"run.storage={tmp_path}"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}

    subjects = [line.split()[1] for line in lines]
    assert [name for name in subjects if name in ("cluster", "storage", "model", "workers")] == [
        "cluster",
        "storage",
        "model",
        "workers",
    ]
    assert subjects.count("needs") == 4
    assert any("2, each of 1 CPUs and 0 GPUs; placement single" in line for line in lines)
    assert not list((tmp_path / "demo").glob(".probe*"))


@pytest.mark.ray
@pytest.mark.skipif(os.geteuid() != 0, reason="a node with another view of the disk takes a mount, which needs root")
def test_a_job_is_refused_where_a_node_has_another_disk_under_the_same_path(tmp_path):
    """Two real raylets; the second sees an empty file system where the run lies."""
    storage = tmp_path / "storage"
    storage.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    address = cluster.address
    hidden = f"mount -t tmpfs tmpfs {storage} && exec {Path(sys.executable).parent}/ray start --address={address}"
    node = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", f"{hidden} --num-cpus=1 --block"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        doctor_job = [sys.executable, "jobs/doctor.py", f"run.storage={storage}"]
        environment = {**os.environ, "RAY_ADDRESS": address}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            done = subprocess.run(doctor_job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            if "2 nodes" in done.stdout or node.poll() is not None:
                break
        if node.poll() is not None:
            pytest.skip("mounting is not allowed here")
        assert done.returncode == 2, done.stdout + done.stderr
        assert re.search(r"error +storage +run.storage: .*storage/demo is not seen by .*; choose a folder", done.stdout)
        job = subprocess.run(
            [sys.executable, "jobs/prune.py", f"run.storage={storage}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert job.returncode == 2 and "error: run.storage: " in job.stderr and len(job.stderr.splitlines()) == 1
        assert not (storage / "demo" / "shards").exists()
    finally:
        node.terminate()
        node.wait(60)
        cluster.shutdown()
