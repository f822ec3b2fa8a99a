"""Knapsack: one option for every layer, so that all together save what is asked for and the loss rises least.

This is the multiple-choice knapsack problem. It is solved exactly, by dynamic programming over the sums that choices of
the layers so far save. Most sums cannot lead to the best choice: at the price of a saved unit (a Lagrange multiplier)
they cost more than the best choice as a whole does, and are left out (as in Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem"). Savings are whole numbers of any unit: weights, bytes, nanoseconds.

Letters: L layers, S sums that choices of the layers so far reach, O options of a layer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LARGEST_STEP = 1 << 17
"""Sums times options of the next layer that are computed at once. Only options of which very many are equally good come
to it; then the sums that cost least at the price stay."""
FIRST = 256
"""Part of what the window from ``low`` to ``high`` costs at the price that is the first bound."""
WIDER = 4
"""Factor by which the bound grows."""
SLACK = 1e-9
"""What sums of floats may be off by, relative to the largest rise."""


@dataclass(frozen=True, slots=True)
class Option:
    """What a layer may be cut to: what that saves, and by how much the loss rises."""

    saved: int
    """Units saved, of weights or whatever is to be saved; negative where the option costs more than it saves."""
    rise: float
    """Rise of the loss."""


def choose(options_L: Sequence[Sequence[Option]], *, low: float, high: float) -> tuple[int, ...] | None:
    """Choose one option for every layer: the least summed rise of all choices that save from ``low`` to ``high``.

    Of choices with equal rises the one that saves nearest to the middle is taken, of these the one that saves less,
    then the one whose last layers save more: a pure function of the options.

    Args:
        options_L: Options of every layer, at least one each.
        low: Least that all layers together shall save.
        high: Most that they may save.

    Returns:
        Place of each layer's option, or None where no choice saves as much as that.
    """
    tables_L = [_Table.of(options) for options in options_L]
    price = _price(tables_L, low)
    # Whole numbers, as savings are: beside a float they would be compared in float32.
    problem = _Problem(tables_L, math.ceil(low), math.floor(high), (low + high) / 2, price)

    # A small bound leaves few sums. It grows until the best choice is within it: then there is none better.
    # One of 0, where rises are next to nothing, could not grow.
    bound = max(price * (high - low) / FIRST, problem.slack) or problem.largest_excess
    best = problem.best(bound)
    while bound < problem.largest_excess and (best is None or best.excess > bound):
        bound *= WIDER
        if best is not None:
            # No better choice has a part that costs more than the best one so far.
            bound = min(bound, best.excess)
        # Of two equally good ones the one of more sums, which is nearer to the middle.
        best = min(filter(None, (problem.best(bound), best)), key=lambda choice: choice.excess, default=None)
    if best is None:
        return None

    return tuple(table.places[option] for table, option in zip(tables_L, best.options_L, strict=True))


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the largest convex curve that lies on or below all points.

    Args:
        points: Points (x, y), in any order.

    Returns:
        Those points that are corners, by rising x: slopes between them rise.
    """
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points):
        # Of points above each other the lowest comes first.
        if corners and corners[-1][0] == x:
            continue
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def _is_above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Return whether the middle point lies on or above the line between the others."""
    run = right[0] - left[0]
    return (middle[1] - left[1]) * run >= (right[1] - left[1]) * (middle[0] - left[0])


@dataclass(frozen=True, slots=True)
class _Table:
    """Options of a layer that differ in what they save, by rising saving."""

    places: tuple[int, ...]
    """Where each was in the caller's list."""
    saved_O: Tensor
    """What each saves, int64."""
    rise_O: Tensor
    """By how much each raises the loss, float64."""

    @classmethod
    def of(cls, options: Sequence[Option]) -> "_Table":
        """Sort the options; of those that save the same, the first with the least rise stays."""
        least: dict[int, int] = {}
        for place, option in enumerate(options):
            if option.saved not in least or option.rise < options[least[option.saved]].rise:
                least[option.saved] = place

        places = tuple(least[saved] for saved in sorted(least))
        saved_O = torch.tensor([options[place].saved for place in places], dtype=torch.int64)
        rise_O = torch.tensor([options[place].rise for place in places], dtype=torch.float64)
        return cls(places, saved_O, rise_O)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Corners of the convex curve below the options."""
        return lower_hull(zip(self.saved_O.tolist(), self.rise_O.tolist(), strict=True))

    def cheapest(self, price: float) -> float:
        """Return the least of all options' rises, less what they save at a price."""
        return float((self.rise_O - price * self.saved_O).min())


