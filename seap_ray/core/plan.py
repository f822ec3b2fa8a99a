"""Plan: which key-value groups, query heads, channels and MoE experts of every layer stay, or which layers.

First the widths of every layer are chosen (``seap_ray.core.allocation``), then ``keep`` picks the best units for them.

Letters: K key-value groups, G query heads of a group, H query heads, E MoE experts, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.compensation import Compensation
from seap_ray.core.families import Unit
from seap_ray.core.moments import Site
from seap_ray.core.targets import Target


@dataclass(frozen=True, slots=True)
class Kept:
    """Indices, ascending, of what stays in one layer. Kept heads lie in kept groups, equally many in each."""

    groups: tuple[int, ...]
    """Key-value groups."""
    heads: tuple[int, ...]
    """Query heads, numbered through all groups of the layer."""
    channels: tuple[tuple[int, ...], ...]
    """Channels of each MoE expert that stays, equally many; a dense MLP counts as one MoE expert."""
    experts: tuple[int, ...] = ()
    """MoE experts that stay, where others go as a whole; empty: all."""

    @classmethod
    def whole(cls, architecture: Architecture, layer: int) -> "Kept":
        """Keep everything that a layer has.

        Args:
            architecture: The model.
            layer: Number of the layer.

        Returns:
            All groups, heads and channels.
        """
        original = architecture.layers[layer].shape
        channels = tuple(range(original.channels))
        n_mlps = max(architecture.layers[layer].n_experts, 1)
        return cls(tuple(range(original.groups)), tuple(range(original.heads)), (channels,) * n_mlps)

    @property
    def n_channels(self) -> int:
        """Number of channels that stay, in each MoE expert; 0 where nothing of the layer stays."""
        return len(self.channels[0]) if self.channels else 0

    @property
    def shape(self) -> Shape:
        """Widths of the cut layer."""
        # A layer without attention has no group.
        return Shape(len(self.groups), len(self.heads) // max(len(self.groups), 1), self.n_channels)

    def units(self, unit: Unit) -> tuple[int, ...]:
        """Return the indices of the kept units of one kind, channels of the one MoE expert that this is of."""
        if unit == "channels":
            # Unpacked, so that the channels of several MoE experts are an error here.
            (channels,) = self.channels
            return channels
        return self.groups if unit == "groups" else self.heads

    def of_moe_expert(self, expert: int | None) -> "Kept":
        """Return the same with the channels of one MoE expert alone; None, of a module that is in none: all.

        Raises ValueError for an MoE expert that goes.
        """
        if expert is None:
            return self
        place = self.experts.index(expert) if self.experts else expert
        return replace(self, channels=(self.channels[place],))

    def with_experts(self, experts: tuple[int, ...]) -> "Kept":
        """Return the same of a whole layer with some of its MoE experts alone."""
        return replace(self, experts=experts, channels=tuple(self.channels[expert] for expert in experts))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is cut of a model to make one checkpoint."""

    name: str
    requested: float
    """Ratio that was asked for."""
    compensation: Compensation
    kept: tuple[Kept, ...]
    """What stays of every layer that is not dropped, in the base's order."""
    provenance: dict[str, Any]
    """Score, allocation, tasks and statistics that the plan was made from."""
    dropped: tuple[int, ...] = ()
    """Layers of the base that go as a whole, ascending."""
    judged: tuple[dict[str, Any], ...] = ()
    """Settings and figures of all plans that were judged before this one was taken."""
    predicted: tuple[Mapping[Site, float], ...] = ()
    """By how much the cut of each site of every layer of the base raises the loss, in nats a token, as far as single
    sites can tell; empty where that was not measured."""
    target: Target | None = None
    """What the checkpoint may take; None where a ratio was asked for."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The base's layer that each entry of ``kept`` is cut from."""
        return tuple(layer for layer in range(len(self.kept) + len(self.dropped)) if layer not in self.dropped)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Widths of every layer of the checkpoint."""
        return tuple(kept.shape for kept in self.kept)

    def cuts(self, layer: int, architecture: Architecture) -> bool:
        """Return whether a layer of the checkpoint has less than the base's layer that it comes from."""
        kept = self.kept[layer]
        return bool(kept.experts) or kept.shape != architecture.layers[self.layers[layer]].shape

    def layer_after(self, layer: int, architecture: Architecture) -> Layer:
        """Return what a layer of the checkpoint is, with the biases that compensation gives it."""
        kept = self.kept[layer]
        return architecture.resized(
            self.layers[layer],
            kept.shape,
            adds_biases=self.compensation.adds_biases,
            n_experts=len(kept.experts) or None,
        )

    def layers_after(self, architecture: Architecture) -> list[tuple[int, Layer]]:
        """Return what every layer of the checkpoint is, with the number of the base's layer that it comes from."""
        return [(self.layers[layer], self.layer_after(layer, architecture)) for layer in range(len(self.kept))]

    def planned(self, architecture: Architecture) -> float:
        """Return the share of the base's decoder weights that goes, added biases counted against it.

        Args:
            architecture: The base.

        Returns:
            A share from 0 to 1, of ``architecture.decoder_parameters``.
        """
        after = sum(architecture.layer_parameters(layer) for _, layer in self.layers_after(architecture))
        return 1 - after / architecture.decoder_parameters


