"""Divergence: how far cut models are from the dense one on held-out tokens, before any of them is written.

A cut model computes what the dense one does with zeros in the columns that go, so the dense model is run with the
output modules of a layer replaced. All models pass one decoder layer before the next one is needed, and models that
are cut alike up to a layer share their hidden states: a model with one cut layer costs the layers behind it alone.

The Kullback-Leibler divergence of a cut model's next-token distribution from the dense model's is the rise of the loss
on texts that the dense model itself writes. On the same tokens its noise is a small part of that of the loss, which
depends on the one token that follows.

Letters: B rows, T positions, V vocabulary; N counts sequences, or predicted tokens where a tensor is of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seap_ray.core.plan import Kept
from seap_ray.core.sensitivity import Rise
from seap_ray.models.cut_layer import cut_parameters, replaced_parameters
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hidden_states import HiddenBatch
from seap_ray.models.predictions import PredictedTokens, count_sequences


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of a cut model from the dense one on some sequences, in nats."""

    sums_N: Tensor
    """Summed divergence of each sequence, float64."""
    losses_N: Tensor
    """Summed rise of the loss of each sequence, float64."""
    tokens_N: Tensor
    """Predicted tokens of each sequence, float64."""

    @property
    def rise(self) -> Rise:
        """Divergence a token."""
        return Rise.a_token(self.sums_N, self.tokens_N)

    @property
    def loss(self) -> Rise:
        """Rise of the loss a token."""
        return Rise.a_token(self.losses_N, self.tokens_N)

    def __getitem__(self, sequences: slice) -> "Divergence":
        """Return the divergence on some of the sequences."""
        return Divergence(self.sums_N[sequences], self.losses_N[sequences], self.tokens_N[sequences])


@torch.inference_mode()
def measure_divergence(
    model: Any,
    blocks: Iterator[nn.Module],
    batches: Sequence[HiddenBatch],
    exports: Sequence[CheckpointExport],
) -> list[Divergence]:
    """Measure how far every cut model is from the dense one.

    Args:
        model: The dense model, whose embedding and head are used; its layers are not.
        blocks: Its decoder layers, each of which is done with before the next one is taken.
        batches: Held-out sequences as they come to the first layer.
        exports: The cut models, as they would be written.

    Returns:
        The divergence of each, in their order.
    """
    architecture = exports[0].base.architecture
    whole_L = [Kept.whole(architecture, layer) for layer in range(architecture.n_layers)]
    cuts = [_kept_by_layer(export, whole_L) for export in exports]
    device = batches[0].batch.ids_BT.device
    # The dense model is one more; it has the hidden states that all others begin with.
    groups = [_Group((None, *range(len(exports))), [batch.hidden_BTD for batch in batches])]

    for layer, block in enumerate(blocks):
        groups = _run_layer(block, layer, batches, groups, exports, cuts, whole_L[layer], device)
    return _compare(model, batches, groups, len(exports))


@dataclass(frozen=True, slots=True)
class _Group:
    """Models that are cut alike so far, with the hidden states that they share."""

    members: tuple[int | None, ...]
    """Indices of the models; None is the dense one."""
    hidden: list[Tensor]
    """Hidden states of every batch, (B, T, D)."""


LayerCuts = Mapping[int, Kept | None]
"""What a model keeps of the layers that it cuts; None of a layer that goes as a whole."""


def _kept_by_layer(export: CheckpointExport, whole_L: Sequence[Kept]) -> LayerCuts:
    plan = export.plan
    cut: dict[int, Kept | None] = dict.fromkeys(plan.dropped)
    for layer, kept in zip(plan.layers, plan.kept, strict=True):
        if kept != whole_L[layer]:
            cut[layer] = kept
    return cut


def _run_layer(
    block: nn.Module,
    layer: int,
    batches: Sequence[HiddenBatch],
    groups: Sequence[_Group],
    exports: Sequence[CheckpointExport],
    cuts: Sequence[LayerCuts],
    whole: Kept,
    device: torch.device,
) -> list[_Group]:
    """Take all groups through a layer; a group whose models are cut otherwise there splits."""
    # By what is kept, then by group: each way to cut the layer is prepared once.
    split: dict[Any, dict[int, list[int | None]]] = {}
    for g, group in enumerate(groups):
        for member in group.members:
            way = _way(layer, member, exports, cuts, whole)
            split.setdefault(way, {}).setdefault(g, []).append(member)

    after: list[_Group] = []
    for way, members_by_group in split.items():
        is_dropped = way[0] is None
        first = next(iter(members_by_group.values()))[0]
        parameters: dict[str, Tensor] = {}
        if first is not None and not is_dropped and way[0] is not whole:
            parameters = cut_parameters(block, exports[first], layer)

        with replaced_parameters(block, parameters):
            for g, members in members_by_group.items():
                hidden = groups[g].hidden
                if not is_dropped:
                    hidden = [batch.run(block, layer, h, device) for batch, h in zip(batches, hidden, strict=True)]
                after.append(_Group(tuple(members), hidden))
    return after


def _way(
    layer: int, member: int | None, exports: Sequence[CheckpointExport], cuts: Sequence[LayerCuts], whole: Kept
) -> tuple[Any, ...]:
    """Return what decides how a model is cut at a layer: what it keeps and, where that is not all, its repair."""
    if member is None or layer not in cuts[member]:
        return (whole,)
    export = exports[member]
    kept = cuts[member][layer]
    # Statistics and corrections are large: two are the same where they are one object.
    repair = (export.plan.compensation.name, id(export.statistics), id(export.corrections))
    return (kept, *repair) if kept else (None,)


# --- the comparison --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(model: Any, batches: Sequence[HiddenBatch], groups: Sequence[_Group], n_models: int) -> list[Divergence]:
    """Compare the next-token distributions of all models with the dense model's."""
    n_sequences = sum(map(count_sequences, batches))
    sums = torch.zeros(n_models, n_sequences, dtype=torch.float64)
    losses = torch.zeros_like(sums)
    tokens_N = torch.zeros(n_sequences, dtype=torch.float64)
    dense = next(group for group in groups if None in group.members)

    number = 0
    for b, batch in enumerate(batches):
        predicted = PredictedTokens.of(batch.rows, number)
        number += count_sequences(batch)
        tokens_N += torch.bincount(predicted.sequence_N, minlength=n_sequences)

        for chunk in predicted.chunks(model, batch):
            dense_NV = chunk.log_probabilities(model, batch, dense.hidden[b])
            p_NV = dense_NV.exp()
            for group in groups:
                members = [member for member in group.members if member is not None]
                if not members:
                    continue
                cut_NV = chunk.log_probabilities(model, batch, group.hidden[b])
                gap_NV = dense_NV - cut_NV
                divergence_N = (p_NV * gap_NV).sum(-1).double().cpu()
                loss_N = gap_NV.gather(1, chunk.ids_N[:, None].to(gap_NV.device))[:, 0].double().cpu()
                for member in members:
                    sums[member].index_add_(0, chunk.sequence_N, divergence_N)
                    losses[member].index_add_(0, chunk.sequence_N, loss_N)

    return [Divergence(sums[i], losses[i], tokens_N) for i in range(n_models)]
