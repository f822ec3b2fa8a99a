"""Tiny models on disk, random plans and statistics, and checkpoints compacted without Ray.

Tests import the builders (``from conftest import random_plan``) and ask for the fixtures by name.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import logging as transformers_logging

from seap_ray.architecture import Architecture, Shape
from seap_ray.compaction import Compaction, finish, write_tensors
from seap_ray.moments import RECORDED, Moments, Statistics
from seap_ray.plan import Kept, Plan

transformers_logging.disable_progress_bar()

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.,?!+-="
SIZES: dict[str, Any] = {
    "vocab_size": 3 + len(CHARACTERS),
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT_SIZES = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 80}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PHI_3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama_mha": lambda: LlamaConfig(**SIZES, num_attention_heads=6),
    "llama_gqa": lambda: LlamaConfig(**SIZES, num_attention_heads=12, num_key_value_heads=4),
    "llama_biased": lambda: LlamaConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=10,  # not hidden_size / num_attention_heads
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_tied": lambda: LlamaConfig(  # as the small ones of Llama 3.2
        **SIZES, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, rope_parameters=LLAMA_3_ROPE
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, num_attention_heads=8, num_key_value_heads=4),
    "mistral": lambda: MistralConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, sliding_window=16),
    "qwen3": lambda: Qwen3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    ),
    "phi3": lambda: Phi3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, rope_parameters=dict(PHI_3_ROPE)),
    "mixtral": lambda: MixtralConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        moe_intermediate_size=80,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "opt": lambda: OPTConfig(**OPT_SIZES, num_attention_heads=6),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, num_attention_heads=3),
}
"""Every kind of model that is told apart somewhere: grouped or not, with and without biases, tied or not."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it is to run in the background, and what that starts: `serve run` would never end.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("test_service", "test_pack", "test_job", "test_eval", "test_vllm_model", "test_storage", "test_harness")
"""Files that are begun with, so that no process of pytest is left with one at the end."""
SERVED = ("test_service", "test_pack")
"""Files that go to one process: they share a run, and engines of two services would wait for one another."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file to a process, as by xdist's own ``loadfile``."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "served" if Path(file).stem in SERVED else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "vllm": None if find_spec("vllm") else "needs vLLM",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs in this process, for all tests that ask for it."""
    import ray

    # As ``seap_ray.cluster.connect`` has it: a test finds the workers of those before it, with torch imported.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums, and so bits, depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- dense models ----------------------------------------------------------------------------------------------------


def save_dense(folder: Path, name: str, dtype: torch.dtype, max_shard_size: str = "5GB") -> None:
    """Write a random model of ``CONFIGS`` with a tokenizer, a chat template and a generation config.

    No weight is left as it is initialised: biases would be zero and norms one, and hide what a cut does to them.
    """
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                noise *= 1.5 if "embed" in key else 1.5 * parameter.shape[1] ** -0.5
            else:
                noise = 0.3 * noise + ("norm" in key)
            parameter.copy_(noise)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template="{{ messages[-1]['content'] }}",
    )


