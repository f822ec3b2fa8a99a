"""Widths: those that a layer may take, and those at which its sites are measured."""

import pytest
from transformers import LlamaConfig

from seap_ray.config import PruningSection
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.widths import WidthConstraints

LLAMA = Architecture.of(
    LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, intermediate_size=440
    ).to_dict()
)


def rules(**pruning):
    (constraints,) = WidthConstraints.of(LLAMA, PruningSection(**pruning), adds_biases=False)
    return constraints


def test_channels_are_all_or_a_multiple_of_the_tile():
    assert rules(align=100).channel_options == [440, 400, 300, 200, 100]
    assert rules(align=110).channel_options == [440, 330, 220, 110]
    assert rules(align=440).channel_options == [440]


def test_a_site_is_measured_at_the_allowed_widths_nearest_to_the_shares():
    assert rules(align=100).ladder("mlp", (0.25, 0.5)) == (Shape(4, 2, 300), Shape(4, 2, 200))
    assert rules().ladder("attn", (0.5, 0.25)) == (Shape(3, 2, 440), Shape(2, 2, 440))
    # Half of every group's heads is a third of the weights: keys and values stay.
    assert rules(attention_unit="head").ladder("attn", (0.25, 0.5)) == (Shape(4, 1, 440),)


@pytest.mark.parametrize(("site", "pruning"), [("attn", {"attention_unit": "none"}), ("mlp", {"align": 440})])
def test_a_site_without_a_narrower_width_is_not_measured(site, pruning):
    assert rules(**pruning).ladder(site, (0.25, 0.5)) == ()


def test_a_share_too_small_for_a_unit_is_measured_at_the_first_one():
    assert rules().ladder("attn", (0.01,)) == (Shape(3, 2, 440),)
    assert rules(align=100).ladder("mlp", (0.001, 0.99)) == (Shape(4, 2, 400), Shape(4, 2, 100))
