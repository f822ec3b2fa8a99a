"""What the hooks measure, against activations collected one prompt at a time and reduced in two passes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seap_ray.core.moments import Moments
from seap_ray.errors import DataError
from seap_ray.models import forward, recorder
from seap_ray.models.batching import counted_rows, group_by_length, make_batches, pack_sequences
from seap_ray.models.forward import record
from seap_ray.models.loading import decoder_of
from seap_ray.models.recorder import recording
from seap_ray.models.sequences import CountedSequence
from tests.support.builders import CONFIGS, RAGGED, load, output_modules, prompts
from tests.support.oracles import as_tuples, assert_close, assert_equal, two_pass

pytestmark = pytest.mark.usefixtures("float64_norms")


@pytest.mark.parametrize(
    "sequences", [RAGGED[:1], RAGGED[1:2], RAGGED[:2], RAGGED], ids=["one", "token", "two", "many"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_all_tokens_in_two_passes(dense, name, sequences):
    model = load(dense(name, torch.float64))
    assert_close(record(model, sequences, batch_tokens=100), two_pass(model, sequences))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_a_half_precision_model_lose_nothing_after_the_activation(dense, dtype):
    model = load(dense("llama_gqa", dtype))
    recorded = record(model, RAGGED[2:3], batch_tokens=100)
    assert_close(recorded, two_pass(model, RAGGED[2:3]))
    assert all(moments.mean_D.dtype == moments.m2_D.dtype == torch.float64 for moments in recorded.values())


def test_padding_does_not_count_in_a_batch_of_very_different_lengths(dense):
    model = load(dense("llama_gqa", torch.float64))
    sequences = prompts([1, 60, 2, 33])
    assert len(group_by_length([len(s) for s in sequences], 10**6)) == 1
    together = record(model, sequences, batch_tokens=10**6)
    assert_close(together, two_pass(model, sequences))
    assert {moments.count for moments in together.values()} == {96}


def test_padding_does_not_count_even_where_it_is_not_a_number(dense):
    model = load(dense("llama_gqa", torch.float64))
    sequences = prompts([4, 11])
    ids_BT = torch.zeros(2, 11, dtype=torch.int64)
    mask_BT = torch.zeros(2, 11, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = True
    poisoned = 0

    def poison(_module, inputs):
        nonlocal poisoned
        poisoned += 1
        return (inputs[0].masked_fill(~mask_BT[:, :, None], torch.nan),)

    def heal(_module, _inputs, output):
        return output.nan_to_num()

    for block in model.model.layers:  # these hooks come first, so the recorder's see the poison
        for module in output_modules(model).values():
            block.get_submodule(module).register_forward_pre_hook(poison)
            block.get_submodule(module).register_forward_hook(heal)
    with torch.no_grad(), recording(decoder_of(model), counted_rows(mask_BT)) as recorded:
        decoder_of(model)(input_ids=ids_BT, attention_mask=mask_BT)
    assert poisoned == 8
    assert_close(recorded, two_pass(load(dense("llama_gqa", torch.float64)), sequences))


@pytest.mark.parametrize("batch_tokens", [1, 13, 40, 64, 10**6])
def test_the_batch_size_changes_nothing(dense, batch_tokens):
    model = load(dense("qwen2", torch.float64))
    assert_close(
        record(model, RAGGED, batch_tokens=batch_tokens), as_tuples(record(model, RAGGED, batch_tokens=31)), 1e-9
    )


def test_the_order_of_the_sequences_changes_nothing(dense):
    model = load(dense("llama_mha", torch.float64))
    assert_close(record(model, RAGGED[::-1], batch_tokens=50), as_tuples(record(model, RAGGED, batch_tokens=50)), 1e-9)


def test_a_second_run_gives_the_same_bytes(dense):
    model = load(dense("llama_gqa", torch.float32))
    first, second = (record(model, RAGGED, batch_tokens=50) for _ in range(2))
    for key, moments in first.items():
        assert torch.equal(moments.mean_D, second[key].mean_D)
        assert torch.equal(moments.m2_D, second[key].m2_D)


def test_skip_first_token_leaves_position_0_of_every_sequence_out(dense):
    model = load(dense("llama_gqa", torch.float64))
    recorded = record(model, RAGGED, batch_tokens=60, skip_first_token=True)
    assert_close(recorded, two_pass(model, RAGGED, skip_first=True))
    assert {m.count for m in recorded.values()} == {sum(map(len, RAGGED)) - len(RAGGED)}


def test_skip_first_token_bears_a_batch_of_sequences_of_one_token(dense):
    model = load(dense("llama_gqa", torch.float64))
    sequences = prompts([1, 20, 1])
    assert group_by_length([1, 20, 1], 20) == [[0, 2], [1]]
    recorded = record(model, sequences, batch_tokens=20, skip_first_token=True)
    assert_close(recorded, two_pass(model, sequences, skip_first=True))


def spans(sequences, start: int, end: int) -> list[CountedSequence]:
    """Let the tokens from start up to end count."""
    return [CountedSequence(ids, [start <= place < end for place in range(len(ids))]) for ids in sequences]


@pytest.mark.parametrize(
    ("name", "skip_first"),
    [("llama_gqa", False), ("llama_gqa", True), ("gemma2", False), ("qwen3_moe", False), ("opt", True)],
)
def test_only_tokens_that_count_are_in_the_moments(dense, name, skip_first):
    """A token sees nothing behind it: those before a span are the moments of texts that end there."""
    model = load(dense(name, torch.float64))
    settings = {"batch_tokens": 50, "skip_first_token": skip_first}
    before = two_pass(model, [ids[:3] for ids in RAGGED], skip_first=skip_first)
    until = two_pass(model, [ids[:9] for ids in RAGGED], skip_first=skip_first)
    span = record(model, spans(RAGGED, 3, 9), **settings)
    both = {key: Moments(*before[key]) + moments for key, moments in span.items()}
    assert_close(both, until)
    assert span[0, "attn"].count == sum(len(ids[3:9]) for ids in RAGGED)


def test_where_all_tokens_count_the_moments_are_the_same_bytes_as_without_a_mark(dense):
    model = load(dense("llama_gqa", torch.float32))
    assert_equal(record(model, spans(RAGGED, 0, 99), batch_tokens=50), record(model, RAGGED, batch_tokens=50))


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3_moe"])
def test_sequences_of_which_no_token_counts_have_moments_of_no_token(dense, name):
    model = load(dense(name, torch.float64))
    covariances = range(4) if name == "llama_gqa" else ()
    none = record(model, spans(RAGGED, 99, 99), batch_tokens=50, covariances=covariances)
    assert {moments.count for moments in none.values()} == {0}
    expected = record(model, RAGGED[:2], batch_tokens=50, covariances=covariances)
    assert_equal({key: moments + expected[key] for key, moments in none.items()}, expected)


@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("by_name", [False, True], ids=["position", "name"])
@torch.no_grad()
def test_a_layer_may_take_its_input_by_name_and_give_a_tuple(dense, monkeypatch, by_name, as_tuple):
    model = load(dense("llama_gqa", torch.float64)).model
    block, x_BTD = model.layers[1], torch.randn(2, 5, 48, dtype=torch.float64)
    rotary = model.rotary_emb(x_BTD, torch.arange(5)[None])
    y_BTD = block(x_BTD, position_embeddings=rotary)
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: (forward(*a, **k),) if as_tuple else forward(*a, **k))
    counted_BT = torch.tensor([[True] * 5, [True, False, False, True, False]])
    decoder = SimpleNamespace(layers=[block], config=model.config)
    with recording(decoder, counted_rows(counted_BT)) as recorded:
        if by_name:
            block(hidden_states=x_BTD, position_embeddings=rotary)
        else:
            block(x_BTD, position_embeddings=rotary)
    cosine_N = torch.stack(
        [x @ y / (x.norm() * y.norm()) for x, y in zip(x_BTD[counted_BT], y_BTD[counted_BT], strict=True)]
    )
    assert recorded[0, "block"].count == 7
    torch.testing.assert_close(recorded[0, "block"].mean_D, cosine_N.mean()[None], rtol=1e-12, atol=0)


def test_a_layer_that_changes_nothing_has_cosine_one_and_one_that_turns_its_input_round_less_one(dense, monkeypatch):
    model = load(dense("qwen2", torch.float64))
    monkeypatch.setattr(model.model.layers[1], "forward", lambda x_BTD, **_: 3 * x_BTD)
    monkeypatch.setattr(model.model.layers[2], "forward", lambda x_BTD, **_: -x_BTD)
    recorded = record(model, RAGGED, batch_tokens=50)
    for layer, cosine in ((1, 1.0), (2, -1.0)):
        assert recorded[layer, "block"].mean_D.tolist() == pytest.approx([cosine], rel=1e-12)
        assert recorded[layer, "block"].m2_D.tolist() == pytest.approx([0.0], abs=1e-20)


def test_moments_of_two_parts_of_a_corpus_add_up_to_those_of_the_whole(dense):
    model = load(dense("llama_gqa", torch.float64))
    parts = [record(model, part, batch_tokens=40) for part in (RAGGED[:5], RAGGED[5:])]
    merged = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert_close(merged, as_tuples(record(model, RAGGED, batch_tokens=100)))


def test_a_layer_whose_output_overflows_is_refused(dense):
    model = load(dense("llama_gqa"))
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5] = torch.inf
    with pytest.raises(DataError, match="layer 3, site block"):
        record(model, RAGGED, batch_tokens=100)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_hooks_are_there_inside_and_gone_afterwards(dense):
    model = load(dense("llama_gqa"))
    before = hooks_of(model)
    with recording(decoder_of(model), torch.ones(1, 3, dtype=torch.bool)):
        assert hooks_of(model) == before + 12, "three a layer"
    assert hooks_of(model) == before
    record(model, RAGGED[:2], batch_tokens=100)
    assert hooks_of(model) == before


def test_hooks_are_gone_after_an_exception(dense, monkeypatch):
    model = load(dense("llama_gqa"))
    before = hooks_of(model)
    with pytest.raises(ZeroDivisionError), recording(decoder_of(model), torch.ones(1, 3, dtype=torch.bool)):
        raise ZeroDivisionError

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.layers[2].mlp.act_fn, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        record(model, RAGGED[:2], batch_tokens=100)
    assert hooks_of(model) == before


def test_only_the_decoder_runs_without_head_and_cache_and_gradients(dense):
    model = load(dense("llama_gqa"))
    outputs = []

    def refuse(*_args):
        raise AssertionError("the head was called")

    model.lm_head.register_forward_pre_hook(refuse)
    model.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    record(model, RAGGED, batch_tokens=60)
    assert len(outputs) == len(pack_sequences([len(s) for s in RAGGED], 60))
    assert all(output.past_key_values is None for output in outputs)
    assert not any(output.last_hidden_state.requires_grad for output in outputs)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_is_halved_until_it_fits_in_memory(dense, monkeypatch, error):
    model = load(dense("llama_gqa", torch.float64))
    sizes, run_batch = [], forward._forward

    def small_memory(model, rows, *rest):
        sizes.append(sum(map(len, rows)))
        if sizes[-1] > 2:
            raise error
        return run_batch(model, rows, *rest)

    monkeypatch.setattr(forward, "_forward", small_memory)
    recorded = record(model, RAGGED, batch_tokens=10**6)
    assert_close(recorded, two_pass(model, RAGGED))
    assert sizes[0] == len(RAGGED) and max(size for size in sizes if size <= 2) == 2
    assert sum(size for size in sizes if size <= 2) == len(RAGGED)


def test_a_single_sequence_that_does_not_fit_and_other_errors_are_raised(dense, monkeypatch):
    model = load(dense("llama_gqa"))

    def full(*_args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(forward, "_forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        record(model, RAGGED[:3], batch_tokens=100)
    calls = []

    def broken(_model, rows, *_rest):
        calls.append(sum(map(len, rows)))
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(forward, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        record(model, RAGGED[:3], batch_tokens=100)
    assert calls == [3]


def test_code_that_is_not_of_transformers_has_a_sequence_a_row():
    class Decoder(nn.Module):
        config = SimpleNamespace(model_type="llama")

    lengths = [len(sequence) for sequence in RAGGED]
    rows = make_batches(Decoder(), RAGGED, 60)
    assert [[[len(sequence) for sequence in row] for row in batch] for batch in rows] == [
        [[lengths[i]] for i in group] for group in group_by_length(lengths, 60)
    ]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_activations_that_are_not_finite_are_refused_with_their_layer_and_site(dense, value):
    model = load(dense("llama_gqa"))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 7] = value
    with pytest.raises(DataError, match="layer 2, site mlp"):
        record(model, RAGGED, batch_tokens=100)


def test_what_enters_a_layer_on_one_device_is_compared_where_it_leaves_on_another():
    """This happens under device_map: accelerate moves inputs after the hooks have seen them."""
    recorded: dict = {}
    x_BTD = torch.ones(1, 3, 4)
    recorder._block_hook(recorded, (0, "block"), torch.arange(2))(nn.Identity(), (x_BTD,), {}, x_BTD.to("meta"))
    assert recorded[0, "block"].mean_D.device.type == "meta" and recorded[0, "block"].count == 2
