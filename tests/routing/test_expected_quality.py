"""Who is expected to answer a prompt better: by hand."""

import pytest

from seap_ray.routing.expected_quality import KeptQuality, kept

KEPT = KeptQuality(
    {
        "sums": {"sums": 0.95, "verse": 0.1},
        "verse": {"sums": 0.0, "verse": 1.0},
        "general": {"sums": 0.9, "verse": 0.8},
    }
)


def test_what_is_kept_is_a_share_of_accuracies_and_of_perplexities_the_inverse_one():
    assert kept("exact_match", 0.4, 0.8) == 0.5
    assert kept("perplexity", 20.0, 10.0) == kept("window_perplexity", 20.0, 10.0) == 0.5
    assert kept("acc", 0.5, 0.0) == 1.0


@pytest.mark.parametrize(
    ("p_sums", "prefers"),
    [
        # 0.95 p + 0.1 (1 - p) against 0.9 p + 0.8 (1 - p): equal at p = 14 / 15.
        (1.0, True),
        (0.94, True),
        (0.93, False),
        (0.5, False),
    ],
)
def test_the_threshold_falls_out_of_what_was_measured(p_sums, prefers):
    assert KEPT.prefers_expert("sums", {"sums": p_sums, "verse": 1 - p_sums}) is prefers


def test_an_expert_that_is_no_worse_anywhere_is_always_preferred_and_so_is_an_unknown_one():
    even = KeptQuality({"sums": {"sums": 0.9, "verse": 0.8}, "general": {"sums": 0.9, "verse": 0.8}})
    assert even.prefers_expert("sums", {"sums": 0.34, "verse": 0.33, "prose": 0.33})
    assert KEPT.prefers_expert("prose", {"prose": 0.4, "sums": 0.6})


def test_tasks_that_were_not_judged_do_not_count():
    assert KEPT.expected("sums", {"sums": 0.5, "prose": 0.5}) == pytest.approx(0.475)
