"""Error correction in a job: which models get it, what is kept of it, and what is refused."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.preflight import check_config
from tests.support import ROOT
from tests.support.builders import save_dense
from tests.support.oracles import tensors_of

CLOSED = [
    "calibration.statistics=covariance",
    "pruning.ratio=0.4",
    "pruning.score=wifv",
    "pruning.compensation=least_squares",
    "pruning.attention_unit=none",
    "pruning.allocation.kind=uniform",
]
main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]


def arguments(storage: Path, *more: str) -> list[str]:
    settings = [
        "model.dtype=float32",
        "tasks=[arithmetic, logic]",
        "corpus.samples=16",
        "calibration.workers=1",
        "evaluation.samples=0",
        "pruning.baselines={plain: {error_correction: 0}, flap: {}}",
    ]
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", "run.name=run", *settings, *CLOSED, *more]


def written(run: Path) -> dict[Path, int]:
    files = [*run.glob("corrections/*"), *run.glob("experts/**/*.safetensors")]
    return {path: path.stat().st_mtime_ns for path in files}


def correction_file(run: Path, name: str) -> Path:
    """The file of what is added to a model, which its plan names."""
    plan = json.loads((run / f"plans/0.40/{name}.json").read_text())
    return run / "corrections" / f"{plan['error_correction']['fingerprint'][:20]}.safetensors"


def general_correction(run: Path) -> dict[str, torch.Tensor]:
    return load_file(correction_file(run, "general"))


@pytest.mark.ray
def test_models_by_least_squares_are_corrected_once_and_for_each_share(cluster, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "pruning.error_correction=0.5")) == 0
    plans = {path.stem: json.loads(path.read_text()) for path in run.glob("plans/0.40/*.json")}
    corrected = {name for name, plan in plans.items() if "error_correction" in plan}
    assert corrected == {"general", "arithmetic", "logic"}, "a bias alone corrects nothing, and plain asks for nothing"
    assert plans["general"]["error_correction"]["share"] == 0.5
    manifest = json.loads((run / "experts/0.40/general/seap.json").read_text())
    assert manifest["plan"]["error_correction"] == plans["general"]["error_correction"]
    before = {path: path.read_bytes() for path in run.glob("corrections/*")}
    assert len(before) == 3

    general, plain = (tensors_of(run / "experts/0.40" / name) for name in ("general", "plain"))
    differing = {key for key in general if not torch.equal(general[key], plain[key])}
    assert differing == {key for key in general if "down_proj" in key}
    key = next(iter(differing))

    # The same command finds all of it.
    times = written(run)
    capsys.readouterr()
    assert main(arguments(tmp_path, "pruning.error_correction=0.5")) == 0
    assert "correcting" not in capsys.readouterr().out
    assert written(run) == times

    # What is lost is made again, byte for byte; another share is another file, and other weights.
    half = general_correction(run)
    correction_file(run, "logic").unlink()
    assert main(arguments(tmp_path, "pruning.error_correction=0.5", "pruning.general={error_correction: 0.25}")) == 0
    output = capsys.readouterr().out
    assert "correcting errors 2 models" in output
    after = {path: path.read_bytes() for path in run.glob("corrections/*")}
    assert {path: after[path] for path in before} == before and len(after) == 4
    # No layer before the first one is corrected, so that its correction is in proportion.
    assert torch.equal(general_correction(run)["0.weight"], half["0.weight"] / 2)
    assert not torch.equal(tensors_of(run / "experts/0.40/general")[key], general[key])


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma3", "a norm behind down_proj"), ("mixtral", "mixture of experts")]
)
def test_families_whose_errors_cannot_be_corrected_are_refused(tmp_path, family, reason):
    save_dense(tmp_path, family, torch.float32)
    settings = [*CLOSED, f"model.source={tmp_path}", "tasks=[logic]", "pruning.baselines={}"]

    check_config(load_config(settings), check_evaluation_rows=False)
    with pytest.raises(ConfigError, match=f"error_correction.*{reason}.*set it to 0"):
        check_config(load_config([*settings, "pruning.error_correction=0.5"]), check_evaluation_rows=False)


@pytest.mark.parametrize("share", [-0.1, 1.5, "some"])
def test_a_share_is_from_0_to_1_or_chosen(share):
    with pytest.raises(ConfigError, match="error_correction"):
        load_config([f"pruning.error_correction={share}"])
