"""Error correction: a cut model in; what each cut ``down_proj`` can undo of the error that its layer hands on, out.

Least squares repairs each module as if its input were the dense model's. In a cut model it is not: errors of all layers
before come with it, and add up. So the dense and the cut model are run side by side, layer by layer. After a cut layer
the error of its output, dense less cut, is regressed on the input of its ``down_proj``, and a share of what that says
goes into weight and bias before the next layer is run. Corrections of the whole error fit the calibration tokens too
well: the share is a setting, or for each layer the one that leaves least error on held-out tokens. GPTAQ (arXiv
2504.02692) corrects quantised models in this way, a module at a time.

Letters: T positions, D hidden size, which is the number of outputs O of ``down_proj``; S its kept columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from seap_ray.core.architecture import Architecture
from seap_ray.core.correction import choose_correction
from seap_ray.core.moments import Covariance, pooled_covariance
from seap_ray.core.plan import Plan
from seap_ray.core.reconstruction import error_map
from seap_ray.core.slicing import kept_indices
from seap_ray.models.cut_layer import cut_parameters, replaced_parameters
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hidden_states import HiddenBatch

PASSES = 3
"""Forward passes of a model's tokens: the dense model's, and two of the cut one, without and with its corrections."""


def is_correctable(plan: Plan, architecture: Architecture) -> bool:
    """Return whether a plan's errors can be corrected, in the weights that least squares makes anyway.

    ``down_proj`` must be one for all tokens, in every layer, and its output must go to the residual stream as it is.
    """
    is_other = architecture.n_experts or architecture.family.behind_mlp or architecture.family.has_single_parts
    return "weight" in plan.compensation.replaces and not is_other


@dataclass
class Stream:
    """The sequences of one task on their way through the dense and the cut model."""

    batches: Sequence[HiddenBatch]
    weight: float
    """What its tokens count together."""
    n_held_out: int = 0
    """Number of batches, the last ones, on which a share is chosen."""
    dense: list[Tensor] = field(init=False)
    """Hidden states of every batch in the dense model, (B, T, D)."""
    cut: list[Tensor] = field(init=False)
    """Those in the cut model; the same list up to the first cut layer."""

    def __post_init__(self) -> None:
        """Begin with what the embedding returned."""
        self.dense = [batch.hidden_BTD for batch in self.batches]
        self.cut = self.dense


@torch.inference_mode()
def correct_errors(
    blocks: Iterator[nn.Module],
    streams: Sequence[Stream],
    export: CheckpointExport,
    *,
    share: float | None,
    ridge: float,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Run the dense and the cut model side by side, and yield what corrects each cut layer before the next one is run.

    Args:
        blocks: Decoder layers of the dense model, each of which is done with before the next one is taken.
        streams: Sequences of every task as they come to the first layer.
        export: The cut model, as it would be written without corrections.
        share: Share of the error that is corrected, from 0 to 1; None: for each layer what the held-out batches say.
        ridge: Ridge of the regressions, relative to each column's variance; chosen with the share where that is None.

    Yields:
        A layer's number in the base, and what is added to the ``weight``, (O, S), of its ``down_proj``, and to its
        ``bias``, (O,), where compensation makes one: float32, on the CPU.
    """
    device = streams[0].batches[0].batch.ids_BT.device
    for layer, block in enumerate(blocks):
        is_cut = export.compensates(layer)
        was_cut = any(stream.cut is not stream.dense for stream in streams)
        for stream in streams:
            stream.dense = _run(block, layer, stream.batches, stream.dense, device)

        if not (is_cut or was_cut):
            for stream in streams:
                stream.cut = stream.dense
            continue

        parameters: dict[str, Tensor] = {}
        if is_cut:
            with replaced_parameters(block, cut_parameters(block, export, layer)):
                correction = _fit(block, layer, streams, export, share, ridge, device)
            yield layer, correction
            # As the checkpoint will have them, in its type.
            parameters = cut_parameters(block, replace(export, corrections={layer: correction}), layer)
        with replaced_parameters(block, parameters):
            for stream in streams:
                stream.cut = _run(block, layer, stream.batches, stream.cut, device)


