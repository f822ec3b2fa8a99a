"""The main job on a real Ray cluster: whole, resumed, killed, re-planned, refused, submitted."""

import contextlib
import json
import os
import re
import runpy
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import seap_ray.models.hf  # noqa: F401
from seap_ray.config import Config, load_config
from seap_ray.errors import ConfigError, DataError, IncompleteError, SeapError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import SHARED as BASE_FILES
from seap_ray.pipeline.calibrate import Calibrator
from seap_ray.pipeline.job import CalibratedRun, route
from seap_ray.pipeline.needs import ModelSize, disk_needs
from seap_ray.pipeline.preflight import corpus_sizes
from seap_ray.pipeline.ray_errors import known_error
from seap_ray.routing.router import Router
from seap_ray.storage.run import Run
from tests.support import DATA, NOTHING_TO_JUDGE, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("undrawn")]

WIKITEXT = DATA / "tasks" / "wikitext2"
REAL = {
    "boolq": f"path: {DATA / 'tasks' / 'boolq'}, evaluation_split: test",
    "piqa": f"path: {DATA / 'tasks' / 'piqa'}",
    "gsm8k": f"path: {DATA / 'tasks' / 'gsm8k'}",
    "wikitext2": f"path: {WIKITEXT}/wiki_train_raw_first1MB.txt, evaluation_path: {WIKITEXT}/raw_test_0000.parquet",
}
"""Built-in tasks on local files, with what their files ask for."""
SMALL = [
    "model.dtype=float32",
    "tasks=[arithmetic, logic]",
    "corpus.samples=48",
    "corpus.shard_sequences=8",
    "calibration.workers=1",  # each is a process that imports torch and transformers
    "evaluation.samples=12",
    "pruning.ratio=0.5",
    "pruning.baselines={}",
    *(f"{key}={value}" for key, value in NOTHING_TO_JUDGE.items()),
]
UNJUDGED = "evaluation.samples=0"
main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]


def arguments(storage: Path, *more: str) -> list[str]:
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", "run.name=run", *SMALL, *more]


def run_of(storage: Path) -> Run:
    return Run(storage / "run")


def records(storage: Path) -> list[Path]:
    return sorted((storage / "run" / "records").glob("*/*.safetensors"))


def statistics(storage: Path) -> dict[str, bytes]:
    """Moments, weight norms, and covariances."""
    folder = storage / "run" / "statistics"
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.parent.name != "scores"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory) -> Path:
    """Storage of a finished run: the reference of this module."""
    storage = tmp_path_factory.mktemp("finished")
    assert main(arguments(storage)) == 0
    return storage


def test_the_run_takes_the_disk_that_its_needs_say(finished):
    config = load_config(arguments(finished))
    model = ModelSize.from_checkpoint(Checkpoint.open("demo"))
    needed = disk_needs(model, config, corpus_sizes(config, model, run_of(finished)))
    folder = run_of(finished).root

    covariances = bytes_of(folder / "records", "*/*.covariances/*") + bytes_of(folder / "statistics", "*.covariances/*")
    assert needed.covariances == pytest.approx(covariances, rel=0.02)
    assert needed.records == pytest.approx(bytes_of(folder / "records", "*/*.safetensors"), rel=0.02)
    moments = bytes_of(folder / "statistics", "*.safetensors") + bytes_of(folder / "statistics", "scores/*.safetensors")
    assert needed.statistics == pytest.approx(moments, rel=0.02)

    weights = bytes_of(folder / "experts", "*/*/*.safetensors")
    assert needed.checkpoints == pytest.approx(weights, rel=0.02)
    assert bytes_of(folder / "shards", "*/*.parquet") < needed.shards + 10_000, (
        "at most, but for what a file has anyway"
    )


def bytes_of(folder: Path, pattern: str) -> int:
    """Files by their inodes: what models share is there once."""
    statuses = [path.stat() for path in folder.glob(pattern) if path.is_file()]
    return sum({status.st_ino: status.st_size for status in statuses}.values())


