"""Widths: what a layer's attention and MLP may be cut to, and what each width saves.

A width must suit the pruning unit, the tile of channels, the ranks of tensor parallelism and the engine that serves it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from seap_ray.config import AttentionUnit, PruningSection
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.moments import Site
from seap_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WidthConstraints:
    """The widths that one layer may take, and what they save. Sizes are in numbers of weights."""

    architecture: Architecture
    layer: int
    size: int
    """Weights of the layer before the cut."""
    options: tuple[tuple[int, int], ...]
    """Allowed (groups, heads per group), most parameters first."""
    tile: int
    """Kept channels are a multiple of this, or all."""
    adds_biases: bool
    """Whether a cut layer gets output biases, which count against what it saves."""

    @classmethod
    def of(
        cls, architecture: Architecture, pruning: PruningSection, *, adds_biases: bool, stock: bool = False
    ) -> tuple["WidthConstraints", ...]:
        """Find the widths that every layer may take.

        Args:
            architecture: The model before the cut.
            pruning: Unit of attention, alignment and ranks of tensor parallelism.
            adds_biases: Whether cut layers get output biases.
            stock: Allow only head counts that a family's own config accepts: the hidden size's divisors.

        Returns:
            The constraints of every layer, in order.

        Raises:
            ConfigError: A layer's heads or channels cannot be split over ``tensor_parallel`` ranks, groups would differ
                beside sliding windows or states that some layers have, or no head of the family can go.
        """
        unit = widest_unit(architecture) if pruning.attention_unit == "auto" else pruning.attention_unit
        if unit != "none" and architecture.why_whole_attention:
            raise ConfigError(
                f"pruning.attention_unit: no {unit} of a {architecture.family_name} model can go, since "
                f"{architecture.why_whole_attention}; choose none"
            )
        options_L = [_attention_options(layer.shape, architecture.dense, unit) for layer in architecture.layers]
        _check_equal_groups(architecture, unit, options_L)

        # Every rank gets whole tiles.
        tile = architecture.align(pruning.align) * pruning.tensor_parallel

        constraints_L: list[WidthConstraints] = []
        for layer, options in enumerate(options_L):
            size = architecture.layer_parameters(architecture.layers[layer])
            allowed = _allowed(architecture, layer, options, pruning, tile, stock)
            constraints_L.append(cls(architecture, layer, size, allowed, tile, adds_biases))
        return tuple(constraints_L)

    @property
    def original(self) -> Shape:
        """Widths of the layer before the cut."""
        return self.architecture.layers[self.layer].shape

    @property
    def channel_cost(self) -> int:
        """Weights of one channel, of each MoE expert where the layer has such."""
        return self.architecture.channel_cost(self.architecture.layers[self.layer])

    @property
    def tile_cost(self) -> int:
        """Weights of one tile of channels."""
        return self.tile * self.channel_cost

    def attention_cost(self, option: tuple[int, int]) -> int:
        """Return the weights of the attention with so many (groups, heads per group)."""
        return self.architecture.attention_parameters(Shape(*option, 0))

    def removed(self, shape: Shape) -> int:
        """Return how many weights these widths save, added biases counted against them."""
        layer = self.architecture.resized(self.layer, shape, adds_biases=self.adds_biases)
        return self.size - self.architecture.layer_parameters(layer)

    def removed_by_shape(self) -> Iterator[tuple[Shape, int]]:
        """Yield all allowed widths, thousands in a large layer, and what ``removed`` says of each."""
        channel_cost = self.channel_cost
        original = self.original
        channel_options = self.channel_options
        fewest = channel_options[-1]

        for option in self.options:
            # With one attention, widths that are not the whole layer differ by the weights of their channels alone.
            most_removed = self.removed(Shape(*option, fewest))
            for channels in channel_options:
                shape = Shape(*option, channels)
                yield shape, 0 if shape == original else most_removed - (channels - fewest) * channel_cost

    @property
    def cap(self) -> float:
        """Largest share that the layer can give: the smallest option of attention and one tile of channels stay."""
        smallest = Shape(*self.options[-1], min(self.tile, self.original.channels))
        # Added biases may weigh more than the smallest widths save.
        return max(self.removed(smallest), 0) / self.size

    @property
    def channel_options(self) -> list[int]:
        """Allowed channel counts, the full one first; the next one is a multiple of the tile."""
        full = self.original.channels
        return [full, *range((full - 1) // self.tile * self.tile, 0, -self.tile)]

    def narrower(self, site: Site) -> list[Shape]:
        """Return the widths of the layer with one site alone cut, the widest first."""
        original = self.original
        if site == "attn":
            every = [Shape(*option, original.channels) for option in self.options]
        else:
            every = [replace(original, channels=channels) for channels in self.channel_options]
        return [shape for shape in every if shape != original]

    def ladder(self, site: Site, shares: Sequence[float]) -> tuple[Shape, ...]:
        """Return the widths at which a site is measured: for each of some shares the narrower one nearest to giving it.

        Args:
            site: ``attn`` or ``mlp``.
            shares: Shares of the site's own weights, from 0 to 1.

        Returns:
            Widths of the layer with this site alone cut, the widest first, none twice; none of a site that has no
            narrower one.
        """
        architecture = self.architecture
        original = self.original
        narrower = self.narrower(site)

        def kept(shape: Shape) -> float:
            """Return the share of the site that stays."""
            if site == "mlp":
                return shape.channels / original.channels
            return architecture.attention_parameters(shape) / architecture.attention_parameters(original)

        # min takes the first: of two equally near ones the wider.
        chosen = {min(narrower, key=lambda shape: abs(1 - share - kept(shape))) for share in shares if narrower}
        return tuple(shape for shape in narrower if shape in chosen)

    def channels(self, wanted: float) -> int:
        """Return the allowed channel count nearest to ``wanted``."""
        full = self.original.channels
        if not full:
            return 0
        # One tile stays; the full width is allowed whether or not it is a multiple.
        tiled = min(max(round(wanted / self.tile), 1) * self.tile, full)
        return full if abs(full - wanted) < abs(tiled - wanted) else tiled

    def nearest(self, share: float, carry: float = 0.0) -> Shape:
        """Return the allowed widths nearest to giving a share of the layer's weights, and ``carry`` weights more.

        Attention takes the option nearest to the share, channels give the rest: heads are coarse, tiles of channels
        fine.
        """
        architecture = self.architecture
        original = self.original
        attention = self.attention_cost((original.groups, original.heads_per_group))
        # Options begin with the widest, and min takes the first: of two equally near ones the
        # wider.
        option = min(self.options, key=lambda option: abs(self.attention_cost(option) - (1 - share) * attention))

        # Biases that compensation will add must be saved elsewhere; channels give what attention does not.
        layer = architecture.layers[self.layer]
        n_added = len(architecture.bias_keys_of(layer)) - len(layer.biases)
        added = architecture.hidden_size * n_added * self.adds_biases
        cut = share * self.size + carry + added - (attention - self.attention_cost(option))
        return Shape(*option, self.channels(original.channels - cut / self.channel_cost))


def widest_unit(architecture: Architecture) -> AttentionUnit:
    """Return the unit by which most can be removed from a model's attention: the first that engines serve.

    Args:
        architecture: The model before the cut.

    Returns:
        ``group``. ``head`` where there is one group alone, or layers' groups must be equally many because some have
        sliding windows or states; ``none`` where a group has one head as well, or no head can go.
    """
    if architecture.why_whole_attention:
        return "none"
    if architecture.dense.groups > 1 and not architecture.needs_equal_groups:
        return "group"
    return "head" if architecture.dense.heads_per_group > 1 else "none"


def _attention_options(original: Shape, dense: Shape, unit: str) -> Sequence[tuple[int, int]]:
    """List what a layer's attention may become, (groups, heads per group), the widest first.

    Under ``head`` a layer's groups stay where the dense model has several heads in one, also in a layer that an earlier
    cut left with one.
    """
    groups = original.groups
    heads = original.heads_per_group

    # A layer without attention stays without.
    if unit == "none" or not groups:
        return [(groups, heads)]
    if unit == "head" and dense.heads_per_group > 1:
        return [(groups, n) for n in range(heads, 0, -1)]
    return [(n, heads) for n in range(groups, 0, -1)]


def _check_equal_groups(architecture: Architecture, unit: str, options_L: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Raise ConfigError where layers could get unequal numbers of groups in a model that mixes kinds of attention."""
    # A layer without attention has no groups.
    group_counts = {groups for groups, _ in chain.from_iterable(options_L)} - {0}
    if not architecture.needs_equal_groups or len(group_counts) <= 1:
        return

    alternatives = "head or none" if architecture.dense.heads_per_group > 1 else "none"
    raise ConfigError(
        f"pruning.attention_unit: {unit} leaves layers with unequal numbers of key-value "
        f"heads, which no engine serves beside the {'states' if architecture.family.mixer else 'windows'} "
        f"that some layers of this {architecture.family_name} have; choose {alternatives}"
    )