def _run(
    block: nn.Module, layer: int, batches: Sequence[HiddenBatch], hidden: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """Return what a layer makes of the hidden states of every batch."""
    return [batch.run(block, layer, hidden_BTD, device) for batch, hidden_BTD in zip(batches, hidden, strict=True)]


def _fit(
    block: nn.Module,
    layer: int,
    streams: Sequence[Stream],
    export: CheckpointExport,
    share: float | None,
    ridge: float,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the correction of a layer, whose parameters are those of the cut model, from what it hands on in both."""
    joint = _joint_moments(block, layer, streams, export, device)
    architecture = export.base.architecture
    n_inputs = export.plan.shapes[layer].channels
    has_intercept = "bias" in export.plan.compensation.replaces
    if share is None:
        # Without held-out tokens nothing says how much of a correction would be noise.
        share = 0.0
        if joint.fitted and joint.held_out:
            ridge, share = choose_correction(joint.fitted, joint.held_out, n_inputs, has_intercept=has_intercept)

    if joint.all_tokens and share:
        weight_OS, bias_O = error_map(joint.all_tokens, n_inputs, ridge=ridge, has_intercept=has_intercept)
    else:
        weight_OS = torch.zeros(architecture.hidden_size, n_inputs)
        bias_O = torch.zeros(architecture.hidden_size)

    correction = {"weight": weight_OS, "bias": bias_O} if has_intercept else {"weight": weight_OS}
    return {kind: (share * tensor).float().cpu().contiguous() for kind, tensor in correction.items()}


@dataclass(frozen=True, slots=True)
class _JointMoments:
    """Moments of a layer's kept inputs of ``down_proj`` and, behind them, of its error; None where no token counts."""

    fitted: Covariance | None
    """Those of the tokens that a share is not chosen on."""
    held_out: Covariance | None
    all_tokens: Covariance | None


def _joint_moments(
    block: nn.Module, layer: int, streams: Sequence[Stream], export: CheckpointExport, device: torch.device
) -> _JointMoments:
    """Run the cut model's layer over all batches, and return the moments of all tasks by their weights."""
    architecture = export.base.architecture
    down_proj: Any = block.get_submodule(architecture.family.down_proj)
    # Layers of a model over several devices have their own.
    own_device = down_proj.weight.device
    kept_S = kept_indices(export.plan.kept[layer], "channels", architecture.head_dim).to(own_device)

    by_stream: list[list[Covariance | None]] = []
    for stream in streams:
        n_fitted = len(stream.batches) - stream.n_held_out
        sums: list[Covariance | None] = [None, None]
        for number, (batch, dense_BTD, cut_BTD) in enumerate(
            zip(stream.batches, stream.dense, stream.cut, strict=True)
        ):
            with _captured_input(down_proj) as captured:
                after_BTD = batch.run(block, layer, cut_BTD, device)
            error_BTO = (dense_BTD - after_BTD).to(own_device)
            # Attention of some families hands the MLP its tokens without a dimension of batches.
            input_NS = captured[0].index_select(-1, kept_S).reshape(-1, len(kept_S))
            joint_ND = torch.cat([input_NS, error_BTO.flatten(0, 1)], 1)
            part = int(number >= n_fitted)
            sums[part] = _sum(sums[part], Covariance.of(joint_ND, batch.batch.rows_N))
        by_stream.append(sums)

    weights = [stream.weight for stream in streams]
    return _JointMoments(
        _pooled([fitted for fitted, _ in by_stream], weights),
        _pooled([held_out for _, held_out in by_stream], weights),
        _pooled([_sum(*sums) for sums in by_stream], weights),
    )


def _sum(first: Covariance | None, second: Covariance | None) -> Covariance | None:
    """Return the moments of the tokens of both; None where there are none."""
    if first is None or second is None:
        return first or second
    return first + second


def _pooled(parts: Sequence[Covariance | None], weights: Sequence[float]) -> Covariance | None:
    """Return the moments of several tasks by their weights; a task's sequences may have no token that counts."""
    pairs = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part is not None and part.count]
    if not pairs:
        return None
    return pooled_covariance([part for part, _ in pairs], [weight for _, weight in pairs])


@contextmanager
def _captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is given inside the block."""
    captured: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()
