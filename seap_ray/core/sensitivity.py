"""Sensitivity: by how much the loss rises when one site of one layer is cut.

Measured rises come in, with their standard errors; the rises of all widths between them and beyond go out.

Letters: H query heads, E MoE experts, C channels, L layers; N counts sequences.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

from torch import Tensor

from seap_ray.core.architecture import Architecture, Shape, cut_unit
from seap_ray.core.knapsack import lower_hull
from seap_ray.core.moments import SITES, Site
from seap_ray.core.plan import best_heads, by_moe_expert
from seap_ray.core.scores import LayerScores
from seap_ray.core.widths import WidthConstraints

NOISE = 2.0
"""Standard errors that a rise counts at the least: what only seems free costs as much as its noise could hide."""


LARGEST_EVEN_SHARE = 2 / 3
"""Most that every MLP gives in the model in which costs are measured first."""


@dataclass(frozen=True, slots=True)
class Rise:
    """Mean rise of the loss over held-out tokens, and how sure it is, in nats a token."""

    mean: float
    """May be negative: noise, or a cut that helps."""
    stderr: float
    """Standard error of the mean."""

    def __post_init__(self) -> None:
        """Raise ValueError for what is no finite number, and for a negative standard error."""
        if not (math.isfinite(self.mean) and math.isfinite(self.stderr) and self.stderr >= 0):
            raise ValueError(f"{self.mean} +- {self.stderr} is no rise of a loss")

    @classmethod
    def a_token(cls, sums_N: Tensor, tokens_N: Tensor) -> "Rise":
        """Return a mean a token, and its standard error as a ratio of sums over independent sequences.

        Args:
            sums_N: Summed rise of every sequence, (N,), float64.
            tokens_N: Tokens of every sequence, (N,), float64, in all at least one.

        Returns:
            The mean with its standard error, 0 for a single sequence, which cannot tell one.
        """
        n = len(tokens_N)
        mean = sums_N.sum() / tokens_N.sum()
        residual_N = sums_N - mean * tokens_N
        stderr = (residual_N.square().sum() * n / max(n - 1, 1)).sqrt() / tokens_N.sum()
        return cls(float(mean), float(stderr))

    @classmethod
    def mean_of(cls, rises: Sequence["Rise"], weights: Sequence[float]) -> "Rise":
        """Return the weighted mean of rises that were measured on different tokens.

        Args:
            rises: Rises, at least one.
            weights: What each counts; they need not add up to 1.
        """
        total = math.fsum(weights)
        shares = [weight / total for weight in weights]
        mean = math.fsum(share * rise.mean for share, rise in zip(shares, rises, strict=True))
        return cls(mean, math.hypot(*(share * rise.stderr for share, rise in zip(shares, rises, strict=True))))

    def times(self, factor: float) -> "Rise":
        """Return the rise multiplied by a factor, at least 0."""
        return Rise(self.mean * factor, self.stderr * factor)

    @property
    def counted(self) -> float:
        """The rise as allocation counts it: never below its noise, so never below 0."""
        return max(self.mean, NOISE * self.stderr)


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rises of the loss at several widths of one site of one layer, everything else of the model whole."""

    layer: int
    site: Site
    """``attn`` or ``mlp``; all MoE experts of a layer are cut alike, and are one ``mlp``."""
    shapes: tuple[Shape, ...]
    """Widths of the layer with this site alone cut. The whole width may be left out: its rise is 0."""
    rises: tuple[Rise, ...]
    """Rise at each of these widths."""

    def __post_init__(self) -> None:
        """Raise ValueError for a site that has no widths, for widths without rises, and for a width named twice."""
        if self.site not in SITES or len(self.shapes) != len(self.rises) or len({*self.shapes}) < len(self.shapes):
            raise ValueError(f"the widths of {self.site} of layer {self.layer} are not one rise for each")

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file: the widths, means and standard errors."""
        return {
            "layer": self.layer,
            "site": self.site,
            "shapes": [[shape.groups, shape.heads_per_group, shape.channels] for shape in self.shapes],
            "mean": [rise.mean for rise in self.rises],
            "stderr": [rise.stderr for rise in self.rises],
        }


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What every layer's sites cost when they are cut, each alone."""

    ladders: tuple[Ladder, ...]
    """At most one for each layer and site, by layer, attention first."""
    _by_key: Mapping[tuple[int, Site], Ladder] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError for two ladders of one layer and site."""
        ladders = tuple(sorted(self.ladders, key=lambda ladder: (ladder.layer, SITES.index(ladder.site))))
        by_key = {(ladder.layer, ladder.site): ladder for ladder in ladders}
        if len(by_key) < len(ladders):
            raise ValueError("a layer and site has two ladders")
        object.__setattr__(self, "ladders", ladders)
        object.__setattr__(self, "_by_key", by_key)

    def __getitem__(self, key: tuple[int, Site]) -> Ladder:
        """Return the ladder of a layer and site; KeyError where it was not measured."""
        return self._by_key[key]

    def __contains__(self, key: object) -> bool:
        """Return whether a layer and site was measured."""
        return key in self._by_key

    @classmethod
    def of_costs(
        cls,
        constraints_L: Sequence[WidthConstraints],
        scores_L: Sequence[LayerScores],
        shapes_L: Sequence[Shape],
        costs: Mapping[tuple[int, Site], Rise],
    ) -> "Sensitivities":
        """Return what every width of the cut sites costs, from what their cuts cost in one cut model.

        A cut that loses twice the score costs twice as much, all else in the model as it is.

        Args:
            constraints_L: Widths that every layer may take.
            scores_L: Scores of every layer's heads (H,) and channels (C,), of a mixture of experts (E, C), by which
                units are cut.
            shapes_L: Widths of the cut model's layers.
            costs: What the cut of each (layer, site) costs there, of all sites that are cut.

        Returns:
            Ladders of the cut sites, over all their narrower widths.
        """
        ladders: list[Ladder] = []
        for (layer, site), cost in costs.items():
            constraints = constraints_L[layer]
            shapes = constraints.narrower(site)
            alone = _alone(site, constraints.original, shapes_L[layer])
            lost = _lost_scores(constraints, site, scores_L[layer], shapes)

            # A cut of units without any score tells nothing of others; weights stand for it.
            if lost[alone] <= 0:
                lost = {shape: _saved(constraints.architecture, layer, site, shape) for shape in shapes}
            rises = [cost.times(lost[shape] / lost[alone]) for shape in shapes]
            ladders.append(Ladder(layer, site, tuple(shapes), tuple(rises)))
        return cls(tuple(ladders))

    @classmethod
    def geometric_mean(cls, several: Sequence["Sensitivities"]) -> "Sensitivities":
        """Average sensitivities that were measured in several cut models, by their logarithms.

        What a site's cut costs depends on what else is cut, by factors rather than by amounts. A site counts in those
        models that cut it.

        Args:
            several: Sensitivities, whose ladders of one layer and site have the same widths: at least one.

        Returns:
            Geometric means of the rises as allocation counts them, with the standard errors of these means.

        Raises:
            ValueError: Ladders of one layer and site have different widths.
        """
        by_key: dict[tuple[int, Site], list[Ladder]] = {}
        for ladder in chain.from_iterable(sensitivities.ladders for sensitivities in several):
            by_key.setdefault((ladder.layer, ladder.site), []).append(ladder)

        ladders: list[Ladder] = []
        for same in by_key.values():
            if len({ladder.shapes for ladder in same}) > 1:
                raise ValueError(f"ladders of {same[0].site} of layer {same[0].layer} have different widths")
            rises = zip(*(ladder.rises for ladder in same), strict=True)
            ladders.append(replace(same[0], rises=tuple(map(_geometric_mean, rises))))
        return cls(tuple(ladders))

    def rises(self, architecture: Architecture, layer: int, site: Site, shapes: Sequence[Shape]) -> list[float]:
        """Return by how much the loss rises when one site of a layer alone is cut to each of some widths.

        Every measured rise counts as twice its standard error at the least, and as no less than those of wider widths.
        The largest convex curve below these points, over the weights saved, gives the rises: linear between its
        corners. Beyond the narrowest measured width a rise grows with the square of what is saved, or along the last
        line where that is steeper: nothing is known there, and losses rise ever faster.

        Args:
            architecture: The model before the cut.
            layer: Number of the layer.
            site: ``attn`` or ``mlp``.
            shapes: Widths of the layer; those of the other site do not matter.

        Returns:
            A rise for each, in nats a token; 0 for the whole width.

        Raises:
            ValueError: The site is to be cut in a way that was not measured.
        """
        original = architecture.layers[layer].shape
        curves: dict[str, list[tuple[float, float]]] = {}
        rises: list[float] = []
        for shape in shapes:
            unit = cut_unit(site, original, shape)
            if unit is None:
                rises.append(0.0)
                continue
            if unit not in curves:
                curves[unit] = self._curve(architecture, layer, site, unit)
            rises.append(_height(curves[unit], _saved(architecture, layer, site, shape)))
        return rises

    def predicted(self, architecture: Architecture, shapes_L: Sequence[Shape]) -> list[dict[Site, float]]:
        """Return by how much each site of a cut model raises the loss, as far as single sites can tell.

        Args:
            architecture: The model before the cut.
            shapes_L: Widths of every layer after it.

        Returns:
            Rises of every layer's sites, in nats a token, which allocation adds up.

        Raises:
            ValueError: A site is cut in a way that was not measured.
        """
        predicted_L: list[dict[Site, float]] = []
        for layer, shape in enumerate(shapes_L):
            predicted_L.append({site: self.rises(architecture, layer, site, [shape])[0] for site in SITES})
        return predicted_L

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain values for a file: every ladder."""
        return [ladder.to_json() for ladder in self.ladders]

    @classmethod
    def from_json(cls, content: Iterable[Mapping[str, Any]]) -> "Sensitivities":
        """Read what ``to_json`` returned."""
        ladders: list[Ladder] = []
        for values in content:
            shapes = tuple(Shape(*widths) for widths in values["shapes"])
            rises = tuple(map(Rise, values["mean"], values["stderr"]))
            ladders.append(Ladder(values["layer"], values["site"], shapes, rises))
        return cls(tuple(ladders))

    def _curve(self, architecture: Architecture, layer: int, site: Site, unit: str) -> list[tuple[float, float]]:
        """Return the corners (weights saved, rise) of the curve of one way to cut a site."""
        original = architecture.layers[layer].shape
        measured: list[tuple[int, float]] = []
        if (layer, site) in self:
            ladder = self[layer, site]
            for shape, rise in zip(ladder.shapes, ladder.rises, strict=True):
                if cut_unit(site, original, shape) == unit:
                    measured.append((_saved(architecture, layer, site, shape), rise.counted))
        if not measured:
            raise ValueError(f"the rise of the loss by {unit} of {site} of layer {layer} was not measured")

        points: list[tuple[float, float]] = [(0.0, 0.0)]
        for saved, counted in sorted(measured):
            # A narrower width costs no less than a wider one.
            points.append((saved, max(counted, points[-1][1])))
        return lower_hull(points)