def _allowed(
    architecture: Architecture,
    layer: int,
    options: Sequence[tuple[int, int]],
    pruning: PruningSection,
    tile: int,
    stock: bool,
) -> tuple[tuple[int, int], ...]:
    """Return those options that the ranks can share, and where it is to be one, a stock checkpoint can have."""
    original = architecture.layers[layer].shape
    ranks = pruning.tensor_parallel
    allowed = tuple(
        (groups, heads)
        for groups, heads in options
        if _splits(groups, heads, ranks) and not (stock and groups and architecture.hidden_size % (groups * heads))
    )

    # A layer may also stay as it is, so what it has must split, too.
    whole = _splits(original.groups, original.heads_per_group, ranks) and not original.channels % ranks
    if not allowed or not whole or tile > architecture.dense.channels:
        raise ConfigError(
            f"pruning.tensor_parallel: {ranks} ranks with tiles of {tile} channels do not fit the {original.heads} "
            f"heads, {original.groups} key-value heads and {original.channels} channels of layer {layer}"
        )
    return allowed


def _splits(groups: int, heads_per_group: int, ranks: int) -> bool:
    """Return whether vLLM can share these heads out: key-value heads are split, or where they are fewer, repeated."""
    return (groups % ranks == 0 or ranks % groups == 0) and groups * heads_per_group % ranks == 0
