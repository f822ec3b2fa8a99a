"""Targets: what a model may take of something that users have, instead of the share of its weights that goes.

The dimensions of a model and the ``pruning.target`` section of its configuration come in; out comes what every width of
every layer takes, in whole numbers of the target's unit. What a model takes is a fixed part and a sum over its layers.

Letters: L layers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from seap_ray.config import TargetKind, TargetSection
from seap_ray.core.architecture import Architecture, Layer, Shape, cut_unit
from seap_ray.core.moments import SITES, Site
from seap_ray.errors import ConfigError

HALVINGS = 20
"""Steps of a bisection of ratios: to one part in a million, far less than a tile of channels."""
BELOW_LARGEST = (1.0, 0.999, 0.99, 0.95, 0.9)
"""Parts of the largest ratio that a bisection may begin at: floors and caps may forbid the largest itself."""
NANOSECONDS = 10**9
"""Nanoseconds of a second."""

Cut = TypeVar("Cut")
"""What a ratio gives: widths of all layers, or layers that go."""


class LayerCosts(Protocol):
    """What layers take, by their widths."""

    def of_layer(self, index: int, layer: Layer) -> int:
        """Return what the base's layer ``index`` takes when it has become ``layer``."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a model may take at the most, and what its layers take of it."""

    architecture: Architecture
    """The model before the cut."""
    kind: TargetKind
    unit: str
    """``parameters``, ``bytes`` or ``nanoseconds``."""
    limit: int
    """Most that a model may take, in ``unit``."""
    fixed: int
    """What it takes whatever the widths of its layers."""
    costs: LayerCosts
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration's own keys of this target, which plans repeat."""

    # --- what a model takes ------------------------------------------------------------------------------------------

    def layer_cost(self, index: int, layer: Layer) -> int:
        """Return what a layer takes.

        Args:
            index: Number of the layer in the base.
            layer: What it has become.

        Returns:
            A whole number of ``unit``.
        """
        return self.costs.of_layer(index, layer)

    def cost(self, layers: Iterable[tuple[int, Layer]]) -> int:
        """Return what a model of some layers takes.

        Args:
            layers: Every layer that stays, with its number in the base.

        Returns:
            A whole number of ``unit``.
        """
        return self.fixed + sum(self.costs.of_layer(index, layer) for index, layer in layers)

    def cost_of(self, shapes: Sequence[Shape], *, adds_biases: bool) -> int:
        """Return what the model takes with these widths of all its layers."""
        resized = self.architecture.resized
        return self.cost((i, resized(i, shape, adds_biases=adds_biases)) for i, shape in enumerate(shapes))

    def is_met(self, shapes: Sequence[Shape], *, adds_biases: bool) -> bool:
        """Return whether the model with these widths takes no more than it may."""
        return self.cost_of(shapes, adds_biases=adds_biases) <= self.limit

    @property
    def dense(self) -> int:
        """What the model takes before the cut."""
        return self.cost(enumerate(self.architecture.layers))

    @property
    def excess(self) -> int:
        """What a cut has to save at the least."""
        return self.dense - self.limit

    # --- for people and files ----------------------------------------------------------------------------------------

    def shown(self, cost: int) -> str:
        """Return a cost in the unit that the configuration has it in, rounded so that it could be asked for."""
        if self.kind == "latency":
            return f"{_floor(self.tokens_per_second(cost))} tokens/s"
        units = (("B", 10**9), ("M", 10**6), ("K", 10**3)) if self.kind == "parameters" else _BYTE_UNITS
        ending, factor = next(((ending, factor) for ending, factor in units if cost >= factor), ("", 1))
        return f"{_ceiling(cost / factor)}{ending}"

    @property
    def bound(self) -> str:
        """``at most`` or ``at least``, as the configuration's number is one or the other."""
        return "at least" if self.kind == "latency" else "at most"

    def out_of_reach(self, least: int) -> ConfigError:
        """Return the error for a target below what the largest cut leaves."""
        extreme = "largest" if self.kind == "latency" else "smallest"
        return ConfigError(
            f"pruning.target.{self.kind}: {self.shown(self.limit)} is out of reach; the {extreme} within reach is "
            f"{self.shown(least)}"
        )

    def tokens_per_second(self, cost: int) -> float:
        """Return the tokens per second of a request that takes so many nanoseconds."""
        return self.settings["batch"] * self.settings["new_tokens"] * NANOSECONDS / cost

    @property
    def asked(self) -> dict[str, Any]:
        """Plain values that say what is asked for."""
        return {"kind": self.kind, "unit": self.unit, "asked": self.limit, **self.settings}

    def to_json(self, planned: int) -> dict[str, Any]:
        """Return plain values for a plan's file: what was asked for, and what the plan takes of it."""
        speed = {"planned_tokens_per_second": self.tokens_per_second(planned)} if self.kind == "latency" else {}
        return {**self.asked, "planned": planned, **speed}

    def met(self, layers: Iterable[tuple[int, Layer]], *, parameters: int, n_bytes: int) -> int | None:
        """Return what a written checkpoint takes.

        Args:
            layers: Every layer of the checkpoint, with its number in the base.
            parameters: Parameters in its files.
            n_bytes: Bytes of them.

        Returns:
            A number of ``unit``; None for what files do not tell.
        """
        if self.kind == "memory" and isinstance(self.costs, StorageCosts):
            cache = sum(self.costs.cache_bytes(index, layer) for index, layer in layers)
            return n_bytes + cache + int(self.settings["workspace"])
        return {"parameters": parameters, "weights": n_bytes}.get(self.kind)


