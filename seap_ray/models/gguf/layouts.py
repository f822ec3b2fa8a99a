"""Layouts: which of llama.cpp's architectures holds a model, and why none does. A new family is a row of ``FAMILIES``.

llama.cpp reads a width for each layer in any file, and in most architectures then builds all layers by one of them. Two
use what they read: ``deci``, a Llama whose biases are optional, and ``openelm``, a Qwen 3 whose head is the embedding.
Every other architecture is for layers of equal widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from seap_ray.core.architecture import Architecture
from seap_ray.core.plan import Plan
from seap_ray.errors import ConfigError

SEAP = "export.format=seap"
"""What always remains to a user."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What one of llama.cpp's architectures holds. What is left out is as in ``qwen2``."""

    name: str
    """``general.architecture`` of the file."""
    is_uneven: bool = False
    """Whether every layer has widths of its own."""
    has_output_biases: bool = False
    """Whether the output modules of attention and MLP may have biases."""
    has_qkv_biases: bool = True
    """Whether queries, keys and values may have biases."""
    keeps_heads: bool = False
    """Whether the heads together must be as wide as the residual stream."""
    interleaves_rope: bool = False
    """Whether the two halves of a head that are rotated together lie interleaved, row by row."""
    fuses_qkv: bool = False
    """Whether queries, keys and values are one matrix."""
    head: Literal["any", "tied", "own"] = "any"
    """Whether the output embedding may, must or must not be the input embedding."""
    window_period: int | None = None
    """Layers from one that attends to everything to the next; None: there is no sliding window."""
    rotates_whole_heads: bool = True
    """Whether the rotary embedding covers all of a head."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rotary embeddings, by transformers' names."""
    activations: tuple[str, ...] = ("silu", "swish")
    """Activations of the MLP, by transformers' names."""
    norm_offset: float = 0.0
    """What is added to the weights of norms: a Gemma's are stored around zero."""
    has_experts: bool = False
    """Whether the MLP may be a mixture of experts."""


LLAMA_ROPES = ("default", "linear", "yarn", "llama3", "longrope")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("deci", is_uneven=True, has_output_biases=True, interleaves_rope=True, ropes=LLAMA_ROPES),
        Layout("llama", has_output_biases=True, interleaves_rope=True, ropes=LLAMA_ROPES, has_experts=True),
        Layout("qwen2", keeps_heads=True),
        Layout("qwen3"),
        Layout("openelm", is_uneven=True, has_qkv_biases=False, fuses_qkv=True, head="tied"),
        Layout("qwen3moe", has_experts=True),
        Layout("gemma2", head="tied", window_period=2, ropes=("default",), activations=GELU_TANH, norm_offset=1.0),
        Layout("gemma3", window_period=6, ropes=("default", "linear"), activations=GELU_TANH, norm_offset=1.0),
        Layout(
            "gptneox",
            has_output_biases=True,
            keeps_heads=True,
            head="own",
            rotates_whole_heads=False,
            activations=("gelu", *GELU_TANH),
        ),
    )
}
"""llama.cpp's architectures that are written, by their names."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
    "phi3": ("deci",),
    "mixtral": ("llama",),
    "qwen3_moe": ("qwen3moe",),
    "opt": (),
    "gpt_neox": ("gptneox",),
}
"""Layouts that may hold a family, by the keys of ``seap_ray.core.families.FAMILIES``: the first that can is
taken, so the family's own comes first. None: llama.cpp does not have the family. Of a family that is not here no layout
is written."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a layout does not hold a model."""

    reason: str
    """What the layout does not have, such as ``no biases on self_attn.o_proj and mlp.down_proj``."""
    remedy: str = ""
    """Settings with which it would hold the model; empty where there are none."""


def choose_layout(config: Mapping[str, Any], architecture: Architecture) -> Layout:
    """Choose the layout of a model, which may be cut already.

    Args:
        config: Content of its config.json, with transformers' defaults.
        architecture: What it is made of.

    Returns:
        The family's own layout where it holds the model, else the one for layers of any widths.

    Raises:
        ConfigError: llama.cpp has no layout for it; one line with the reason and what to do.
    """
    widths_differ = len({layer.shape for layer in architecture.layers}) > 1
    return _choose(config, architecture, widths_differ=widths_differ, adds_biases=architecture.has_added_biases)


def layout_of_plan(plan: Plan, config: Mapping[str, Any], base: Architecture) -> Layout:
    """Choose the layout of what a plan leaves of a model.

    Args:
        plan: The plan.
        config: Content of the base's config.json, with transformers' defaults.
        base: The base.

    Raises:
        ConfigError: llama.cpp has no layout for it; one line with the reason and what to do.
    """
    layers = tuple(layer for _, layer in plan.layers_after(base))
    windows = tuple(base.windows[layer] for layer in plan.layers) if base.windows else ()
    return choose_layout(config, replace(base, layers=layers, windows=windows))


def check_gguf(config: Mapping[str, Any], architecture: Architecture, *, adds_biases: bool) -> None:
    """Refuse a base that llama.cpp has no layout for, however it is cut, before there is a plan.

    Args:
        config: Content of the base's config.json, with transformers' defaults.
        architecture: The base.
        adds_biases: Whether compensation adds biases to output modules.

    Raises:
        ConfigError: One line with the reason and what to do.
    """
    has_biases = architecture.has_added_biases or (adds_biases and bool(architecture.bias_keys))
    _choose(config, architecture, widths_differ=False, adds_biases=has_biases)