def _price(tables_L: Sequence[_Table], low: float) -> float:
    """Return the rise per unit at which the layers, each at its best for that price, save just about ``low``."""
    saved = 0.0
    steps: list[tuple[float, float]] = []
    for table in tables_L:
        corners = table.corners
        saved += corners[0][0]
        for (x, y), (next_x, next_y) in pairwise(corners):
            steps.append(((next_y - y) / (next_x - x), next_x - x))

    price = 0.0
    for slope, step in sorted(steps):
        if saved >= low:
            break
        saved += step
        price = slope
    # A price below zero would forbid sums that are as good: saving more never makes up for a rise.
    return max(price, 0.0)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Options of all layers together."""

    options_L: tuple[int, ...]
    excess: float
    """Rise above what is possible at the price with ``low`` saved: a bound on what any part of the choice costs."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """What choices of some layers save and cost: the cheapest choice for each saving, by rising saving."""

    saved_S: Tensor
    rise_S: Tensor
    before_S: Tensor
    """Sum of the layers before that each comes from."""
    option_S: Tensor
    """Option of the last layer that each comes from."""

    @property
    def n(self) -> int:
        """Number of sums."""
        return len(self.saved_S)

    def at(self, index_S: Tensor) -> "_Sums":
        """Return some of the sums."""
        return _Sums(self.saved_S[index_S], self.rise_S[index_S], self.before_S[index_S], self.option_S[index_S])

    def plus(self, table: _Table, within_O: Tensor) -> "_Sums":
        """Add every sum to every one of some options of the next layer."""
        saved_SO = self.saved_S[:, None] + table.saved_O[within_O]
        rise_SO = self.rise_S[:, None] + table.rise_O[within_O]
        before_S = torch.arange(self.n).repeat_interleave(len(within_O))
        return _Sums(saved_SO.flatten(), rise_SO.flatten(), before_S, within_O.repeat(self.n))

    def cheapest(self) -> "_Sums":
        """Return the cheapest sum for each saving, by rising saving; the first of equal ones."""
        # Stable sorts by the second key, then by the first.
        order_S = self.rise_S.argsort(stable=True)
        order_S = order_S[self.saved_S[order_S].argsort(stable=True)]
        saved_S = self.saved_S[order_S]
        is_first_S = torch.ones(self.n, dtype=torch.bool)
        is_first_S[1:] = saved_S[1:] != saved_S[:-1]
        return self.at(order_S[is_first_S])


@dataclass(frozen=True, slots=True)
class _Problem:
    """The options of all layers, what is to be saved, and the price of a saved unit."""

    tables_L: Sequence[_Table]
    low: int
    high: int
    middle: float
    """What choices with equal rises shall save as nearly as can be."""
    price: float

    @property
    def slack(self) -> float:
        """What sums of these rises may be off by."""
        return SLACK * max(float(table.rise_O.abs().max()) for table in self.tables_L)

    @property
    def largest_excess(self) -> float:
        """No sum costs more above the least possible, at the price."""
        return math.fsum(float(self._above_cheapest(table).max()) for table in self.tables_L)

    def best(self, bound: float) -> _Choice | None:
        """Return the best choice of those without a part that costs more above the least possible than a bound.

        A choice whose own excess is within the bound has no such part, so the best one is then the best of all. None
        where no choice that was kept saves from ``low`` to ``high``.
        """
        limit = bound + self.slack
        rest_L = self._rest()

        zero = torch.zeros(1, dtype=torch.int64)
        sums = _Sums(zero, torch.zeros(1, dtype=torch.float64), zero, zero)
        # Least that the layers so far can cost at the price.
        floor = 0.0
        sums_L: list[_Sums] = []
        for layer, table in enumerate(self.tables_L):
            within_O = (self._above_cheapest(table) <= limit).nonzero().squeeze(1)
            sums = self._cheapest_at_price(sums, floor, max(LARGEST_STEP // len(within_O), 1))
            if sums_L:
                # What was left out is no place to come from.
                sums_L[-1] = sums

            floor += table.cheapest(self.price)
            sums = sums.plus(table, within_O)
            least_rest, most_rest = rest_L[layer]
            is_possible_S = (sums.saved_S + most_rest >= self.low) & (sums.saved_S + least_rest <= self.high)
            is_possible_S &= self._above(sums, floor) <= limit
            sums = sums.at(is_possible_S.nonzero().squeeze(1)).cheapest()
            sums_L.append(sums)

        return self._traced(sums_L, floor) if sums.n else None

    def _rest(self) -> list[tuple[int, int]]:
        """Return the least and the most that the layers behind each layer can save."""
        rest_L: list[tuple[int, int]] = []
        least = 0
        most = 0
        for table in reversed(self.tables_L):
            rest_L.append((least, most))
            least += int(table.saved_O[0])
            most += int(table.saved_O[-1])
        return rest_L[::-1]

    def _above_cheapest(self, table: _Table) -> Tensor:
        """Return by how much each option of a layer costs more at the price than its cheapest one."""
        return table.rise_O - self.price * table.saved_O - table.cheapest(self.price)

    def _above(self, sums: _Sums, floor: float) -> Tensor:
        """Return by how much sums cost more at the price than the layers so far can."""
        return sums.rise_S - self.price * sums.saved_S - floor

    def _cheapest_at_price(self, sums: _Sums, floor: float, n_sums: int) -> _Sums:
        """Return at most so many sums: those that cost least at the price, by rising saving."""
        if sums.n <= n_sums:
            return sums
        order_S = self._above(sums, floor).argsort(stable=True)
        return sums.at(order_S[:n_sums].sort().values)

    def _traced(self, sums_L: Sequence[_Sums], floor: float) -> _Choice:
        """Follow the best sum of all layers back to the option of each."""
        last = sums_L[-1]
        is_least_S = last.rise_S == last.rise_S.min()
        # Savings rise, and min takes the first: of two equally near ones the one that saves less.
        best = min(is_least_S.nonzero().flatten().tolist(), key=lambda i: abs(int(last.saved_S[i]) - self.middle))
        excess = float(last.rise_S[best]) - self.price * self.low - floor

        options_L: list[int] = []
        for sums in reversed(sums_L):
            options_L.append(int(sums.option_S[best]))
            best = int(sums.before_S[best])
        return _Choice(tuple(reversed(options_L)), excess)