_BYTE_UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


def _ceiling(number: float) -> str:
    """Format a number with four digits, not below it."""
    step = 10 ** max(3 - math.floor(math.log10(number)), 0) if number else 1
    return f"{math.ceil(number * step) / step:g}"


def _floor(number: float) -> str:
    """Format a number with four digits, not above it."""
    step = 10 ** max(3 - math.floor(math.log10(number)), 0) if number else 1
    return f"{math.floor(number * step) / step:g}"


# --- parameters, weights, memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StorageCosts:
    """What layers take where every weight takes equally much, and every key-value head its cache."""

    architecture: Architecture
    weight: int
    """What a weight takes: 1, or its bytes."""
    head_cache_L: tuple[int, ...] = ()
    """Bytes of a key-value head's cache in every layer; none where no cache is counted."""

    def of_layer(self, index: int, layer: Layer) -> int:
        """Return what a layer's weights and its cache take."""
        return self.weight * self.architecture.layer_parameters(layer) + self.cache_bytes(index, layer)

    def cache_bytes(self, index: int, layer: Layer) -> int:
        """Return the bytes of a layer's key-value cache."""
        if not self.head_cache_L:
            return 0
        # A latent attention caches one vector for all heads.
        return self.head_cache_L[index] * (1 if self.architecture.latent_cache else layer.shape.groups)


def head_cache(architecture: Architecture, *, tokens: int, sequences: int, item_bytes: int) -> tuple[int, ...]:
    """Return the bytes of a key-value head's cache in every layer.

    Args:
        architecture: The model.
        tokens: Tokens of each sequence; a layer with a sliding window holds no more than the window.
        sequences: Sequences that are served at a time.
        item_bytes: Bytes of a number.

    Returns:
        sequences x tokens x head size x 2 (key and value) x bytes, for every layer; of a latent attention the bytes of
        the whole layer's cache.
    """
    windows = architecture.windows or (None,) * architecture.n_layers
    held_L = [tokens if window is None else min(tokens, window) for window in windows]
    numbers = architecture.latent_cache or architecture.head_dim * 2
    return tuple(sequences * held * numbers * item_bytes for held in held_L)


# --- latency ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WidthTime:
    """Seconds that a layer of some widths takes, measured."""

    shape: Shape
    prefill: float
    """Seconds for the prompts of a batch."""
    decode: float
    """Seconds for one more token of each sequence."""
    prefill_stderr: float = 0.0
    decode_stderr: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {
            "groups": self.shape.groups,
            "heads_per_group": self.shape.heads_per_group,
            "channels": self.shape.channels,
            "prefill": self.prefill,
            "decode": self.decode,
            "prefill_stderr": self.prefill_stderr,
            "decode_stderr": self.decode_stderr,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "WidthTime":
        """Read what ``to_json`` returned."""
        times = {key: float(values[key]) for key in ("prefill", "decode", "prefill_stderr", "decode_stderr")}
        return cls(Shape(values["groups"], values["heads_per_group"], values["channels"]), **times)


@dataclass(frozen=True, slots=True)
class WidthTable:
    """Times of a model's layers by their widths, measured on one device with one batch."""

    dimensions: Mapping[str, Any]
    """What the times depend on besides the widths, as ``dimensions_of`` returns it."""
    batch: int
    """Sequences at a time."""
    prompt_tokens: int
    """Tokens of each prompt."""
    fixed_prefill: float
    """Seconds that are no layer's, of a batch's prompts."""
    fixed_decode: float
    """Seconds that are no layer's, of one more token of each sequence."""
    times: tuple[WidthTime, ...]
    """The whole layer, then layers with one site alone cut."""

    @classmethod
    def from_json(cls, content: Any, name: str) -> "WidthTable":
        """Read the file of the suite ``widths``.

        Raises ConfigError, which names the file, for anything else.
        """
        try:
            times = tuple(map(WidthTime.from_json, content["widths"]))
            fixed = content["fixed"]
            numbers = (int(content["batch"]), int(content["prompt_tokens"]))
            return cls(dict(content["model"]), *numbers, float(fixed["prefill"]), float(fixed["decode"]), times)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                f"pruning.target.latency.table: {name} is no table of times; python jobs/bench.py widths writes one"
            ) from None

    def check(self, architecture: Architecture, *, batch: int, prompt_tokens: int) -> None:
        """Raise ConfigError where the times are those of another model or batch."""
        measured = {**self.dimensions, "batch": self.batch, "prompt_tokens": self.prompt_tokens}
        wanted = {**dimensions_of(architecture), "batch": batch, "prompt_tokens": prompt_tokens}
        for name, value in wanted.items():
            if measured.get(name) != value:
                raise ConfigError(
                    f"pruning.target.latency.table: was measured with {name} {measured.get(name)}, not {value}; "
                    "measure again: python jobs/bench.py widths"
                )


