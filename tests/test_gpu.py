"""What calibration and compacted models give on a GPU, against the CPU. Needs no Ray."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from seap_ray.core.moments import Covariance, Moments
from seap_ray.models import forward
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import record
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.loading import attention_of
from seap_ray.models.recorder import token_cosines
from tests.support.builders import (
    RAGGED,
    SHARDS,
    load,
    logits,
    random_ids,
    random_plan,
    random_statistics,
    recorded_by,
    write_compacted,
)
from tests.support.oracles import as_tuples, assert_close, assert_equal, two_pass

pytestmark = pytest.mark.gpu

FAMILIES = ["llama_mha", "llama_gqa", "qwen3", "gemma2", "phi3", "opt", "gpt_neox"]


def activations(n, width, dtype, seed=0):
    """Columns of other scales whose means are not zero, and an outsized first token."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, width, generator=generator) * torch.logspace(-2, 2, width) + 3
    x_ND[:1] *= 100
    return x_ND.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "width"), [(0, 5), (1, 5), (31, 64), (257, 70), (8192, 96), (20000, 3)])
def test_moments_are_those_of_two_passes_in_float64(n, width, dtype):
    x_ND = activations(n, width, dtype)
    moments = Moments.of(x_ND.cuda())
    expected = Moments.of(x_ND)
    assert moments.count == n and moments.mean_D.dtype == moments.m2_D.dtype == torch.float64
    torch.testing.assert_close(moments.mean_D.cpu(), expected.mean_D, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.m2_D.cpu(), expected.m2_D, rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("statistic", [Moments, Covariance])
def test_named_tokens_give_the_bytes_of_those_tokens_alone_and_others_are_not_read(statistic):
    x_ND = activations(1000, 70, torch.bfloat16).cuda()
    rows_N = torch.arange(1000, device="cuda")[torch.arange(1000) % 7 > 2]
    expected = statistic.of(x_ND[rows_N])
    x_ND[torch.arange(1000) % 7 <= 2] = torch.nan
    assert_equal({"": statistic.of(x_ND, rows_N)}, {"": expected})


def test_moments_and_cosines_are_the_same_bytes_every_time():
    x_ND, y_ND = (activations(5000, 300, torch.bfloat16, seed).cuda() for seed in (1, 2))
    first = Moments.of(x_ND)
    cosine_N = token_cosines(x_ND, y_ND, None)
    for _ in range(5):
        assert_equal({"": Moments.of(x_ND)}, {"": first})
        assert torch.equal(token_cosines(x_ND, y_ND, None), cosine_N)


@pytest.mark.parametrize("width", [3, 1024, 5000])
def test_cosines_are_those_in_float64(width):
    x_ND, y_ND = (activations(200, width, torch.bfloat16, seed) for seed in (1, 2))
    rows_N = torch.arange(0, 200, 3)
    expected_N = cosine_similarity(x_ND.double(), y_ND.double())
    cosine_N = token_cosines(x_ND.cuda(), y_ND.cuda(), None).cpu()
    torch.testing.assert_close(cosine_N, expected_N, rtol=1e-12, atol=1e-14)
    assert torch.equal(token_cosines(x_ND.cuda(), y_ND.cuda(), rows_N.cuda()).cpu(), cosine_N[rows_N])


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen3_moe"])
def test_recorded_moments_are_those_of_all_tokens_in_two_passes(dense, float64_norms, name):
    # On one device both: rotary embeddings are float32 in any model, and differ between devices.
    model = load(dense(name, torch.float64)).cuda()
    assert_close(record(model, RAGGED, batch_tokens=100), two_pass(model, RAGGED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_gives_the_bytes_of_the_whole_model(dense, name, dtype):
    folder = dense(name, dtype)
    checkpoint = Checkpoint.open(str(folder))
    attention = attention_of(checkpoint.config)
    whole = load(folder, **({"attn_implementation": attention} if attention else {})).cuda()
    for memory_budget in (1 << 30, 0):  # hidden states wait on the GPU, or on the host
        model = LayerwiseModel(checkpoint, dtype, torch.device("cuda"), memory_budget)
        recorded = recorded_by(model, covariance=True)
        for shard, sequences in SHARDS.items():
            assert_equal(recorded[shard], record(whole, sequences, batch_tokens=40, covariances=range(4)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_compacted_model_gives_the_logits_of_the_cpu(dense, tmp_path, name, dtype, tolerance):
    base = Checkpoint.open(str(dense(name, dtype)))
    plan = random_plan(base.architecture, seed=1, compensation="mean")
    folder = write_compacted(
        CheckpointExport(base, plan, random_statistics(base.architecture, seed=2)), tmp_path / "expert"
    )
    model = load(folder)
    expected = logits(model, random_ids())
    on_gpu = logits(model.cuda(), random_ids().cuda()).cpu()
    assert (on_gpu - expected).double().norm() <= tolerance * expected.double().norm()


def test_a_batch_that_does_not_fit_is_halved(dense, monkeypatch):
    model = load(dense("llama_gqa")).cuda()
    sequences = [list(range(3, 43))] * 4096
    expected = record(model, sequences, batch_tokens=4000)
    sizes = []
    run_batch = forward._forward

    def noted(model, rows, *arguments):
        sizes.append(len(rows))
        return run_batch(model, rows, *arguments)

    monkeypatch.setattr(forward, "_forward", noted)
    torch.cuda.empty_cache()
    allowed_bytes = torch.cuda.memory_reserved() + (48 << 20)
    try:
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / torch.cuda.mem_get_info()[1])
        halved = record(model, sequences, batch_tokens=10**6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[:2] == [4096, 2048] and sizes[-1] < 2048
    assert_close(halved, as_tuples(expected), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_covariances_are_off_by_a_small_part_of_the_deviations(dtype):
    x_ND = activations(8192, 200, dtype)[1:]
    deviation_ND = x_ND.double() - x_ND.double().mean(0)
    lengths_D = deviation_ND.norm(dim=0)
    error_DD = Covariance.of(x_ND.cuda()).comoment_DD.cpu() - deviation_ND.T @ deviation_ND
    assert (error_DD.abs() / lengths_D.outer(lengths_D)).max() < 3e-4