def needs_equal_widths(architecture: Architecture, *, adds_biases: bool) -> bool:
    """Return whether llama.cpp holds a family only where all layers have the same widths.

    Args:
        architecture: The base.
        adds_biases: Whether compensation adds biases to output modules.
    """
    has_biases = adds_biases and bool(architecture.bias_keys)
    for name in FAMILIES.get(architecture.family_name, ()):
        layout = LAYOUTS[name]
        suits_biases = layout.has_output_biases or not has_biases
        if layout.is_uneven and suits_biases and (architecture.ties_embeddings or layout.head != "tied"):
            return False
    return True


def why_no_biases(architecture: Architecture) -> str | None:
    """Return why llama.cpp cannot hold biases on a family's output modules; None where it can."""
    names = FAMILIES.get(architecture.family_name, ())
    if not names or not architecture.bias_keys or any(LAYOUTS[name].has_output_biases for name in names):
        return None
    modules = " and ".join(architecture.compensable_modules)
    return f"llama.cpp has no {architecture.family_name} with biases on {modules}"


def _choose(config: Mapping[str, Any], architecture: Architecture, *, widths_differ: bool, adds_biases: bool) -> Layout:
    family = architecture.family_name
    if family not in FAMILIES:
        raise ConfigError(f"export.format: gguf is not written for {family}; use {SEAP}")
    names = FAMILIES[family]
    if not names:
        raise ConfigError(f"export.format: gguf is not for {family}, which llama.cpp does not have; use {SEAP}")

    problems: dict[str, Problem] = {}
    for name in names:
        layout = LAYOUTS[name]
        problem = (
            _width_problem(layout, architecture, widths_differ)
            or _bias_problem(layout, architecture, adds_biases)
            or _model_problem(layout, config, architecture)
        )
        if problem is None:
            return layout
        problems[name] = problem

    # A reason that two layouts have in common is said once.
    reasons: dict[str, list[str]] = {}
    for name, problem in problems.items():
        reasons.setdefault(problem.reason, []).append(name)
    listed = "; ".join(f"{', '.join(alike)}: {reason}" for reason, alike in reasons.items())
    remedies = dict.fromkeys(problem.remedy for problem in problems.values() if problem.remedy)
    raise ConfigError(
        f"export.format: llama.cpp does not hold this {family} as gguf ({listed}); use "
        f"{', or '.join([*remedies, SEAP])}"
    )


def _width_problem(layout: Layout, architecture: Architecture, widths_differ: bool) -> Problem | None:
    if widths_differ and not layout.is_uneven:
        return Problem("equal widths in all layers alone", "pruning.allocation.kind=uniform")
    heads = architecture.layers[0].shape.heads
    if layout.keeps_heads and heads * architecture.head_dim != architecture.hidden_size:
        return Problem("all heads alone", "pruning.attention_unit=none")
    return None


def _bias_problem(layout: Layout, architecture: Architecture, adds_biases: bool) -> Problem | None:
    if layout.has_output_biases:
        return None
    if adds_biases:
        modules = " and ".join(architecture.compensable_modules)
        return Problem(f"no biases on {modules}", "" if architecture.has_added_biases else "pruning.bias=false")
    if architecture.o_bias or architecture.mlp_bias or (architecture.qkv_bias and not layout.has_qkv_biases):
        return Problem("none of the family's own biases")
    return None


def _model_problem(layout: Layout, config: Mapping[str, Any], architecture: Architecture) -> Problem | None:
    """Return what of a model, apart from widths and biases, a layout does not have."""
    ropes = rope_parameters(config)
    kinds = {str(rope.get("rope_type", "default")) for rope in ropes.values()}
    if other := sorted(kinds - set(layout.ropes)):
        return Problem(f"no rotary embedding of the kind {other[0]}")
    if layout.rotates_whole_heads and any(rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in ropes.values()):
        return Problem("heads rotated as a whole, in this model a part of each")
    # llama.cpp multiplies by what follows from the factor.
    if any(rope.get("rope_type") == "yarn" and rope.get("attention_factor") for rope in ropes.values()):
        return Problem("no attention_factor of yarn")

    if architecture.has_dense_layers:
        return Problem("MoE experts in all layers alone, in this model in some")
    if layout.head == "tied" and not architecture.ties_embeddings:
        return Problem("no head but the embedding")
    if layout.head == "own" and architecture.ties_embeddings:
        return Problem("a head of its own alone")

    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in layout.activations:
        return Problem(f"an MLP by {layout.activations[0]}, in this model by {activation}")
    return _window_problem(layout, architecture) or _scale_problem(layout, config, architecture)


def _window_problem(layout: Layout, architecture: Architecture) -> Problem | None:
    # A window as long as the longest sequence hides nothing.
    windows = [window for window in architecture.windows if window and window < architecture.max_position_embeddings]
    if layout.window_period is None:
        return Problem(f"no sliding window, in this model one of {windows[0]} tokens") if windows else None

    for layer, window in enumerate(architecture.windows):
        attends_to_all = (layer + 1) % layout.window_period == 0
        if (window is None) != attends_to_all:
            return Problem(f"windows in all layers but each {layout.window_period}th, in this model in others")
    return None


def _scale_problem(layout: Layout, config: Mapping[str, Any], architecture: Architecture) -> Problem | None:
    """Return a problem where llama.cpp would divide attention scores by another number than the model says."""
    wanted = config.get("query_pre_attn_scalar")
    if not wanted:
        return None
    divisor: float = architecture.head_dim
    # llama.cpp knows the largest Gemmas by their number of layers, and takes their scale from the width of a layer.
    if (layout.name, architecture.n_layers) in (("gemma2", 46), ("gemma3", 62)):
        divisor = architecture.hidden_size // architecture.layers[0].shape.heads
    if divisor == wanted:
        return None
    return Problem(f"attention scores divided by {divisor}, in this model by {wanted}", "pruning.attention_unit=none")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return a model's rotary embeddings by the kind of attention; those of all layers under ``full_attention``."""
    rope = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}
    return {"full_attention": rope}
