"""How many MoE experts stay for a ratio, which of them, and what is refused."""

import pytest
import torch

from seap_ray.config import Config, PruningSection
from seap_ray.core.allocation import check_ratio, check_target, even_ratio
from seap_ray.core.architecture import Architecture
from seap_ray.core.experts import choose_count, expert_counts, removed_share
from seap_ray.core.moments import Moments
from seap_ray.core.plan import Kept, keep_experts
from seap_ray.core.scores import expert_scores, reap
from seap_ray.core.targets import StorageCosts, Target
from seap_ray.errors import ConfigError

PRUNING = PruningSection(mlp_unit="expert")
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
}
DEEPSEEK = {
    **QWEN3,
    "model_type": "deepseek_v3",
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 2,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}


def test_as_many_stay_as_the_router_chooses_and_equally_many_of_every_group():
    assert expert_counts(Architecture.of(QWEN3), PRUNING) == [*range(16, 2, -1)]
    assert expert_counts(Architecture.of(DEEPSEEK), PRUNING) == [16, 12, 8]
    # Five of two groups are three of each.
    assert expert_counts(Architecture.of({**DEEPSEEK, "num_experts_per_tok": 5}), PRUNING) == [16, 12]
    # A group's value is that of its best two.
    narrow = {**DEEPSEEK, "num_experts_per_tok": 1}
    assert expert_counts(Architecture.of(narrow), PRUNING) == [16, 12, 8]
    assert Architecture.of({k: v for k, v in DEEPSEEK.items() if "group" not in k}).expert_groups == (8, 4)


def test_no_layer_loses_more_than_the_largest_share():
    tight = PruningSection.model_validate({"mlp_unit": "expert", "allocation": {"max_sparsity": 0.25}})
    architecture = Architecture.of(QWEN3)
    fewest = expert_counts(architecture, tight)[-1]
    layer = architecture.layer_parameters(architecture.layers[0])
    # An expert is three matrices of 8 x 4 and a row of the router.
    assert (16 - fewest) * (3 * 8 * 4 + 8) <= 0.25 * layer < (17 - fewest) * (3 * 8 * 4 + 8)


@pytest.mark.parametrize("config", [QWEN3, DEEPSEEK], ids=("alone", "groups"))
def test_the_number_comes_nearest_to_the_ratio(config):
    architecture = Architecture.of(config)
    counts = expert_counts(architecture, PRUNING)
    for ratio in (0.0, 0.05, 0.1, 0.2, 0.3, 0.35):
        chosen = choose_count(architecture, PRUNING, ratio=ratio)
        distances = {n: abs(removed_share(architecture, n) - ratio) for n in counts}
        assert chosen in counts and distances[chosen] == min(distances.values())
    sizes = [3 * 8 * 4 + 8 + (config is DEEPSEEK)] * sum(layer.n_experts > 0 for layer in architecture.layers)
    assert removed_share(architecture, 12) == pytest.approx(4 * sum(sizes) / architecture.decoder_parameters)


def test_a_ratio_for_which_too_few_would_stay_is_refused_with_the_largest_that_works():
    architecture = Architecture.of(QWEN3)
    largest = removed_share(architecture, 3)
    message = rf"3 of the 16 MoE experts .* chooses 3 for a token; the largest ratio is {int(largest * 1e4) / 1e4:g}"
    with pytest.raises(ConfigError, match=message):
        check_ratio(architecture, PRUNING, ratio=0.9, adds_biases=False)
    check_ratio(architecture, PRUNING, ratio=int(largest * 1e4) / 1e4, adds_biases=False)


def test_the_most_stay_that_meet_a_target():
    architecture = Architecture.of(QWEN3)
    limit = architecture.decoder_parameters - 3 * 5 * (3 * 8 * 4 + 8)
    target = Target(architecture, "parameters", "parameters", limit, 0, StorageCosts(architecture, 1))
    assert choose_count(architecture, PRUNING, ratio=0.0, target=target) == 11
    check_target(architecture, PRUNING, target, adds_biases=False)
    assert even_ratio(architecture, PRUNING, target, adds_biases=False) == pytest.approx(
        removed_share(architecture, 11), abs=1e-4
    )
    too_small = Target(architecture, "parameters", "parameters", limit // 4, 0, StorageCosts(architecture, 1))
    with pytest.raises(ConfigError, match="parameters"):
        check_target(architecture, PRUNING, too_small, adds_biases=False)


def test_the_best_stay_of_all_and_in_every_group():
    score_E = torch.tensor([5.0, 1, 2, 8, 9, 7, 6, 3])
    whole = Kept((0,), (0,), ((0, 1),) * 8)
    assert keep_experts(whole, 4, score_E).experts == (3, 4, 5, 6)
    assert keep_experts(whole, 4, score_E, n_groups=2).experts == (0, 3, 4, 5)
    assert keep_experts(whole, 8, score_E) == whole
    # Of equal scores the higher number stays.
    assert keep_experts(whole, 2, torch.ones(8)).experts == (6, 7)


def test_reap_is_a_mean_over_the_tokens_of_an_expert_and_nothing_without_any():
    gated_NE = torch.tensor([[2.0, 0, 0], [0, 6, 0], [4, 0, 0], [0, 0, 0]], dtype=torch.float64)
    moments = Moments.of(torch.cat([gated_NE, (gated_NE > 0).double()], dim=1))
    assert reap(moments).tolist() == [3, 6, 0]
    columns_EC = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=torch.float64)
    assert expert_scores(columns_EC, moments).tolist() == [1.5, 1.75, 0]


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"score": "reap"}, "reap scores whole experts; set mlp_unit=expert"),
        ({"mlp_unit": "expert", "attention_unit": "group"}, "attention_unit group is not for it; choose none"),
        ({"mlp_unit": "expert", "allocation": {"kind": "global"}}, "allocation global is not for it; choose uniform"),
        ({"mlp_unit": "expert", "budget": "official"}, "budget official is not for it"),
        ({"mlp_unit": "expert", "baselines": {"mine": {"attention_unit": "head"}}}, "baselines.mine: mlp_unit expert"),
    ],
    ids=str,
)
def test_settings_that_have_no_meaning_for_whole_experts_are_refused(pruning, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"tasks": ["sort"], "pruning": pruning})


@pytest.mark.parametrize("export", [{"format": "gguf"}, {"quantization": {"scheme": "w8a16", "rounding": "nearest"}}])
def test_formats_that_do_not_hold_fewer_experts_are_refused(export):
    with pytest.raises(ValueError, match=r"mlp_unit expert removes whole experts alone, so export\..* stock"):
        Config.model_validate({"tasks": ["sort"], "pruning": {"mlp_unit": "expert"}, "export": export})


def test_methods_of_others_keep_to_channels():
    config = Config.model_validate(
        {"tasks": ["sort"], "pruning": {"mlp_unit": "expert", "baselines": {"flap": {}, "depth": {}}}}
    )
    units = {name: config.plan_settings(baseline).mlp_unit for name, baseline in config.pruning.baselines.items()}
    assert units == {"flap": "channel", "depth": "channel"}