def even_cuts(constraints_L: Sequence[WidthConstraints], site: Site, ratio: float) -> list[Shape] | None:
    """Return widths of a model with one site cut alike in all layers, in which costs are measured first.

    The MLP gives the whole ratio, or as much of it as leaves a third; attention gives one unit.

    Args:
        constraints_L: Widths that every layer may take.
        site: ``attn`` or ``mlp``.
        ratio: Share of each layer's weights that shall go.

    Returns:
        Widths of every layer; None where no layer has narrower ones of this site.
    """
    shapes: list[Shape] = []
    for constraints in constraints_L:
        share = 0.0
        if site == "mlp" and constraints.original.channels:
            mlp_weights = constraints.original.channels * constraints.channel_cost
            share = min(ratio * constraints.size / mlp_weights, LARGEST_EVEN_SHARE)
        # The nearest narrower width; none of a layer that has no narrower one.
        (shape,) = constraints.ladder(site, [share]) or (constraints.original,)
        shapes.append(shape)
    return shapes if any(shape != c.original for shape, c in zip(shapes, constraints_L, strict=True)) else None


def _geometric_mean(rises: Sequence[Rise]) -> Rise:
    """Return the geometric mean of rises as they count; where one counts nothing, the mean is 0."""
    counted = [rise.counted for rise in rises]
    if min(counted) <= 0:
        return Rise(0.0, 0.0)
    mean = math.exp(math.fsum(map(math.log, counted)) / len(counted))
    # The error of a logarithm is the relative error.
    relative = math.hypot(*(rise.stderr / value for rise, value in zip(rises, counted, strict=True))) / len(rises)
    return Rise(mean, mean * relative)


