"""Experts: how many of a mixture's MoE experts stay, the same number in every layer that has any, for a ratio.

A checkpoint whose layers have equally many is an ordinary one of its family.
"""

import math
from dataclasses import replace

from seap_ray.config import PruningSection
from seap_ray.core.architecture import Architecture, Layer
from seap_ray.core.targets import Target
from seap_ray.errors import ConfigError


def expert_counts(architecture: Architecture, pruning: PruningSection) -> list[int]:
    """Return how many MoE experts the layers of a mixture may keep, the most first.

    The router goes on to choose as many for a token as before. Where it first chooses among groups, equally many stay
    in each group, and two at least, since a group counts by its best two.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration, whose ``max_sparsity`` holds.
    """
    n_groups, n_chosen_groups = architecture.expert_groups
    counts: list[int] = []
    for n in range(architecture.n_experts, 0, -n_groups):
        per_group = n // n_groups
        has_choice = per_group * n_chosen_groups >= architecture.experts_per_token
        has_best_two = n_groups == 1 or per_group > 1
        if has_choice and has_best_two and _largest_cut(architecture, n) <= pruning.allocation.max_sparsity:
            counts.append(n)
    return counts or [architecture.n_experts]


def choose_count(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, target: Target | None = None
) -> int:
    """Choose how many MoE experts stay in every layer that has any.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        ratio: Share of the model's decoder weights that shall go; the number comes nearest to it, the larger of two
            that are as near.
        target: What the model may take; then the most stay that meet it, whatever the ratio.

    Raises:
        ConfigError: Too few MoE experts may go.
    """
    counts = expert_counts(architecture, pruning)
    if target is not None:
        costs = {n: target.cost(enumerate(layers_with(architecture, n))) for n in counts}
        meeting = [n for n in counts if costs[n] <= target.limit]
        if not meeting:
            raise target.out_of_reach(min(costs.values()))
        return meeting[0]

    removed = {n: removed_share(architecture, n) for n in counts}
    fewest = counts[-1]
    # Half of what the last experts are is within what rounding may miss.
    step = removed[fewest] - removed_share(architecture, fewest + architecture.expert_groups[0])
    if ratio > removed[fewest] + step / 2:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond reach of pruning.mlp_unit=expert: {fewest} of the "
            f"{architecture.n_experts} MoE experts of a layer stay at least, of which the router chooses "
            f"{architecture.experts_per_token} for a token; the largest ratio is "
            f"{math.floor(removed[fewest] * 1e4) / 1e4:g}"
        )
    # min takes the first of equal distances: more experts.
    return min(counts, key=lambda n: abs(removed[n] - ratio))


def layers_with(architecture: Architecture, n: int) -> list[Layer]:
    """Return the layers of a model of whose layers with MoE experts each has ``n``."""
    return [replace(layer, n_experts=n) if layer.n_experts else layer for layer in architecture.layers]


def removed_share(architecture: Architecture, n: int) -> float:
    """Return the share of the decoder weights that goes where ``n`` MoE experts of every layer stay."""
    after = sum(map(architecture.layer_parameters, layers_with(architecture, n)))
    return 1 - after / architecture.decoder_parameters


def _largest_cut(architecture: Architecture, n: int) -> float:
    """Return the largest share of a layer that goes where ``n`` MoE experts of every layer stay."""
    pairs = zip(architecture.layers, layers_with(architecture, n), strict=True)
    size = architecture.layer_parameters
    return max(1 - size(after) / size(before) for before, after in pairs)
