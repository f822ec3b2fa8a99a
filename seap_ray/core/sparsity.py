"""Sparsity: how much each layer gives. A target ratio in, one share per layer out; the shares average to the target.

Layers of unequal size count by their relative sizes: weights divided by their mean, each 1 where all are alike.

Letters: L layers.
"""

import math
from collections.abc import Sequence

from seap_ray.errors import ConfigError


def largest_ratio(relative_size_L: Sequence[float], cap_L: Sequence[float], active: range) -> float:
    """Return the largest ratio that the ``active`` layers can give, each its cap."""
    return math.fsum(relative_size_L[i] * cap_L[i] for i in active) / len(cap_L)


def uniform(relative_size_L: Sequence[float], target: float, cap_L: Sequence[float]) -> list[float]:
    """Return the same share for every layer, more where others have a cap below it.

    This is the SEAP paper's UL, UL-UM in its code.

    Args:
        relative_size_L: Size of every layer relative to their mean.
        target: Share of all weights that shall go.
        cap_L: Largest share that each layer may give.

    Returns:
        Share of every layer; their mean, by weight, is the target.
    """
    n_layers = len(cap_L)
    # Below every cap the shares are the target itself, without rounding.
    if target <= min(cap_L):
        return [target] * n_layers
    return _scaled([1.0] * n_layers, target * n_layers, relative_size_L, cap_L)


def logistic(
    relative_size_L: Sequence[float],
    target: float,
    cap_L: Sequence[float],
    *,
    k: float,
    x0: float,
    first: int,
    last: int,
) -> list[float]:
    """Return shares that rise along a logistic curve in depth; protected layers give 0.

    This is the SEAP paper's LB, UL-LD in its code: rho_l = Lambda * sigmoid(k (x_l - x0)), x_l from 0 to 1 over the
    active layers. Lambda is solved in closed form for the average over all layers, layers at their cap taken out in
    turn (arXiv 2503.07605, eqs. 16 and 17, without their numerical search).

    Args:
        relative_size_L: Size of every layer relative to their mean.
        target: Share of all weights that shall go.
        cap_L: Largest share that each layer may give.
        k: Steepness of the curve.
        x0: Depth of its middle.
        first: Number of first layers that stay whole.
        last: Number of last layers that stay whole.

    Returns:
        Share of every layer; their mean, by weight, is the target.

    Raises:
        ConfigError: Protection and caps do not allow the ratio; the message has the largest one.
    """
    n_layers = len(cap_L)
    active = range(first, max(n_layers - last, first))
    largest = largest_ratio(relative_size_L, cap_L, active)
    # Sums of floats are off by about this much.
    if target > largest + 1e-12:
        raise ConfigError(
            f"pruning.ratio: {target:g} is beyond what {first} + {last} protected layers and at most "
            f"{max(cap_L):.1%} of each other layer allow; the largest is {math.floor(largest * 1e4) / 1e4:g}"
        )
    if target == 0:
        return [0.0] * n_layers

    # One active layer alone has no depth: its x is 0.
    curve = [_sigmoid(k * (i / max(len(active) - 1, 1) - x0)) for i in range(len(active))]
    sizes = [relative_size_L[i] for i in active]
    caps = [cap_L[i] for i in active]
    return [0.0] * first + _scaled(curve, target * n_layers, sizes, caps) + [0.0] * last


def _scaled(curve: Sequence[float], total: float, sizes: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Scale ``curve`` so that its sum, each value times its layer's size, is ``total``, with none above its cap."""
    capped: set[int] = set()
    # Every round takes the layers above their cap out, which raises the scale of the others; at most L rounds.
    while True:
        free = [i for i in range(len(curve)) if i not in capped]
        if not free:
            return list(caps)
        taken = math.fsum(sizes[i] * caps[i] for i in capped)
        # Free layers share what the capped ones leave, along the curve.
        scale = (total - taken) / sum(sizes[i] * curve[i] for i in free)
        over = {i for i in free if scale * curve[i] > caps[i]}
        if not over:
            return [caps[i] if i in capped else scale * value for i, value in enumerate(curve)]
        capped |= over


def official_logistic(n_layers: int, target: float, *, k: float, x0: float, first: int, last: int) -> list[float]:
    """Return the shares of the authors' released schedule.

    It averages over the active layers only, so it removes less than it says: bisection of Lambda in [0, 2] to 1e-4,
    then a clip to [0, 1] (generate_masks.py of IAAR-Shanghai/SEAP).

    Args:
        n_layers: Number of layers.
        target: Share that the active layers give on average.
        k: Steepness of the curve.
        x0: Depth of its middle.
        first: Number of first layers that stay whole.
        last: Number of last layers that stay whole.

    Returns:
        Share of every layer.

    Raises:
        ConfigError: Protection leaves no layer.
    """
    active = n_layers - first - last
    if active < 1:
        raise ConfigError(f"pruning.allocation: {first} + {last} protected layers leave none of {n_layers}")
    curve = [_sigmoid(k * (i / max(active - 1, 1) - x0)) for i in range(active)]

    low, high = 0.0, 2.0
    # The authors' tolerance; where no scale of the interval meets it, the interval shrinks to a
    # point.
    while True:
        scale = (low + high) / 2
        average = sum(scale * value for value in curve) / active
        if abs(average - target) < 1e-4 or high - low < 1e-9:
            break
        if average < target:
            low = scale
        else:
            high = scale
    return [0.0] * first + [min(1.0, scale * value) for value in curve] + [0.0] * last


def _sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), which written so would overflow for a steep curve's first layers."""
    return (1 + math.tanh(x / 2)) / 2
