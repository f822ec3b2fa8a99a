"""What a results file says of the run as a whole."""

import pytest
import torch

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.results import make_results
from seap_ray.report.rows import Results
from tests.support.builders import save_dense


@pytest.mark.parametrize(("setting", "computed_in"), [("auto", "bfloat16"), ("float32", "float32")])
def test_results_name_the_type_that_models_were_judged_in(setting, computed_in, tmp_path):
    save_dense(tmp_path / "model", "llama_gqa", torch.bfloat16)
    config = Config.model_validate({"model": {"source": str(tmp_path / "model"), "dtype": setting}})
    results = make_results(config, Checkpoint.open(config.model.source), {}, [], None)

    content = results.to_json()
    assert (content["dtype"], content["config"]["model"]["dtype"]) == (computed_in, setting)
    assert Results.from_json(content) == results