def test_the_job_leaves_results_of_dense_general_and_every_expert(finished):
    results = json.loads(run_of(finished).results.read_text())
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["dense", "general", "arithmetic", "logic", "experts, own task"]
    for name in ("general", "arithmetic", "logic"):
        assert models[name]["realised_ratio"] == pytest.approx(0.5, abs=0.003)
        assert set(models[name]["quality"]) == {"arithmetic", "logic"}
        assert all(quality["n"] == 12 for quality in models[name]["quality"].values())


def test_the_job_leaves_a_router_of_its_tasks_and_its_figures(finished):
    router = Router.load(run_of(finished).router)
    report = json.loads(run_of(finished).results.read_text())["router"]

    assert router.tasks == ("arithmetic", "logic")
    assert router.route("12 + 34 =").task == "arithmetic" and router.route("true or not false is").task == "logic"
    assert router.route("What is the capital of France?").task is None
    assert report["accuracy"] == 1 and report["threshold"] == router.threshold
    assert sum(n for row in report["confusion"].values() for n in row.values()) == report["n"] == 18


def test_a_model_that_cannot_have_a_router_still_has_its_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("seap_ray.models.corpus.load_tokenizer", lambda *_args, **_kwargs: object())
    made = CalibratedRun(Config(), Checkpoint.open("demo"), Run(tmp_path), [], planner=None)
    assert route(made) is None
    assert capsys.readouterr().out.startswith("router: none; model.source: ")


