"""What is refused before engines start."""

from dataclasses import replace

import pytest

from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.storage.paths import parse_path
from serve.experts import check_servable
from tests.support.builders import uniform_plan, write_compacted


def test_a_model_whose_output_bias_vllm_leaves_out_is_refused(dense, tmp_path):
    base = Checkpoint.open(str(dense("phimoe")))
    plan = uniform_plan(base.architecture, replace(base.architecture.dense, channels=8))
    folder = write_compacted(CheckpointExport(base, plan, stock=True), tmp_path / "stock")
    with pytest.raises(ConfigError, match=r"stock: vLLM leaves out the bias .*\(lm_head_bias\).*; load it with"):
        check_servable(parse_path(str(folder)))
