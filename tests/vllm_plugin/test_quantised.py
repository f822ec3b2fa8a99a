"""Quantised experts in vLLM, with the plugin and without: those that a job rounds, and those of llm-compressor."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import seap_ray.models.hf  # noqa: F401
from seap_ray.config import QuantizationSection
from seap_ray.demo import skills
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import record
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.quantization import QuantizedExport
from seap_ray.vllm_plugin.plugin import LOAD_FORMAT
from tests.support import ROOT
from tests.support.builders import random_kept, random_plan, write_compacted
from tests.support.elsewhere import WITHOUT_SEAP_RAY
from tests.vllm_plugin.test_vllm_model import Engine, by_transformers

# What vLLM's and torch's own code warns of while vLLM is imported and runs.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning:vllm\.", r"ignore::DeprecationWarning:torch\."
    ),
]


class Covariances(dict):
    """What a model's activations were measured to be, each with one ridge."""

    def ridge_of(self, _key: object) -> float:
        return 0.01


def cut_demo(folder: Path, task: str) -> tuple[CheckpointExport, list[list[int]]]:
    """The demo's model in 16 bits, its layers cut to unequal widths and repaired by a task's texts; these as tokens.

    ``folder`` is where the model is before.
    """
    demo = Checkpoint.open("demo").folder
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    rows = skills.rows(task, 120, split="train", seed=0)
    texts = tokenizer([f"{row['question']} {row['answer']}" for row in rows])["input_ids"]
    base = Checkpoint.open(str(folder))
    n_layers = base.architecture.n_layers
    settings = {"batch_tokens": 2000, "covariances": range(n_layers), "inputs": True}
    recorded = Covariances(record(model.float(), texts, **settings))

    # Kernels for CPUs take widths that are multiples of 32.
    whole = base.architecture.dense
    shapes = [replace(whole, channels=whole.channels - 32 * (6 + layer % 3)) for layer in range(n_layers)]
    rng = random.Random(task)
    kept = tuple(random_kept(whole, shape, rng) for shape in shapes)
    plan = replace(random_plan(base.architecture, seed=3, compensation="least_squares"), kept=kept)
    return CheckpointExport(base, plan, recorded), texts


def quantised(folder: Path, scheme: str, task: str) -> Path:
    """A cut demo, rounded by the texts that repaired it, or with a scheme of vLLM's as it is."""
    cut, _ = cut_demo(folder / "dense", task)
    if scheme == BY_VLLM:
        return write_compacted(cut, folder / task)

    rounding = QuantizationSection(scheme=scheme, group=32 if scheme.startswith("w4") else "auto")
    by = {"settings": rounding, "covariances": cut.statistics, "inputs": cut.statistics}
    return write_compacted(QuantizedExport(cut.base, cut.plan, cut.statistics, **by), folder / task)


def answer(tokens: list[int]) -> list[int]:
    """The tokens before the first end token, behind which the model knows nothing to say, and any rounding decides."""
    end = 2
    return tokens[: tokens.index(end)] if end in tokens else tokens


BY_VLLM = "int8_per_channel_weight_only"
"""A scheme by which vLLM rounds an ordinary checkpoint's weights as it loads them."""


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", BY_VLLM])
def test_greedy_tokens_of_quantised_models_that_share_an_engine_are_those_of_transformers(tmp_path, scheme):
    folders = {task: quantised(tmp_path, scheme, task) for task in ("arithmetic", "logic")}
    asked, expected = {}, {}
    for task, folder in folders.items():
        check_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = skills.rows(task, 16, split="test", seed=1)
        asked[task] = tokenizer([row["question"] for row in rows])["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        expected[task] = [answer(tokens) for tokens in by_transformers(model, asked[task], 8)]

    def answers(task: str) -> list[list[int]]:
        return [answer(tokens) for tokens in engine.greedy(asked[task], 8)]

    # The kernels for four bits compute in 16 bits alone.
    settings = {"dtype": "bfloat16", "load_format": LOAD_FORMAT, "enable_prefix_caching": False}
    if scheme == BY_VLLM:
        settings["quantization"] = scheme
    with Engine(folders["arithmetic"], **settings) as engine:
        assert answers("arithmetic") == expected["arithmetic"] and answers("logic") != expected["logic"]
        # A swap lays the codes out anew for the kernels.
        for task, other in [("logic", "arithmetic"), ("arithmetic", "logic")]:
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[task])})
            assert answers(task) == expected[task] and answers(other) != expected[other]


