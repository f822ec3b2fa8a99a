"""What studies draw, count and average, against sums by hand."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.judges.quality import Quality
from seap_ray.pipeline.evaluate import EvalTask, Failure
from seap_ray.pipeline.results import own_task_rows
from seap_ray.pipeline.shards import Shard, shard_sizes
from seap_ray.report.rows import ModelRow, QualityCell
from seap_ray.routing.router import Route
from seap_ray.studies.corpus import Draw, _first_samples, _rows
from seap_ray.studies.pooling import _share
from seap_ray.studies.routing import _choose_at_random, _choose_by_expectation, _routed_quality
from seap_ray.studies.run import check
from seap_ray.studies.runner import EvaluatedModel
from seap_ray.tasks import BUILT_IN

MOMENTS = ("pruning.score=wifv", "pruning.compensation=mean")


def shards_of(sizes, tokens=None):
    return [
        Shard("sort", f"{i:05}", n, t, "")
        for i, (n, t) in enumerate(zip(sizes, tokens or [10 * n for n in sizes], strict=True))
    ]


@pytest.mark.parametrize("allocation", ["standardised", "depth"])
def test_reconstruction_is_not_studied_where_its_scores_would_not_count(allocation):
    own = load_config(
        [f"pruning.allocation.kind={allocation}", "pruning.baselines={}", "study=reconstruction", *MOMENTS]
    )

    with pytest.raises(
        ConfigError, match=f"pruning.allocation.kind: .*{allocation} does not .* uniform, logistic, global"
    ):
        check(own)

    check(load_config(["pruning.allocation.kind=global", "study=reconstruction"]))


# --- corpus size -----------------------------------------------------------------------------------------------------


def test_samples_are_nested_within_a_seed_and_disjoint_between_seeds():
    shards = shards_of([50] * 60)
    for seed in range(3):
        small, large = _first_samples(shards, 100, seed), _first_samples(shards, 500, seed)
        assert small == large[:2] and sum(shard.n_sequences for shard in large) == 500
    names = [{shard.shard for shard in _first_samples(shards, 1000, seed)} for seed in range(3)]
    assert not names[0] & names[1] and not names[1] & names[2] and not names[0] & names[2]


def test_a_seed_with_too_few_samples_has_none():
    assert _first_samples(shards_of([50] * 5), 100, 0) is None  # a share of one shard
    assert _first_samples(shards_of([50, 43, 7]), 50, 1) is None  # no shards that make up 50


@given(n_rows=st.integers(1100, 3000), size=st.sampled_from((50, 100, 200)))
def test_every_seed_has_an_equal_draw_however_many_rows_a_task_has(n_rows, size):
    shards = shards_of(shard_sizes(n_rows, 50))
    draws = [_first_samples(shards, size, seed) for seed in range(3)]
    assert all(draws) and len({len(draw) for draw in draws}) == 1

    samples = [sum(shard.n_sequences for shard in draw) for draw in draws]
    assert max(samples) - min(samples) <= len(draws[0])
    assert all(abs(n - size) <= 0.05 * size for n in samples)


@pytest.mark.parametrize("n_rows", [3000, 2850, 150])
def test_draws_of_full_shards_have_their_size_exactly(n_rows):
    shards = shards_of(shard_sizes(n_rows, 50))
    for seed in range(3):
        assert sum(shard.n_sequences for shard in _first_samples(shards, 50, seed)) == 50


def evaluated(value, stderr=0.01):
    quality = QualityCell("exact_match", value, stderr, n=10)
    sizes = {"realised_ratio": 0.5, "parameters": 10, "bytes": 20, "kv_bytes_per_token": 4}
    row = ModelRow("m", "m", "baseline", ratio=0.5, **sizes, quality={"sort": quality, "logic": quality})
    return EvaluatedModel(row, None)


def test_a_size_is_offered_only_where_every_seed_has_it():
    shards = shards_of([50, 50, 2])  # as the demo's 102 facts: the third seed has two
    assert [bool(_first_samples(shards, 50, seed)) for seed in range(3)] == [True, True, False]


def test_the_spread_is_over_seeds_and_the_mean_over_tasks_that_have_the_largest_size():
    values = {0: 0.5, 1: 0.7, 2: 0.6}
    by_key = {(0.5, Draw("sort", size, seed)): evaluated(value) for size in (50, 100) for seed, value in values.items()}
    by_key |= {(0.5, Draw("logic", 50, seed)): evaluated(0.0) for seed in range(3)}  # has no 100
    rows = [row.to_json() for row in _rows(by_key)]

    assert [row[:3] for row in rows] == [[0.5, 50, 1], [0.5, 100, 1]]
    for row in rows:
        assert row[3:] == pytest.approx([0.6, 0.1, 0.01])


# --- pooling ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.floats(0.05, 1), st.integers(0, 5))
def test_a_share_is_as_near_as_its_order_allows_and_never_empty(tokens, share, seed):
    shards = shards_of([1] * len(tokens), tokens)
    drawn = _share(shards, share, seed)
    wanted, n = share * sum(tokens), sum(shard.n_tokens for shard in drawn)

    assert drawn and len({shard.shard for shard in drawn}) == len(drawn)
    without_last = n - drawn[-1].n_tokens
    assert len(drawn) == 1 or abs(n - wanted) <= abs(without_last - wanted)

    rest = [shard.n_tokens for shard in shards if shard not in drawn]
    assert not rest or abs(n - wanted) <= abs(n + max(rest) - wanted)
    assert _share(shards, 1, seed) and set(_share(shards, 1, seed)) == set(shards)


# --- routing ---------------------------------------------------------------------------------------------------------

SORT = EvalTask(BUILT_IN["sort"], "seap_ray", "", (SimpleNamespace(),) * 4)


def results_of(**values):
    return {
        (0.5, name): {"sort": own if isinstance(own, Failure) else Quality.of("exact_match", own)}
        for name, own in values.items()
    }


def test_each_prompt_is_answered_by_the_model_that_it_was_sent_to():
    results = results_of(sort=[1, 1, 0, 0], general=[0, 1, 1, 0])
    quality = _routed_quality(results, 0.5, SORT, ["sort", "general", "general", "sort"])
    assert (quality.value, quality.n) == (0.75, 4)
    assert _routed_quality(results, 0.5, SORT, ["sort"] * 4).value == 0.5


def test_a_failed_model_fails_only_where_prompts_were_sent_to_it():
    results = results_of(sort=[1, 1, 0, 0], general=Failure("lost"))
    assert _routed_quality(results, 0.5, SORT, ["sort"] * 4).value == 0.5
    assert _routed_quality(results, 0.5, SORT, ["sort"] * 3 + ["general"]) == Failure("lost")


def test_expectations_are_of_the_half_of_the_prompts_that_is_not_chosen_for():
    """The expert is perfect on every second prompt and wrong on the others; the general model is right in half."""
    values = {"dense": [1, 1, 1, 1], "sort": [1, 0, 1, 0], "general": [0.5] * 4}
    results = {
        (None if name == "dense" else 0.5, name): {"sort": Quality.of("exact_match", own)}
        for name, own in values.items()
    }
    route = Route("sort", "routed", 1.0, {"sort": 1.0})
    unlike = Route(None, "unlike", 1.0, {"sort": 1.0})
    assert _choose_by_expectation({"sort": [route] * 4}, results, 0.5, [SORT]) == {
        # By the odd ones, on which the expert is wrong, and by the even ones, on which it is right.
        "sort": ["general", "sort", "general", "sort"]
    }
    assert _choose_by_expectation({"sort": [unlike] * 4}, results, 0.5, [SORT]) == {"sort": ["general"] * 4}
    del results[0.5, "general"]["sort"]
    assert _choose_by_expectation({"sort": [route] * 4}, results, 0.5, [SORT]) == {"sort": ["sort"] * 4}


def test_random_routing_is_the_seeds_and_uses_every_task():
    names = ("sort", "logic", "facts")
    exam = EvalTask(BUILT_IN["sort"], "seap_ray", "", (SimpleNamespace(),) * 300)
    first, again, other = (_choose_at_random(names, [exam], seed)["sort"] for seed in (0, 0, 1))
    assert first == again != other and set(first) == set(names)
    assert all(60 < first.count(name) < 140 for name in names)


# --- results ---------------------------------------------------------------------------------------------------------


def own_tasks(models):
    return [row.to_json() for row in own_task_rows([ModelRow.from_json(model) for model in models])]


def test_a_method_of_which_one_model_could_not_be_planned_has_no_sizes():
    sizes = {"parameters": 10, "bytes": 20, "kv_bytes_per_token": 4, "realised_ratio": 0.5}
    common = {"method": "m", "kind": "baseline", "ratio": 0.5}
    cell = {"metric": "acc", "value": 1.0, "stderr": 0.0, "n": 1}
    whole = {**common, **sizes, "task": "sort", "name": "m.sort", "quality": {"sort": cell}}
    lost = {**common, **dict.fromkeys(sizes), "task": "logic", "name": "m.logic", "quality": {"logic": {"error": "no"}}}
    (summary,) = own_tasks([whole, lost])

    assert [summary[key] for key in sizes] == [None] * 4 and summary["quality"]["logic"] == {"error": "no"}
    (summary,) = own_tasks([whole, {**whole, "task": "logic", "parameters": 13}])
    assert summary["parameters"] == 12 and "speed" not in summary