def _lost_scores(
    constraints: WidthConstraints, site: Site, scores: LayerScores, shapes: Sequence[Shape]
) -> dict[Shape, float]:
    """Return the score of what goes when a site is cut to each of some widths."""
    head_H, channel_C = scores
    original = constraints.original
    if site == "mlp":
        # Lost with so many channels less, in all MoE experts together; the lowest scores go first.
        ascending_EC = by_moe_expert(channel_C).double().clamp_min(0).sort(dim=-1).values
        lost_C = ascending_EC.cumsum(-1).sum(0)
        return {shape: float(lost_C[original.channels - shape.channels - 1]) for shape in shapes}

    head_H = head_H.double().clamp_min(0)
    lost: dict[Shape, float] = {}
    for shape in shapes:
        _, heads = best_heads(head_H, original, (shape.groups, shape.heads_per_group))
        gone = sorted({*range(original.heads)} - {*heads})
        lost[shape] = float(head_H[gone].sum())
    return lost


def _alone(site: Site, original: Shape, shape: Shape) -> Shape:
    """Return a layer's widths with one site alone cut as in ``shape``."""
    if site == "mlp":
        return replace(original, channels=shape.channels)
    return replace(shape, channels=original.channels)


def _saved(architecture: Architecture, layer: int, site: Site, shape: Shape) -> int:
    """Return the weights that the width of a layer's site saves, without biases that may be added."""
    original = architecture.layers[layer].shape
    if site == "mlp":
        return (original.channels - shape.channels) * architecture.channel_cost(architecture.layers[layer])
    return architecture.attention_parameters(original) - architecture.attention_parameters(shape)


def _height(corners: Sequence[tuple[float, float]], x: float) -> float:
    """Return the height of a curve at ``x``: between its corners, or beyond the last one as ``rises`` says."""
    for (left, low), (right, high) in pairwise(corners):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)

    (before, lower), (last, highest) = corners[-2:]
    line = highest + (highest - lower) * (x - last) / (last - before)
    return max(line, highest * (x / last) ** 2)