# --- llm-compressor, and vLLM without the plugin ----------------------------------------------------------------------

LLM_COMPRESSOR = (
    *("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "nvidia-ml-py==13.615.71"),
    *("transformers==5.17.0", "huggingface_hub==1.33.0"),
)
"""What llm-compressor needs in other versions than seap_ray; of all else it takes what is installed."""
FORMATS = {"FP8_DYNAMIC": "float-quantized", "W8A8": "int-quantized", "W4A16": "pack-quantized"}
"""How compressed-tensors calls what a scheme's weights are stored as."""
QUESTIONS = {"12 + 7 =": "19", "20 - 14 =": "6", "31 + 46 =": "77", "99 - 3 =": "96"}
ANSWER = """
import json, sys
from vllm import LLM, SamplingParams

folders, questions = json.loads(sys.argv[1])
settings = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64, "trust_remote_code": True}
for folder in folders:
    llm = LLM(folder, kv_cache_memory_bytes=1 << 26, **settings)
    replies = llm.generate(questions, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("answers:", json.dumps([reply.outputs[0].text.strip() for reply in replies]))
    del llm
"""


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """An expert as a run has it: its checkpoint, and its task's texts as token ids."""
    run = tmp_path_factory.mktemp("run")
    cut, texts = cut_demo(run / "dense", "arithmetic")
    shards = run / "shards" / "arithmetic"
    shards.mkdir(parents=True)
    pq.write_table(pa.table({"ids": pa.array(texts, pa.list_(pa.int32()))}), shards / "00000.parquet")
    return write_compacted(cut, run / "experts" / "0.20" / "arithmetic")


@pytest.fixture(scope="module")
def by_llm_compressor(expert, tmp_path_factory):
    """The quantised checkpoints by scheme, made where seap_ray is not installed."""
    root = tmp_path_factory.mktemp("quantised")
    packages = root / "packages"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(packages)]
    subprocess.run([sys.executable, *install, *LLM_COMPRESSOR], check=True, capture_output=True, timeout=300)

    alone = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(packages)}
    made = {scheme: root / scheme for scheme in FORMATS}
    for scheme, folder in made.items():
        command = [sys.executable, str(ROOT / "examples/llm_compressor.py"), scheme, str(expert), str(folder)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, env=alone)
        assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.timeout(1800)  # the time of a test counts what its fixtures take
@pytest.mark.parametrize("scheme", FORMATS)
def test_the_example_keeps_the_widths_and_says_what_the_weights_are(expert, by_llm_compressor, scheme):
    folder = by_llm_compressor[scheme]
    before, after = (json.loads((path / "config.json").read_text()) for path in (expert, folder))
    assert before["per_layer_config"] == after["per_layer_config"]
    assert after["quantization_config"]["format"] == FORMATS[scheme]
    check_folder(folder)


def test_groups_divide_the_columns_of_every_layer(by_llm_compressor):
    config = json.loads((by_llm_compressor["W4A16"] / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.timeout(900)
def test_experts_of_llm_compressor_answer_with_the_plugin(by_llm_compressor):
    assert answers([*by_llm_compressor.values()], ANSWER) == [[*QUESTIONS.values()]] * len(FORMATS)


@pytest.mark.timeout(900)
def test_quantised_experts_answer_without_the_plugin(by_llm_compressor, tmp_path):
    # Not with activations of 8 bits: vLLM's Transformers backend hands its kernel for CPUs three dimensions for two.
    served = [by_llm_compressor["FP8_DYNAMIC"], by_llm_compressor["W4A16"], quantised(tmp_path, "w4a16", "arithmetic")]
    assert answers(served, WITHOUT_SEAP_RAY + ANSWER, VLLM_PLUGINS="") == [[*QUESTIONS.values()]] * len(served)


def answers(served: list[Path], code: str, **more: str) -> list[list[str]]:
    """What one process of vLLM says to the questions, by checkpoint."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps([[str(folder) for folder in served], [*QUESTIONS]])]
    environment = {**os.environ, **settings, **more}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("answers: ")]
    assert len(lines) == len(served), done.stderr[-2000:]
    return [json.loads(line.removeprefix("answers: ")) for line in lines]
