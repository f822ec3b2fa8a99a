"""Scoring: log-likelihoods against transformers' own forward pass over one sequence alone, for every family."""

import random

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from seap_ray.judges import scoring
from seap_ray.judges.scoring import Continuation, score
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.loading import decoder_of
from tests.support.builders import CONFIGS, HYBRIDS, PHI_3_ROPE, SIZES, load, random_plan, write_compacted

LONGEST = 48
"""Tokens of the longest sequences: longer than the sliding windows of ``CONFIGS``, which are 16."""


def random_items(seed: int, n_tokens: int = 6) -> list[Continuation]:
    """Return continuations of questions, some alike, equal, of one token, or the beginning of one another."""
    random_ = random.Random(seed)

    def tokens(at_least: int, at_most: int) -> list[int]:
        return [random_.randint(3, 2 + n_tokens) for _ in range(random_.randint(at_least, at_most))]

    continuations: list[Continuation] = []
    for _ in range(6):
        context = tokens(1, LONGEST - 10)
        choices = [tokens(1, 9) for _ in range(random_.randint(1, 4))]
        choices += [choices[0], choices[0][:1], [*choices[0], 5], [7]]
        random_.shuffle(choices)
        continuations += [(context + choice, len(context)) for choice in choices]

    # Texts that are scored from their second token on, an empty one among them, and items that share nothing.
    continuations += [(tokens(2, LONGEST), 1) for _ in range(4)]
    continuations += [([4], 1), (tokens(5, 9), 1)]
    return continuations


@torch.no_grad()
def alone(model, continuation: Continuation) -> tuple[float, bool]:
    """Score a continuation by the model's own logits over its sequence, unpadded."""
    ids, start = continuation
    if start == len(ids):
        return 0.0, True
    logits_TV = model(torch.tensor([ids[:-1]])).logits[0].double()
    target_T = torch.tensor(ids[1:])
    chosen_T = logits_TV.log_softmax(-1).gather(1, target_T[:, None])[:, 0]
    return float(chosen_T[start - 1 :].sum()), bool((logits_TV.argmax(-1) == target_T)[start - 1 :].all())


def check(model, continuations: list[Continuation], batch_tokens: int) -> None:
    scored = score(model, continuations, batch_tokens=batch_tokens)
    for continuation, result in zip(continuations, scored, strict=True):
        log_likelihood, is_greedy = alone(model, continuation)
        # In float32, in which a sum of hundreds has no more digits.
        assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-6, abs=1e-4)
        assert result.is_greedy == is_greedy
        assert result.n_tokens == len(continuation[0]) - continuation[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_each_sequence_alone(name, attention, dense):
    # Without the soft cap of its attention Gemma 2 would be another model.
    model = load(dense(name), attn_implementation="eager" if name == "gemma2" else attention)
    for seed, batch_tokens in enumerate((4096, 100, 1)):
        check(model, random_items(seed), batch_tokens)


@pytest.mark.parametrize("name", [*HYBRIDS, "granite", "cohere", "cohere2", "hyperclovax", "vaultgemma"])
def test_scores_are_those_of_each_sequence_alone_where_logits_are_scaled_or_layers_have_states(name, dense):
    check(load(dense(name)), random_items(1)[:20], batch_tokens=128)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_a_compacted_model_are_those_of_each_sequence_alone(name, dense, tmp_path):
    import seap_ray.models.hf  # noqa: F401

    checkpoint = Checkpoint.open(str(dense(name)))
    plan = random_plan(checkpoint.architecture, seed=1)
    folder = write_compacted(CheckpointExport(checkpoint, plan, {}), tmp_path / "expert")
    check(load(folder, attn_implementation="eager" if name == "gemma2" else "sdpa"), random_items(3), 256)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "gemma3", "opt"])
def test_scores_are_the_same_where_each_sequence_has_a_row_of_its_own(name, dense, monkeypatch):
    model = load(dense(name))
    # Code that came with a checkpoint.
    decoder = decoder_of(model)
    monkeypatch.setattr(type(decoder), "__module__", "custom_code")
    check(model, random_items(4), 256)


def test_scores_do_not_depend_on_how_many_logits_are_made_at_once(dense, monkeypatch):
    model = load(dense("llama_gqa"))
    continuations = random_items(5)
    expected = score(model, continuations, batch_tokens=4096)
    for n_places in (1, 7, 64):
        monkeypatch.setattr(scoring, "MAX_LOGITS", n_places * model.config.vocab_size)
        for result, wanted in zip(score(model, continuations, batch_tokens=4096), expected, strict=True):
            assert result.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-5)
            assert result.is_greedy == wanted.is_greedy


def test_a_sequence_of_long_rope_has_its_own_frequencies_whatever_its_neighbours_are():
    rope = PHI_3_ROPE | {"original_max_position_embeddings": 32}
    config = Phi3Config(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        rope_parameters=rope,
        original_max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    assert model.config.rope_parameters["original_max_position_embeddings"] == 32
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1

    ids = [3 + i % 7 for i in range(LONGEST)]
    # 33 tokens of which 32 are read, and 34 of which 33 are.
    check(model, [(ids[:n], 1) for n in (20, 33, 34, 40)] + random_items(6), 4096)


def test_of_equally_likely_tokens_the_first_is_the_greedy_one(dense):
    model = load(dense("llama_mha"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    greedy = [result.is_greedy for result in score(model, [([5, 0], 1), ([5, 1], 1), ([5, 0, 0], 1)], batch_tokens=64)]
    assert greedy == [True, False, True]


def test_what_begins_alike_is_read_once_and_a_last_token_not_at_all(dense):
    model = load(dense("llama_gqa"))
    read: list[int] = []
    decoder_of(model).register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context = [4, 5, 6, 7, 8]
    score(model, [([*context, choice], len(context)) for choice in (9, 10, 11)], batch_tokens=64)
    score(model, [([*context, 9, 10], 5), ([*context, 9, 11], 5), ([*context, 12, 9], 5)], batch_tokens=64)
    score(model, [([4], 1), (context, 5)], batch_tokens=64)
    assert read == [5, 7]


def test_sums_of_many_logits_stay_bounded(dense, monkeypatch):
    model = load(dense("llama_gqa"))
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: sizes.append(out.numel()))
    monkeypatch.setattr(scoring, "MAX_LOGITS", 5 * model.config.vocab_size)
    score(model, [([3 + i % 9 for i in range(40)], 1)], batch_tokens=64)
    assert max(sizes) == 5 * model.config.vocab_size and sum(sizes) == 39 * model.config.vocab_size