Dense = Callable[..., Path]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """``dense(name, dtype, max_shard_size)``: the folder of a model, made once. To change it, copy it."""
    made: dict[tuple[Any, ...], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        key = (name, dtype, max_shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            save_dense(made[key], *key)
        return made[key]

    return folder


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The model in the dtype that it was saved in.

    Its weights are copied: as loaded they are views of the mapped file, at any address, and the sums of a BLAS product,
    and so its last bits, depend on how its operands are aligned.
    """
    # Grouped products of experts are for rows of 16 bytes, and not in float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager", **kwargs).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


MIXTURES = ("mixtral", "qwen3_moe")
OUTPUTS = {"opt": ("self_attn.out_proj", "fc2"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")}


def output_modules(model: Any) -> dict[str, str]:
    """The modules whose inputs are the sites, written out family by family; of a mixture its attention alone."""
    family = model.config.model_type.removeprefix("seap_")
    if family in MIXTURES:
        return {"attn": "self_attn.o_proj"}
    named = OUTPUTS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    return dict(zip(("attn", "mlp"), named, strict=True))


def random_ids(n: int = 3, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms without the float32 inside of Hugging Face's own, which hides errors below 1e-8 and magnifies others."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def forward_of_gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    for norm in (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
    for norm in (Gemma2RMSNorm, Gemma3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward_of_gemma)


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose every output is summed in the same order, however many outputs there are (BLAS's are not)."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = (x.unsqueeze(-2) * weight).sum(-1)
        return y if bias is None else y + bias

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(ids_BT).logits


# --- plans and statistics --------------------------------------------------------------------------------------------


def random_kept(dense_shape: Shape, shape: Shape, rng: random.Random, n_experts: int = 0) -> Kept:
    groups = tuple(sorted(rng.sample(range(dense_shape.groups), shape.groups)))
    per_group = dense_shape.heads_per_group
    heads = tuple(
        k * per_group + h for k in groups for h in sorted(rng.sample(range(per_group), shape.heads_per_group))
    )
    each = [sorted(rng.sample(range(dense_shape.channels), shape.channels)) for _ in range(max(n_experts, 1))]
    return Kept(groups, heads, tuple(channel for channels in each for channel in channels), len(each))


def random_plan(architecture: Architecture, seed: int, compensation: str = "none") -> Plan:
    """Other widths in every layer; layer 1 stays dense, layer 0 loses attention alone, the last one channels alone."""
    rng, whole = random.Random(seed), architecture.dense
    shapes: list[Shape] = []
    while len(shapes) < architecture.n_layers:
        layer = len(shapes)
        shape = Shape(
            rng.randint(1, whole.groups), rng.randint(1, whole.heads_per_group), rng.randint(1, whole.channels - 1)
        )
        if layer == 0:
            shape = Shape(rng.randint(1, whole.groups - 1), shape.heads_per_group, whole.channels)
        elif layer == 1:
            shape = whole
        elif layer == architecture.n_layers - 1:
            shape = Shape(whole.groups, whole.heads_per_group, shape.channels)
        if shape not in shapes:
            shapes.append(shape)
    kept = tuple(random_kept(whole, shape, rng, architecture.n_experts) for shape in shapes)
    return Plan("expert", 0.5, compensation, kept, {})


def uniform_plan(architecture: Architecture, shape: Shape, compensation: str = "none", seed: int = 0) -> Plan:
    """The same widths, but other units, in every layer."""
    rng = random.Random(seed)
    whole = architecture.dense
    kept = tuple(random_kept(whole, shape, rng, architecture.n_experts) for _ in range(architecture.n_layers))
    return Plan("expert", 0.5, compensation, kept, {})


def random_statistics(architecture: Architecture, seed: int, n: int = 20) -> Statistics:
    """Moments of random activations whose means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for layer, given in enumerate(architecture.layers):
        widths = {"attn": given.shape.heads * architecture.head_dim, "mlp": given.shape.channels, "block": 1}
        for site, one in [(kind, one) for kind in RECORDED for one in architecture.sites(kind)]:
            scale, shift = (torch.randn(widths[site], generator=generator, dtype=torch.float64) for _ in range(2))
            x_ND = torch.randn(n, widths[site], generator=generator, dtype=torch.float64) * scale + shift
            statistics[layer, one] = Moments(n, x_ND.mean(0), (x_ND - x_ND.mean(0)).square().sum(0))
    return statistics


# --- compacted checkpoints -------------------------------------------------------------------------------------------


def write_compacted(compaction: Compaction, folder: Path, max_bytes: int = 10**9) -> Path:
    """What ``prune`` has Ray tasks do, one after the other."""
    files = compaction.files(max_bytes)
    hashes = {name: write_tensors(compaction, outputs, folder / name) for name, outputs in files.items()}
    finish(compaction, folder, files, {"files": hashes})
    return folder


@pytest.fixture(scope="session")
def served_run(tmp_path_factory):
    """The run that the tests of the service share."""
    from served import make_run

    return make_run(tmp_path_factory.mktemp("served"))
