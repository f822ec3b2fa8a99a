"""Quantisation in a job: one calibration, then any ratio and any bits, and what is refused before any work."""

import json
import runpy
from pathlib import Path

import pytest

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.preflight import check_config
from tests.support import ROOT
from tests.support.oracles import tensors_of

pytest.importorskip("compressed_tensors")
main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]
CLOSED = [
    "calibration.statistics=covariance",
    "pruning.score=wifv",
    "pruning.compensation=least_squares",
    "pruning.attention_unit=none",
    "pruning.allocation.kind=uniform",
    "pruning.baselines={}",
    # So that all schemes have the same widths.
    "pruning.align=32",
]


def arguments(storage: Path, *more: str) -> list[str]:
    settings = [
        "model.dtype=float32",
        "tasks=[logic]",
        "corpus.samples=16",
        "calibration.workers=1",
        "evaluation.samples=8",
        "evaluation.speed.rounds=0",
    ]
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", "run.name=run", *settings, *CLOSED, *more]


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.ray
def test_one_calibration_serves_every_ratio_and_scheme(cluster, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "pruning.ratio=0.4", "export.quantization=w4a16")) == 0
    output = capsys.readouterr().out
    assert "quantization: w4a16 by gptq in groups of 32 columns; kept channels are multiples of 32" in output
    manifest = json.loads((run / "experts/0.40/general/seap.json").read_text())
    four = tensors_of(run / "experts/0.40/general")
    assert manifest["quantization"] == {"scheme": "w4a16", "group": 32, "rounding": "gptq"}
    assert manifest["bytes"] == sum(tensor.nbytes for tensor in four.values())
    results = json.loads((run / "results.json").read_text())
    scores = {row["name"]: row for row in results["models"]}
    assert scores["logic"]["quality"]["logic"]["value"] > 0.3, "judged by transformers"

    # Another ratio and scheme calibrate nothing, and nothing removed is a ratio, too.
    calibrated = times(run / "records") | times(run / "statistics")
    assert any("inputs" in path.name for path in calibrated)
    assert main(arguments(tmp_path, "pruning.ratio=[0,0.4]", "export.quantization=w8a8")) == 0
    assert times(run / "records") | times(run / "statistics") == calibrated
    eight = tensors_of(run / "experts/0.40/general")
    assert {name for name in four if "packed" in name} and not {name for name in eight if "packed" in name}
    dense = tensors_of(run / "experts/0.00/general")
    assert dense["model.layers.0.mlp.down_proj.weight"].shape > eight["model.layers.0.mlp.down_proj.weight"].shape

    # Parameters are those of the weights, whatever they are stored in.
    again = json.loads((run / "experts/0.40/general/seap.json").read_text())
    assert again["parameters"] == manifest["parameters"] and again["bytes"] > manifest["bytes"]

    # The same command finds all of it.
    written = times(run / "experts")
    assert main(arguments(tmp_path, "pruning.ratio=[0,0.4]", "export.quantization=w8a8")) == 0
    assert times(run / "experts") == written


def test_a_group_that_does_not_fit_is_refused_before_any_work(tmp_path):
    settings = [*arguments(tmp_path, "export.quantization={scheme: w4a16, group: 128}")]
    with pytest.raises(ConfigError, match="export.quantization.group: the hidden size .* use .*group=32"):
        check_config(load_config(settings), check_evaluation_rows=False)