def dimensions_of(architecture: Architecture) -> dict[str, Any]:
    """Return the dimensions that a layer's time depends on."""
    return {
        "family": architecture.family_name,
        "hidden_size": architecture.hidden_size,
        "head_dim": architecture.head_dim,
        "groups": architecture.dense.groups,
        "heads_per_group": architecture.dense.heads_per_group,
        "channels": architecture.dense.channels,
        "moe_experts": architecture.n_experts,
    }


@dataclass(frozen=True, slots=True)
class LatencyCosts:
    """Nanoseconds that layers take for a request: what attention and MLP save at their widths adds up."""

    whole: float
    """Nanoseconds of a whole layer."""
    curves: Mapping[tuple[Site, str], Sequence[tuple[int, float]]]
    """Nanoseconds of a layer by the width of one site: (heads or channels, nanoseconds), by rising width."""
    original: Shape
    """Widths of a whole layer."""

    @classmethod
    def of(cls, table: WidthTable, original: Shape, *, new_tokens: int) -> "LatencyCosts":
        """Return the costs by a table of measured times.

        Args:
            table: The times.
            original: Widths of a whole layer.
            new_tokens: Tokens after each prompt; the prompt's own pass gives the first of them.

        Raises:
            ConfigError: The table has no times of whole layers.
        """
        points: dict[tuple[Site, str], list[tuple[int, float]]] = {}
        whole = None
        for time in table.times:
            nanoseconds = NANOSECONDS * (time.prefill + (new_tokens - 1) * time.decode)
            if time.shape == original:
                whole = nanoseconds
                continue
            for site in SITES:
                if unit := cut_unit(site, original, time.shape):
                    points.setdefault((site, unit), []).append((_width(site, time.shape), nanoseconds))
        if whole is None:
            raise ConfigError("pruning.target.latency.table: has no times of whole layers")

        curves: dict[tuple[Site, str], Sequence[tuple[int, float]]] = {}
        for (site, unit), measured in points.items():
            curves[site, unit] = _rising([*measured, (_width(site, original), whole)])
        return cls(whole, curves, original)

    def of_layer(self, index: int, layer: Layer) -> int:
        """Return the nanoseconds of a layer, rounded up."""
        nanoseconds = self.whole
        for site in SITES:
            unit = cut_unit(site, self.original, layer.shape)
            if unit is None:
                continue
            if (site, unit) not in self.curves:
                raise ConfigError(
                    f"pruning.target.latency.table: has no times of layers with fewer {unit}; measure again: "
                    "python jobs/bench.py widths"
                )
            curve = self.curves[site, unit]
            # Where noise made a narrower layer slower, the curve is level, and lower than the whole layer's own time.
            nanoseconds += _interpolated(curve, _width(site, layer.shape)) - curve[-1][1]
        return math.ceil(nanoseconds)


def _width(site: Site, shape: Shape) -> int:
    """Return the width of a site that times are interpolated over."""
    return shape.channels if site == "mlp" else shape.heads