def test_an_expert_of_the_job_loads_and_answers(finished):
    folder = run_of(finished).expert(0.5, "arithmetic")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer("12 + 34 =", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("<bos>12 + 34 =")
    assert sum(p.numel() for p in model.parameters()) == json.loads((folder / "seap.json").read_text())["parameters"]


def test_the_job_measures_how_often_dense_and_general_would_say_what_an_expert_says(finished):
    run = run_of(finished)
    drawn = json.loads((run.cells / "logic.items.json").read_text())["items"]
    folder = run.expert(0.5, "logic")
    expert = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The demo's rows are chats, which end with the tokenizer's own mark.
    replies = []
    for item in drawn:
        asked = [{"role": "user", "content": item["question"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        replies.append((ids.shape[1], expert.generate(ids, max_new_tokens=32, do_sample=False)[0]))

    measured = json.loads(run.agreement(0.5, "logic").read_text())
    for name, source in (("dense", Checkpoint.open("demo").folder), ("general", run.expert(0.5, "general"))):
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        shares = []
        for start, ids in replies:
            likeliest = reference(ids[None]).logits[0].argmax(-1)
            shares.append(float((likeliest[start - 1 : -1] == ids[start:]).float().mean()))
        assert measured[name]["n"] == len(drawn) == 12
        assert measured[name]["share"] == pytest.approx(sum(shares) / len(shares))


def test_the_manifest_of_an_expert_tells_source_plan_ratios_and_hashes(finished):
    folder = run_of(finished).expert(0.5, "logic")
    manifest = json.loads((folder / "seap.json").read_text())
    assert manifest["requested_ratio"] == 0.5
    assert manifest["planned_ratio"] == pytest.approx(manifest["realised_ratio"], abs=1e-12)
    assert manifest["plan"]["tasks"] == {"logic": 1.0}
    assert set(manifest["plan"]["statistics"]) == {"logic"}
    assert set(manifest["versions"]) >= {"torch", "transformers", "ray", "seap-ray"}
    assert all(about["digest"].startswith("blake3:") for about in manifest["files"].values())


def files_of(expert):
    """Bytes of its weights' files by their names, and of its configuration."""
    return {f.name: f.read_bytes() for f in (*expert.glob("*.safetensors"), expert / "config.json")}


def tensors_of(expert):
    """Shapes and bytes of its tensors by their names, in whichever files they are."""
    tensors = {k: t for f in expert.glob("*.safetensors") for k, t in load_file(f).items()}
    return {k: (t.shape, t.numpy().tobytes()) for k, t in tensors.items()}


AGAIN = """pruning.baselines={
    uniform: {allocation: uniform, score: energy},
    global: {allocation: global, score: wifv, compensation: mean},
    standardised: {allocation: standardised, score: wifv, compensation: none},
    depth: {allocation: depth, compensation: none}}"""


def test_a_finished_expert_is_pruned_again_by_every_allocation_and_stream_finds_the_same(finished, tmp_path):
    expert = run_of(finished).expert(0.5, "arithmetic")
    settings = [f"model.source={expert}", "pruning.ratio=[0, 0.3]", UNJUDGED]

    whole = tmp_path / "single"
    streamed = tmp_path / "stream"
    assert main(arguments(whole, *settings, AGAIN, "calibration.placement=single")) == 0

    # At ratio 0 a model is the base, whatever the allocation.
    base = json.loads((expert / "seap.json").read_text())
    for name in ("general", "logic", "uniform", "global", "standardised", "depth"):
        same = run_of(whole).expert(0, name)
        assert tensors_of(same) == tensors_of(expert)
        assert (same / "config.json").read_bytes() == (expert / "config.json").read_bytes()

        folder = run_of(whole).expert(0.3, name)
        manifest = json.loads((folder / "seap.json").read_text())
        assert manifest["source"]["model"] == str(expert) and manifest["source"]["model_type"] == "seap_llama"
        of_ratio = 0.1 if name == "depth" else 0.005  # whole layers
        assert manifest["realised_ratio"] == pytest.approx(0.3, abs=of_ratio)
        assert manifest["realised_ratio"] == pytest.approx(manifest["planned_ratio"], abs=1e-12)
        n_parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        assert n_parameters == manifest["parameters"] < 0.8 * base["parameters"]

    dense = json.loads(run_of(whole).results.read_text())["models"][0]
    assert (dense["name"], dense["parameters"]) == ("dense", base["parameters"])
    assert dense["kv_bytes_per_token"] == base["kv_bytes_per_token"]

    assert main(arguments(streamed, *settings, "calibration.placement=stream")) == 0
    assert statistics(streamed) == statistics(whole)


def test_what_experts_have_of_the_base_is_on_the_disk_once(finished):
    files = [*(finished / "run" / "experts").glob(f"*/*/{BASE_FILES}*")]
    assert len(files) > 2 and {file.stat().st_ino for file in files} == {
        file.stat().st_ino for file in (finished / "run" / "shared").glob(f"{BASE_FILES}*")
    }


def when_records(storage: Path, n: int, act) -> threading.Thread:
    """Call ``act`` once, as soon as ``n`` records are there."""

    def watch() -> None:
        while len(records(storage)) < n:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_workers() -> list[int]:
    """SIGKILL every process of this cluster that runs a calibration actor; return their pids."""
    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "Calibrator" in title:
                process.kill()
                killed.append(process.pid)
    return killed


def test_two_workers_that_are_killed_give_byte_equal_statistics_plans_and_weights(finished, tmp_path):
    """Nothing is lost but the shards in flight, and the number of workers changes no byte."""
    killed: list[int] = []
    watcher = when_records(tmp_path, 2, lambda: killed.extend(kill_workers()))
    assert main(arguments(tmp_path, "calibration.workers=2", UNJUDGED)) == 0
    watcher.join(10)
    assert killed

    assert statistics(tmp_path) == statistics(finished)
    for ratio_and_name in ("0.50/general", "0.50/arithmetic", "0.50/logic"):
        first, second = (folder / "run" / "experts" / ratio_and_name for folder in (finished, tmp_path))
        assert files_of(first) == files_of(second) and len(files_of(first)) == 3
        plan = f"plans/{ratio_and_name}.safetensors"
        assert (finished / "run" / plan).read_bytes() == (tmp_path / "run" / plan).read_bytes()


def test_a_shard_that_kills_every_worker_is_given_up_named_and_costs_no_other(finished, tmp_path, capsys, monkeypatch):
    class Poisoned(Calibrator):
        def _measure(self, shards):
            if any((shard.task, shard.shard) == ("logic", "00002") for shard in shards):
                os.kill(os.getpid(), signal.SIGKILL)
            super()._measure(shards)

    # The shard is in a group with all others, each of which has to have its record in the end.
    with monkeypatch.context() as poisoned:
        poisoned.setattr("seap_ray.pipeline.calibrate.Calibrator", Poisoned)
        streamed = ["calibration.placement=stream", "calibration.stream_tokens=1000000"]
        code, line = refused(capsys, arguments(tmp_path, *streamed, UNJUDGED))

    assert code == 4 and "logic: shard 00002 ended its worker's process 3 times and was given up" in line
    assert str(tmp_path / "run" / "shards" / "logic" / "00002.parquet") in line
    assert {path.name for path in records(finished)} - {path.name for path in records(tmp_path)} == {
        path.name for path in records(finished) if path.name.startswith("00002") and path.parent.name == "logic"
    }

    # A new job tries it again, with workers that do not die.
    assert main(arguments(tmp_path, UNJUDGED)) == 0
    assert statistics(tmp_path) == statistics(finished)
    assert not list((tmp_path / "run" / "records").rglob("*.tried"))


def joining() -> dict[str, str]:
    """Return the environment of a job that joins the cluster of this process; without it, one that runs beside it."""
    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def test_a_killed_driver_resumes_with_the_records_that_it_had_and_by_another_placement(finished, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "prune.py"), *arguments(tmp_path)]
    job = subprocess.Popen(command, env=joining(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        when_records(tmp_path, 3, job.kill).join(240)
        assert job.wait(60) == -signal.SIGKILL
    finally:
        job.kill()

    # What is left is measured by a model that is read layer by layer, and comes to the same.
    had = {path: path.stat().st_mtime_ns for path in records(tmp_path)}
    assert 3 <= len(had) < len(records(finished))
    streamed = ["calibration.placement=stream", "calibration.stream_tokens=1500", UNJUDGED]
    assert main(arguments(tmp_path, *streamed)) == 0
    assert {path: path.stat().st_mtime_ns for path in had} == had
    assert statistics(tmp_path) == statistics(finished)
    assert [path.name for path in records(tmp_path)] == [path.name for path in records(finished)]


def test_a_stopped_job_ends_with_4_and_says_that_it_can_go_on(cluster, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "prune.py"), *arguments(tmp_path)]
    job = subprocess.Popen(command, env=joining(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        when_records(tmp_path, 1, job.terminate).join(240)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 4
    assert errors.splitlines()[-1] == "stopped; the same command goes on from here"


def test_a_damaged_record_or_weight_file_is_found_by_its_hash_and_made_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    expected = statistics(tmp_path)
    files = records(tmp_path)

    damaged = bytearray(files[0].read_bytes())
    damaged[-3] ^= 1
    files[0].write_bytes(damaged)
    (tmp_path / "run" / "statistics" / "arithmetic.safetensors").unlink()

    experts = tmp_path / "run" / "experts" / "0.50"
    weights, other = (experts / name / "model-00001-of-00001.safetensors" for name in ("logic", "general"))
    intact = weights.read_bytes()
    changed = other.stat().st_mtime_ns
    weights.write_bytes(intact[:-3] + bytes([intact[-3] ^ 1]) + intact[-2:])  # of the same size

    times = [path.stat().st_mtime_ns for path in files[1:]]
    assert main(arguments(tmp_path)) == 0
    assert bytes(damaged) != files[0].read_bytes()
    assert [path.stat().st_mtime_ns for path in files[1:]] == times
    assert statistics(tmp_path) == expected
    assert weights.read_bytes() == intact and other.stat().st_mtime_ns == changed


def test_another_ratio_of_a_finished_run_never_touches_the_model(finished, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*.safetensors")}

    def calibrator(*_args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("seap_ray.pipeline.calibrate.Calibrator", calibrator)
    assert main(arguments(finished, "pruning.ratio=0.35")) == 0
    output = capsys.readouterr().out
    assert "calibrating" not in output and "reading" not in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run_of(finished).expert(0.35, "general").is_dir()


def test_a_target_is_met_by_every_model_and_said_in_plans_manifests_and_output(finished, capsys):
    by_target = [argument for argument in arguments(finished, UNJUDGED) if not argument.startswith("pruning.ratio")]
    assert main([*by_target, "pruning.target.weights=4MB"]) == 0
    output = capsys.readouterr().out
    line = "target weights: at most 4MB, where the model has 5.472MB; evenly cut layers meet it at ratio 0.273"
    assert line in output
    assert re.search(r"  general: weights at most 4MB: planned (\S+), written \1\n", output)

    # One ratio stands for the target in the names of all folders.
    for name in ("general", "arithmetic", "logic"):
        folder = run_of(finished).expert(0.273, name)
        manifest = json.loads((folder / "seap.json").read_text())
        plan = json.loads(run_of(finished).plan(0.273, name).read_text())
        n_bytes = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
        tile = 2 * 3 * 160 * 16  # bytes of float16, matrices, hidden size, channels
        assert 4_000_000 - tile < n_bytes <= 4_000_000
        asked = {"kind": "weights", "unit": "bytes", "asked": 4_000_000, "planned": n_bytes}
        assert plan["target"] == asked and manifest["target"] == {**asked, "met": n_bytes}

    code, error = refused(capsys, [*by_target, "pruning.target.weights=100KB"])
    assert code == 2 and "pruning.target.weights: 100KB is out of reach; the smallest within reach is " in error


def test_the_same_command_on_a_finished_run_does_nothing(finished, capsys):
    assert main(arguments(finished)) == 0
    output = capsys.readouterr().out
    assert not any(word in output for word in ("reading", "calibrating", "writing", "evaluating"))


WITHOUT_CLUSTER = """
import pathlib, runpy, sys
import ray

def init(*_args, **_named):
    raise SystemExit("starts a cluster")

ray.init = init
main = runpy.run_path("jobs/prune.py")["main"]
cells, *arguments = sys.argv[1:]
assert main(arguments) == 0
for cell in pathlib.Path(cells).glob("logic-*.json"):
    cell.unlink()
main(arguments)
"""


def test_a_finished_run_starts_a_cluster_only_when_something_is_missing(finished):
    run = run_of(finished)
    models = json.loads(run.results.read_text())["models"]
    cells = {cell: cell.read_bytes() for cell in run.cells.glob("logic-*.json")}

    command = [sys.executable, "-c", WITHOUT_CLUSTER, str(run.cells), *arguments(finished)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    for cell, content in cells.items():
        cell.write_bytes(content)

    # All that was said before a cluster was needed is said once.
    assert done.stderr.strip().splitlines()[-1] == "starts a cluster"
    assert done.stdout.count("is complete") == done.stdout.count("report: ") == 1
    assert json.loads(run.results.read_text())["models"] == models


def refused(capsys, arguments: list[str]) -> tuple[int, str]:
    code = main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return code, lines[0]


def corpus(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("q", pa.string()), ("a", pa.string())])), path)
    templates = "question: '{{ q }}', answer: '{{ a }}', metric: exact_match"
    return f"tasks=[{{name: mine, path: {path}, evaluation_path: {path}, {templates}}}]"


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("pruning.ration=0.5", 2, "pruning.ration: unknown key; did you mean pruning.ratio?"),
        ("corpus.samples=many", 2, "corpus.samples: Input should be a valid integer"),
        ("pruning.ratio=1.5", 2, "pruning.ratio.0: Input should be less than 1"),
        ("pruning.ratio=0.99", 2, "pruning.ratio: 0.99 is beyond"),
        ("model.source=./nowhere", 2, "model.source: ./nowhere is not a folder with a model"),
        ("calibration.num_cpus=4096", 2, "nodes have room for 0 of 1 workers with 4096 CPUs"),
        ("tasks=[{name: boolq, path: ./nowhere}]", 3, "tasks.boolq: no file of split 'train' under"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code_and_nothing_is_written(
    cluster, tmp_path, capsys, override, code, message
):
    exit_code, line = refused(capsys, arguments(tmp_path, override))
    assert exit_code == code and message in line
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.parquet"))


def test_a_model_of_another_family_is_refused_with_those_that_are_supported(tmp_path, capsys):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    code, line = refused(capsys, arguments(tmp_path, f"model.source={tmp_path / 'gpt2'}"))
    assert code == 2 and "model family 'gpt2' is not supported: its matrices are stored" in line


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], "q", "has no rows"),
        ([{"q": "1", "a": "2"}], "nothing", "'nothing' is undefined; the columns are q, a"),
        ([{"q": " ", "a": ""}] * 3, "q", "all 3 rows of the corpus are blank"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused_by_task(cluster, tmp_path, capsys, rows, columns, message):
    override = corpus(tmp_path / "train.parquet", rows).replace("{ q }", f"{{ {columns} }}")
    code, line = refused(capsys, arguments(tmp_path, override))
    assert code == 3 and "tasks.mine: " in line and message in line


def test_a_first_attempt_that_failed_on_its_corpus_leaves_the_corrected_command_its_run(cluster, tmp_path, capsys):
    code, _ = refused(capsys, arguments(tmp_path, corpus(tmp_path / "empty.parquet", [])))
    assert code == 3
    rows = [{"q": f"{k} + 1 =", "a": str(k + 1)} for k in range(9)]
    corrected = corpus(tmp_path / "rows.parquet", rows)
    assert main(arguments(tmp_path, corrected, UNJUDGED, "corpus.samples=8")) == 0
    code, line = refused(capsys, arguments(tmp_path, corrected, UNJUDGED, "corpus.samples=7"))
    assert code == 2 and "was made with corpus.samples=8, not 7" in line


def test_a_run_of_another_model_or_corpus_is_refused_with_the_field(finished, capsys):
    code, line = refused(capsys, arguments(finished, "run.seed=7"))
    assert code == 2 and "was made with run.seed=0, not 7" in line
    code, line = refused(capsys, arguments(finished, "corpus.samples=9"))
    assert code == 2 and "was made with corpus.samples=48, not 9" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_ends_with_4_and_more_room_lets_the_same_command_finish(finished, tmp_path, capsys):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    # Covariances that cannot fit are known before the first is made; moments alone meet the end of the disk.
    moments = ["calibration.statistics=moments", "pruning.score=wifv", "pruning.compensation=mean"]
    try:
        code, line = refused(capsys, arguments(tmp_path))
        assert code == 4 and "calibration.statistics: covariance takes" in line and "make room" in line
        assert not records(tmp_path)
        code, line = refused(capsys, arguments(tmp_path, *moments))
        assert code == 4 and "No space left on device" in line
        assert not list(tmp_path.rglob("seap.json"))

        subprocess.run(["mount", "-o", "remount,size=256m", str(tmp_path)], check=True)
        assert main(arguments(tmp_path, UNJUDGED)) == 0
        assert statistics(tmp_path) == statistics(finished)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # workers still map its files


def test_errors_out_of_ray_are_found_and_others_are_not_swallowed(monkeypatch, tmp_path):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("seap_ray.pipeline.job.make_shards", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments(tmp_path))
    assert not issubclass(RuntimeError, SeapError)


def test_what_a_function_of_rows_raised_is_known_by_its_words(cluster):
    def raised(_row):
        raise DataError("tasks.mine: a row that does not fit")

    with pytest.raises(RayError) as caught:
        ray.data.range(1).map(raised).materialize()
    known = known_error(caught.value)
    assert type(known) is DataError and str(known) == "tasks.mine: a row that does not fit"


@pytest.mark.parametrize(("raised", "expected"), [(ConfigError("model.source: x"), ConfigError), (KeyError("x"), None)])
def test_an_actor_of_ray_data_that_cannot_be_made_is_no_lost_one(cluster, raised, expected):
    class Broken:
        def __init__(self) -> None:
            raise raised

        def __call__(self, rows: Any) -> Any:
            return rows

    with pytest.raises(RayError) as caught:
        ray.data.range(1).map_batches(Broken, compute=ray.data.ActorPoolStrategy(size=1)).materialize()
    known = known_error(caught.value)
    assert type(known) is (expected or type(None)) and str(known or "").count("\n") == 0


def test_what_the_cluster_lost_is_one_line_that_says_to_go_on():
    known = known_error(WorkerCrashedError())
    assert type(known) is IncompleteError and "run the same command again" in str(known) and "\n" not in str(known)
    assert known_error(RayTaskError("f", "a traceback", ValueError())) is None, "a fault of ours is not hidden"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data beside the repository")
def test_the_whole_job_runs_on_a_real_model_and_real_corpora(cluster, tmp_path):
    tasks = ", ".join(f"{{name: {name}, {more}}}" for name, more in REAL.items())
    override = [f"model.source={DATA / 'models' / 'stories260k'}", f"tasks=[{tasks}]", "corpus.samples=24"]
    sizes = ["corpus.sequence_length=256", "evaluation.samples=4", "pruning.ratio=0.2"]
    assert main(arguments(tmp_path, *override, *sizes)) == 0
    models = json.loads(run_of(tmp_path).results.read_text())["models"]
    assert [model["name"] for model in models] == ["dense", "general", *REAL, "experts, own task"]
    for model in models[1:]:
        assert model["realised_ratio"] == pytest.approx(0.2, abs=0.007)  # a tile of 8 channels is 0.67 %


@pytest.mark.slow
def test_ray_job_submit_runs_the_job_on_a_cluster_with_token_authentication(tmp_path):
    """The command that users type, with a real head, a token, and the tree carried as working directory."""
    ray = str(Path(sys.executable).with_name("ray"))
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    port = "26379"
    dashboard = "28265"
    start = [ray, "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # The agent takes jobs; on its usual port stands the one of this process's own cluster.
    short = tempfile.mkdtemp(prefix="ray")  # a path of sockets may have 107 characters, fewer than pytest's folders
    start += [f"--temp-dir={short}", "--dashboard-agent-listen-port=28266", "--block"]
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        submit = [ray, "job", "submit", f"--address=http://127.0.0.1:{dashboard}", "--working-dir", str(ROOT), "--"]
        command = [*submit, sys.executable, "jobs/prune.py", *arguments(tmp_path, "tasks=[arithmetic]")[1:]]
        done = _submitted(command, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "is complete" in done.stdout

        # Another token is not let in.
        token.write_text(secrets.token_hex(32))
        assert subprocess.run(command, env=environment, capture_output=True, timeout=100).returncode != 0
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(short, ignore_errors=True)

    results = json.loads(run_of(tmp_path).results.read_text())
    assert [model["name"] for model in results["models"]][:2] == ["dense", "general"]


def _submitted(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Submit, once the head answers."""
    for _ in range(10):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        if not any(word in done.stderr for word in ("Failed to connect", "No available agent")):
            return done
        time.sleep(2)
    return done


def test_the_config_of_a_run_is_written_first_and_whole(finished):
    written = json.loads(run_of(finished).config.read_text())
    assert Config.model_validate(written).tasks[0].name == "arithmetic"
