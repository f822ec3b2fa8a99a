"""Fixtures that every test may ask for, and the order in which files run. Builders are in ``support.builders``."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from seap_ray.core.families import FAMILIES, MULTIMODAL
from seap_ray.models.hf.configuration_seap import class_in_transformers
from tests.support.builders import HYBRIDS, MIXTURES, save_dense

transformers_logging.disable_progress_bar()
# Ray gives its workers what other processes leave of a core: beside a test that computes they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# Where an environment forbids bytecode, every process that is started from here would compile the project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# ``sitecustomize`` lies there, which Python imports in every process that is started from here.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "support" / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it is to run in the background, and what that starts: `serve run` would never end.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_service",
    "test_shared_engine",
    "test_job",
    "test_docs",
    "test_chats",
    "test_eval",
    "test_vllm_model",
    "test_files",
    "test_lm_eval",
    "test_divergences",
    "test_correction_jobs",
    "test_synthesis_study",
    "test_preflight",
    "test_app",
    "test_allocation",
    "test_page",
    "test_hf",
    "test_conversion",
    "test_playground",
    "test_draw",
)
"""Files that are begun with, so that no process of pytest is left with one at the end."""
SERVED = ("test_service", "test_shared_engine")
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


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, a million objects that stay."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let libraries find their objects when Python ends, which they would say leak."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs in this process, for all tests that ask for it."""
    import ray

    # As ``seap_ray.pipeline.cluster.connect`` has it: a test finds the workers of those before it, with torch imported.
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


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Norms without the float32 inside of Hugging Face's own, which hides errors below 1e-8 and magnifies others.

    Rotary embeddings that some families compute in float32 stay in float64 as well.
    """

    def root_mean_square(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def root_mean_square_of_gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    def layer_norm_of_cohere(self: Any, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def layer_norm_of_olmo(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, self.normalized_shape, eps=1e-5)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute a router's product, whose factors are rounded to float32 before."""
        return torch.nn.functional.linear(x.double(), weight.double())

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Compute an attention's softmax, which is rounded to float32."""
        return torch.nn.functional.softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    functional = SimpleNamespace(**{**vars(torch.nn.functional), "linear": linear})

    def one_hot(places: torch.Tensor, n: int) -> torch.Tensor:
        """Return the weights by which Gemma 4 averages patches of a picture, which are rounded to float32."""
        return torch.nn.functional.one_hot(places, n).double()

    functional_of_gemma4 = SimpleNamespace(**{**vars(torch.nn.functional), "one_hot": one_hot})
    functional_of_granite = SimpleNamespace(**{**vars(torch.nn.functional), "softmax": softmax})

    # The routers of these round no factor, and would hand float64 to layers of a float32 model.
    unrounded = ("SeapQwen3NextForCausalLM", "SeapQwen3_5MoeForCausalLM", "SeapGptOssForCausalLM")
    mixtures = [family.model_class for family in FAMILIES.values() if family.is_moe]
    mixtures = [name for name in mixtures if name not in unrounded]
    for model_class in [row.model_class for row in (*FAMILIES.values(), *MULTIMODAL.values())]:
        module = import_module(class_in_transformers(model_class).__module__)
        if model_class in mixtures:
            monkeypatch.setattr(module, "F", functional, raising=False)
        if model_class == "SeapGraniteSWAForCausalLM":
            monkeypatch.setattr(module, "F", functional_of_granite)
        if model_class == "SeapGemma4ForConditionalGeneration":
            monkeypatch.setattr(module, "F", functional_of_gemma4)
        for name, norm in vars(module).items():
            # These two have no float32 but by ``float``, below.
            if name.endswith("RMSNorm") and name not in ("Gemma4RMSNorm", "Llama4TextRMSNorm"):
                is_gemmas = name.startswith(("Gemma", "VaultGemma", "Qwen3_5", "Qwen3Next"))
                monkeypatch.setattr(norm, "forward", root_mean_square_of_gemma if is_gemmas else root_mean_square)
            elif name in ("CohereLayerNorm", "Cohere2LayerNorm"):
                monkeypatch.setattr(norm, "forward", layer_norm_of_cohere)
            elif name == "OlmoLayerNorm":
                monkeypatch.setattr(norm, "forward", layer_norm_of_olmo)

    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))

    # The states of mixers, and the norms behind them, are in float32 as well. What a router above gives in float64 has
    # to become float32 again in a float32 mixture.
    params = getattr(request.node, "callspec", SimpleNamespace(params={})).params
    if params.get("name") in set(MIXTURES) - set(HYBRIDS):
        return
    to = torch.Tensor.to

    def unless_float32(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x if x.dtype == torch.float64 and args == (torch.float32,) else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", unless_float32)


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose every output is summed in the same order, however many outputs there are (BLAS's are not)."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = (x.unsqueeze(-2) * weight).sum(-1)
        return y if bias is None else y + bias

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no page after a job: seconds for what ``tests/report`` looks at. Fixtures of a module draw theirs."""
    monkeypatch.setattr("seap_ray.pipeline.job.write_report", lambda run: run.report)


@pytest.fixture(scope="session")
def served_run(cluster, tmp_path_factory):
    """The run that the tests of the service share."""
    from tests.support.served import make_run

    return make_run(tmp_path_factory.mktemp("served"))