def _rising(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return points (x, y) by rising x, with those values nearest to theirs that never fall.

    Values that fall are pooled to their mean with those before them (isotonic regression): a wider layer is no faster.
    """
    pools: list[tuple[float, int]] = []
    ordered = sorted(points)
    for _, value in ordered:
        mean = value
        n = 1
        while pools and pools[-1][0] > mean:
            pool_mean, pool_n = pools.pop()
            mean = (mean * n + pool_mean * pool_n) / (n + pool_n)
            n += pool_n
        pools.append((mean, n))

    values: list[float] = []
    for mean, n in pools:
        values += [mean] * n
    return [(x, value) for (x, _), value in zip(ordered, values, strict=True)]


def _interpolated(curve: Sequence[tuple[int, float]], x: float) -> float:
    """Return the value at ``x``, linear between points; beyond the first and the last one as they are."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in zip(curve, curve[1:], strict=False):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return curve[-1][1]


# --- from the configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredSizes:
    """What a model's weights take where they are stored."""

    parameters: int
    """All of them, embeddings included."""
    n_bytes: int
    """Their bytes."""
    item_bytes: int
    """Bytes of a weight that a cut removes."""


def make_target(
    settings: TargetSection, architecture: Architecture, stored: StoredSizes, table: WidthTable | None = None
) -> Target | None:
    """Return the target that the configuration names.

    Args:
        settings: The section ``pruning.target``.
        architecture: The model before the cut.
        stored: What its weights take.
        table: Measured times, which ``latency`` alone needs.

    Returns:
        The target, None where none is set.

    Raises:
        ConfigError: The table is that of another model or batch.
        ValueError: A table is needed and missing.
    """
    if not settings.kinds:
        return None
    (kind,) = settings.kinds
    if kind == "latency":
        if table is None:
            raise ValueError("pruning.target.latency needs a table of times")
        return _latency_target(settings, architecture, table)

    weight = 1 if kind == "parameters" else stored.item_bytes
    outside = stored.parameters if kind == "parameters" else stored.n_bytes
    # What is not in the layers, and what weights of other types in the layers take beside the usual one.
    outside -= weight * architecture.decoder_parameters
    if kind == "parameters":
        limit = settings.parameters or 0
        return Target(architecture, kind, "parameters", limit, outside, StorageCosts(architecture, weight))
    if kind == "weights":
        return Target(architecture, kind, "bytes", settings.weights or 0, outside, StorageCosts(architecture, weight))

    if architecture.family.has_other_parts:
        held = (
            "mixers hold states beside the key-value cache, which" if architecture.family.mixer else "key-value caches"
        )
        raise ConfigError(
            f"pruning.target.memory: not for a {architecture.family_name} model, whose {held} are not counted; use "
            "pruning.target.weights"
        )
    memory = settings.memory
    cache_L = head_cache(architecture, tokens=memory.tokens, sequences=memory.sequences, item_bytes=weight)
    costs = StorageCosts(architecture, weight, cache_L)
    fixed = outside + memory.workspace
    return Target(architecture, kind, "bytes", memory.total or 0, fixed, costs, memory.model_dump())


def _latency_target(settings: TargetSection, architecture: Architecture, table: WidthTable) -> Target:
    if architecture.family.whole_attention:
        raise ConfigError(
            f"pruning.target.latency: not for a {architecture.family_name} model, whose attention is not that of the "
            "table's layers; use pruning.target.weights"
        )
    if architecture.has_unlike_layers:
        what = "attention, a mixer or an MLP" if architecture.family.mixer else "MoE experts"
        raise ConfigError(
            f"pruning.target.latency: a table has times of layers that are all alike, and some of this model have "
            f"{what} and others none; use pruning.target.weights{'' if architecture.family.mixer else ' or memory'}"
        )
    latency = settings.latency
    table.check(architecture, batch=latency.batch, prompt_tokens=latency.prompt_tokens)
    n_steps = latency.new_tokens - 1
    fixed = math.ceil(NANOSECONDS * (table.fixed_prefill + n_steps * table.fixed_decode))
    seconds = latency.batch * latency.new_tokens / (latency.tokens_per_second or math.inf)

    costs = LatencyCosts.of(table, architecture.dense, new_tokens=latency.new_tokens)
    limit = math.floor(NANOSECONDS * seconds)
    return Target(architecture, "latency", "nanoseconds", limit, fixed, costs, latency.model_dump())


# --- the smallest ratio that meets a target --------------------------------------------------------------------------


def least_cut(cut_at: Callable[[float], Cut], is_met: Callable[[Cut], bool], largest: float) -> Cut | None:
    """Return the cut of the smallest ratio that meets a target, by bisection: what is taken falls as the ratio grows.

    Args:
        cut_at: The cut of a ratio; it raises ConfigError for one that cannot be met.
        is_met: Whether a cut meets the target.
        largest: Largest ratio to try.

    Returns:
        The cut, which meets the target; None where no ratio does.
    """

    def met_at(ratio: float) -> Cut | None:
        """Return the cut of a ratio if it meets the target."""
        try:
            cut = cut_at(ratio)
        except ConfigError:
            return None
        return cut if is_met(cut) else None

    best = None
    high = largest
    for part in BELOW_LARGEST:
        high = part * largest
        best = met_at(high)
        if best is not None:
            break
    if best is None:
        return None

    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cut = met_at(middle)
        if cut is None:
            low = middle
        else:
            best = cut
            high = middle
    return best
