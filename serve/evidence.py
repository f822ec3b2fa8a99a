"""Evidence: figures of single replies in; how sure it is that their mean is on the wrong side of a floor, out.

It may be looked at after every reply and acted on at any time: a statement that is wrong is ever made with no more than
the error probability, however long the service runs.
"""

from dataclasses import dataclass, field
from typing import Literal

Side = Literal["below", "above"]
"""Where the mean may turn out to be, seen from the floor."""
STAKES = (0.125, 0.25, 0.5, 0.75)
"""Shares of the largest stake that may be put on a reply. Small ones find small gaps, large ones need few replies."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The wealth of gamblers who bet that the mean of figures from 0 to 1 is on one side of a floor.

    Where it is not, each bet loses on average whatever was seen before, so that wealth that began at 1 reaches 1 / p
    with probability p at most (Ville's inequality; bets on bounded means: Waudby-Smith & Ramdas, arXiv 2010.09686). Of
    the money at hand 1 / (n (n + 1)) is kept for a gambler who begins with reply n, so that a mean that changes after
    a long time is found, too. Over all n these shares add up to 1, as those of the stakes do.
    """

    side: Side
    floor: float
    """Mean that is bet against, above 0 and below 1."""
    n: int = 0
    """Figures so far."""
    wealths: tuple[float, ...] = field(default=(0.0,) * len(STAKES))
    """What gamblers with each of ``STAKES`` have together."""

    def after(self, value: float) -> "Evidence":
        """Return the evidence with one more figure, from 0 to 1."""
        n = self.n + 1
        fresh = 1 / (n * (n + 1))
        wealths = tuple(
            (wealth + fresh) * self._factor(stake, value) for stake, wealth in zip(STAKES, self.wealths, strict=True)
        )
        return Evidence(self.side, self.floor, n, wealths)

    @property
    def wealth(self) -> float:
        """Mean wealth over all stakes: 1 / p allows the statement with error probability p."""
        return sum(self.wealths) / len(STAKES)

    def _factor(self, stake: float, value: float) -> float:
        """Return what a bet makes of the money that is put on it; never below 0."""
        # Nobody can lose more than is there: the worst figure is 1 for who bets below the floor, and 0 above it.
        if self.side == "below":
            return 1 + stake * (self.floor - value) / (1 - self.floor)
        return 1 + stake * (value - self.floor) / self.floor