def keep(shape: Shape, original: Shape, head_H: Tensor, channel_C: Tensor) -> Kept:
    """Choose the units with the highest scores for given widths.

    A group's score is the sum over its best heads. Of equal scores the higher index stays, so that the choice is a pure
    function of the scores.

    Args:
        shape: Widths that the layer is cut to.
        original: Widths that it has.
        head_H: Score of every query head, (H,).
        channel_C: Score of every channel, (C,), of a mixture of experts (E, C).

    Returns:
        Indices of the units that stay, ascending.
    """
    groups, heads = best_heads(head_H, original, (shape.groups, shape.heads_per_group))
    channels = tuple(_top(score_C, shape.channels) for score_C in by_moe_expert(channel_C))
    return Kept(groups, heads, channels)


def by_moe_expert(channel_C: Tensor) -> Tensor:
    """Return scores of channels with a row for each MoE expert, (E, C); a dense MLP is one row."""
    return channel_C if channel_C.ndim > 1 else channel_C[None]


def best_heads(head_H: Tensor, original: Shape, option: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose the best groups, each with its best heads.

    Args:
        head_H: Score of every query head, (H,).
        original: Widths of the layer.
        option: How many groups stay, and how many heads in each.

    Returns:
        Indices of the groups and of the heads, ascending.
    """
    n_groups, n_heads = option
    if not n_groups:
        return (), ()
    score_KG = head_H.reshape(original.groups, original.heads_per_group)
    # Every group's best heads first, then the groups whose best heads are worth most.
    best_KG = [_top(score_G, n_heads) for score_G in score_KG]
    group_K = torch.stack([score_KG[k, list(best_G)].sum() for k, best_G in enumerate(best_KG)])
    groups = _top(group_K, n_groups)

    # Heads are numbered through all groups of the layer.
    heads: list[int] = []
    for k in groups:
        heads += [k * original.heads_per_group + head for head in best_KG[k]]
    return groups, tuple(heads)


def keep_experts(kept: Kept, n: int, score_E: Tensor, n_groups: int = 1) -> Kept:
    """Choose the MoE experts with the highest scores of a layer that is whole otherwise.

    Of equal scores the higher number stays.

    Args:
        kept: The whole layer.
        n: How many MoE experts stay.
        score_E: Score of every MoE expert, (E,).
        n_groups: Groups, one after another, of which equally many stay each.

    Returns:
        The layer with the MoE experts that stay.
    """
    size = len(score_E) // n_groups
    experts: list[int] = []
    for group, group_score in enumerate(score_E.split(size)):
        experts += [group * size + expert for expert in _top(group_score, n // n_groups)]
    return kept.with_experts(tuple(experts)) if n < len(score_E) else kept


def _top(score: Tensor, n: int) -> tuple[int, ...]:
    """Return the indices of the ``n`` highest scores, ascending."""
    # The last n of an ascending order are the highest; a stable sort puts the higher index of two equal ones last.
    # Counted from the front, since [-n:] would be everything for n = 0.
    order = torch.sort(score, stable=True).indices[score.numel() - n :]
    return tuple(order.sort().values.tolist())
