"""Generic loaders: what reads only the configuration or the tokenizer needs neither seap_ray nor anybody's answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Plan
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from tests.support.builders import CONFIGS, random_plan, random_statistics, write_compacted
from tests.support.elsewhere import WITHOUT_SEAP_RAY

LOADERS = (
    WITHOUT_SEAP_RAY
    + """
import builtins

def ask(text=""):
    asked.append(text)
    raise EOFError

asked, results = [], {}
builtins.input = ask
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig

def texts(tokenizer):
    return type(tokenizer).__name__, tokenizer("abc 12")["input_ids"]

for name, (base, expert) in json.loads(sys.argv[1]).items():
    config = PreTrainedConfig.from_pretrained(expert)
    results[name] = {
        "layers": config.num_hidden_layers,
        "biased": [getattr(layer, "o_proj_bias", None) for layer in config.per_layer_config],
        "max_new_tokens": GenerationConfig.from_pretrained(expert).max_new_tokens,
        "base": texts(AutoTokenizer.from_pretrained(base)),
        "untrusting": texts(AutoTokenizer.from_pretrained(expert, trust_remote_code=False)),
    }
assert not asked, asked
for name, (base, expert) in json.loads(sys.argv[1]).items():
    results[name]["expert"] = texts(AutoTokenizer.from_pretrained(expert))
    results[name]["processor"] = texts(AutoProcessor.from_pretrained(expert))
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
open(sys.argv[2], "w").write(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def loaded(dense, tmp_path_factory) -> dict[str, Any]:
    """What a fresh process without seap_ray and without a terminal reads in a compensated expert of every family."""
    root = tmp_path_factory.mktemp("generic")
    folders = {}
    for name in CONFIGS:
        base = Checkpoint.open(str(dense(name)))
        plan = random_plan(base.architecture, 3, "mean")
        expert = write_compacted(CheckpointExport(base, plan, random_statistics(base.architecture, 3)), root / name)
        folders[name] = (str(dense(name)), str(expert))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADERS, json.dumps(folders), root / "out.json"],
        stdin=subprocess.DEVNULL,
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((root / "out.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_generic_loaders_read_an_expert_without_seap_ray(loaded, name):
    result = loaded[name]
    assert result["layers"] == 4 and result["max_new_tokens"] == 7
    has_own_bias = name in ("llama_biased", "opt", "gpt_neox")
    # The plan leaves layer 1 whole; a family that has the biases itself gets none under our names.
    assert result["biased"] == ([None] * 4 if has_own_bias else [True, False, True, True])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_process_that_trusts_no_code_gets_the_tokenizer_of_the_base(loaded, name):
    result = loaded[name]
    assert result["expert"] == result["untrusting"] == result["processor"] == result["base"]


def expert_of(source: Path, folder: Path) -> Path:
    base = Checkpoint.open(str(source))
    whole = random_plan(base.architecture, 3)
    return write_compacted(CheckpointExport(base, Plan("expert", 0.5, COMPENSATIONS["none"], whole.kept, {})), folder)


def test_the_tokenizer_config_is_the_bases_unless_the_model_type_decides_the_class(dense, tmp_path):
    """A Qwen2 has its own tokenizer class, whatever its tokenizer_config.json says; an expert's model type is ours."""
    for name, expected in (("llama_gqa", "TokenizersBackend"), ("qwen2", "Qwen2Tokenizer")):
        source, expert = dense(name), expert_of(dense(name), tmp_path / name)
        before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (source, expert))
        assert before["tokenizer_class"] == "TokenizersBackend"
        assert after == {**before, "tokenizer_class": expected}
        assert type(AutoTokenizer.from_pretrained(source)).__name__ == expected
        assert type(AutoTokenizer.from_pretrained(expert)).__name__ == expected


def test_a_base_without_a_tokenizer_has_experts_without_one(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert not list(expert_of(source, tmp_path / "expert").glob("tokenizer*"))
