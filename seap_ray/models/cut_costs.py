"""Cut costs: what the cut of each site costs in a cut model, from one forward and one backward pass.

In place of cut(x) a site gives cut(x) + a (whole(x) - cut(x)), with an a for every token that is 0 in the cut model.
The divergence D from the dense model is least where nothing is cut, so to second order in the cuts the slopes dD/da add
up to -2 D: -1/2 dD/da is a site's part of the divergence, in the presence of all other cuts. Slopes in the dense model,
as LLM-Pruner (arXiv 2305.11627) and others take them, know nothing of each other.

Letters: B rows, T positions, D hidden size, L layers; N counts sequences, or predicted tokens of a batch.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seap_ray.core.moments import SITES, Site
from seap_ray.core.sensitivity import Rise
from seap_ray.models.cut_layer import cut_parameters
from seap_ray.models.divergence import Divergence
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hidden_states import HiddenBatch
from seap_ray.models.predictions import PredictedTokens, count_sequences

PASSES_BY_SITE = 5
"""Forward passes that take as long: the dense and the cut model's, and the cut one's again with its gradients."""


@dataclass(frozen=True, slots=True)
class CutCosts:
    """Divergence of a cut model from the dense one on some sequences, and the part of every cut site, in nats."""

    divergence: Divergence
    sums: Mapping[tuple[int, Site], Tensor]
    """Summed cost of the cut of each (layer, site) in each sequence, (N,), float64; none of a site that is whole."""

    def costs(self, sequences: slice = slice(None)) -> dict[tuple[int, Site], Rise]:
        """Return the cost a token of every cut site, on some of the sequences."""
        tokens_N = self.divergence.tokens_N[sequences]
        return {key: Rise.a_token(sums_N[sequences], tokens_N) for key, sums_N in self.sums.items()}


def measure_cut_costs(
    model: Any,
    forwards: Iterator[nn.Module],
    backwards: Iterator[nn.Module],
    batches: Sequence[HiddenBatch],
    export: CheckpointExport,
) -> CutCosts:
    """Measure how far a cut model is from the dense one, and what every cut contributes to that.

    The inputs of all layers are kept where the batches wait, and each layer is run once more for its gradients, so that
    memory holds the graph of one layer.

    Args:
        model: The dense model, whose embedding and head are used; its layers are not. Its weights need no gradients.
        forwards: Its decoder layers in turn, each of which is done with before the next one is taken.
        backwards: The same from the last to the first.
        batches: Held-out sequences as they come to the first layer.
        export: The cut model, as it would be written, without dropped layers.

    Returns:
        The divergence, and the costs by (layer, site).

    Raises:
        ValueError: Whole layers are dropped.
    """
    if export.plan.dropped:
        raise ValueError("the cost of a dropped layer is no cost of a site")
    device = batches[0].batch.ids_BT.device
    cuts = _LayerCuts(export, {})

    dense, inputs_L = _run_forwards(forwards, batches, cuts, device)
    divergence, gradients = _compare(model, batches, dense, inputs_L[-1])
    n_sequences = len(divergence.tokens_N)
    sums: dict[tuple[int, Site], Tensor] = {}
    for layer in reversed(range(len(inputs_L) - 1)):
        block = next(backwards)
        gradients, layer_sums = _run_backward(block, layer, batches, inputs_L[layer], gradients, cuts, device)
        # What was the input of this layer is needed no more.
        inputs_L[layer + 1].clear()
        for site, sum_N in _by_sequence(batches, layer_sums, n_sequences).items():
            sums[layer, site] = -sum_N / 2
    return CutCosts(divergence, dict(sorted(sums.items())))


@dataclass(frozen=True)
class _LayerCuts:
    """The parameters of cut layers, each made once."""

    export: CheckpointExport
    made: dict[int, dict[str, Tensor]]

    def of(self, block: nn.Module, layer: int) -> dict[str, Tensor]:
        """Return the parameters with which a layer computes what the cut one will; none where it stays whole."""
        if layer not in self.made:
            is_cut = self.export.plan.cuts(layer, self.export.base.architecture)
            self.made[layer] = cut_parameters(block, self.export, layer) if is_cut else {}
        return self.made[layer]

    def site(self, module: str) -> Site:
        """Return the site that an output module belongs to."""
        return "attn" if module == self.export.base.architecture.family.o_proj else "mlp"

    def sites(self, layer: int) -> set[Site]:
        """Return the sites that a layer loses something of."""
        original = self.export.base.architecture.layers[layer].shape
        shape = self.export.plan.kept[layer].shape
        sites: set[Site] = set()
        if shape.channels < original.channels:
            sites.add("mlp")
        if shape.heads < original.heads:
            sites.add("attn")
        return sites


# --- forwards --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run_forwards(
    forwards: Iterator[nn.Module], batches: Sequence[HiddenBatch], cuts: _LayerCuts, device: torch.device
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return what the last layer of the dense model gives, and what all layers of the cut one are given and give."""
    dense = [batch.hidden_BTD for batch in batches]
    inputs_L = [dense]
    for layer, block in enumerate(forwards):
        dense = [batch.run(block, layer, hidden, device) for batch, hidden in zip(batches, dense, strict=True)]
        with _between(block, cuts.of(block, layer), cuts) as slopes:
            outputs: list[Tensor] = []
            for batch, hidden in zip(batches, inputs_L[-1], strict=True):
                slopes.start(hidden.shape, device)
                outputs.append(batch.run(block, layer, hidden, device))
        inputs_L.append(outputs)
    return dense, inputs_L


# --- backwards -------------------------------------------------------------------------------------------------------


def _compare(
    model: Any, batches: Sequence[HiddenBatch], dense: Sequence[Tensor], cut: Sequence[Tensor]
) -> tuple[Divergence, list[Tensor]]:
    """Return the divergence, and its gradients by what the last layer of the cut model gives, (B, T, D)."""
    n_sequences = sum(map(count_sequences, batches))
    sums_N = torch.zeros(n_sequences, dtype=torch.float64)
    losses_N = torch.zeros_like(sums_N)
    tokens_N = torch.zeros_like(sums_N)
    gradients: list[Tensor] = []

    number = 0
    for batch, dense_BTD, cut_BTD in zip(batches, dense, cut, strict=True):
        predicted = PredictedTokens.of(batch.rows, number)
        number += count_sequences(batch)
        tokens_N += torch.bincount(predicted.sequence_N, minlength=n_sequences)
        gradient_BTD = torch.zeros_like(cut_BTD)

        for chunk in predicted.chunks(model, batch):
            with torch.no_grad():
                dense_NV = chunk.log_probabilities(model, batch, dense_BTD)
            with torch.enable_grad():
                leaf_BTD = cut_BTD.detach().requires_grad_()
                gap_NV = dense_NV - chunk.log_probabilities(model, batch, leaf_BTD)
                divergence_N = (dense_NV.exp() * gap_NV).sum(-1)
                (chunk_gradient_BTD,) = torch.autograd.grad(divergence_N.sum(), leaf_BTD)
            gradient_BTD += chunk_gradient_BTD
            loss_N = gap_NV.detach().gather(1, chunk.ids_N[:, None].to(gap_NV.device))[:, 0]
            sums_N.index_add_(0, chunk.sequence_N, divergence_N.detach().double().cpu())
            losses_N.index_add_(0, chunk.sequence_N, loss_N.double().cpu())
        gradients.append(gradient_BTD)
    return Divergence(sums_N, losses_N, tokens_N), gradients


def _run_backward(
    block: nn.Module,
    layer: int,
    batches: Sequence[HiddenBatch],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    cuts: _LayerCuts,
    device: torch.device,
) -> tuple[list[Tensor], list[dict[Site, Tensor]]]:
    """Return the gradients by a layer's inputs, and of every batch the slopes of its cut sites, (B, T)."""
    before: list[Tensor] = []
    slopes_by_batch: list[dict[Site, Tensor]] = []
    with _between(block, cuts.of(block, layer), cuts) as slopes, torch.enable_grad():
        for batch, hidden, gradient in zip(batches, inputs, gradients, strict=True):
            leaf_BTD = hidden.detach().to(device).requires_grad_()
            alphas = slopes.start(hidden.shape, device, cuts.sites(layer))
            output_BTD = batch.run(block, layer, leaf_BTD, device)
            leaf_gradients = torch.autograd.grad(output_BTD, [leaf_BTD, *alphas.values()], gradient.to(output_BTD))
            before.append(leaf_gradients[0].to(hidden.device))
            slopes_by_batch.append(
                {site: slope.squeeze(-1).cpu() for site, slope in zip(alphas, leaf_gradients[1:], strict=True)}
            )
    return before, slopes_by_batch


def _by_sequence(
    batches: Sequence[HiddenBatch], slopes_by_batch: Sequence[Mapping[Site, Tensor]], n_sequences: int
) -> dict[Site, Tensor]:
    """Sum slopes, (B, T), over the tokens of each sequence."""
    sums: dict[Site, Tensor] = {}
    number = 0
    for batch, slopes in zip(batches, slopes_by_batch, strict=True):
        for row, sequences in enumerate(batch.rows):
            start = 0
            for sequence in sequences:
                stop = start + len(sequence)
                for site, slope_BT in slopes.items():
                    sums.setdefault(site, torch.zeros(n_sequences, dtype=torch.float64))
                    sums[site][number] += slope_BT[row, start:stop].double().sum()
                start = stop
                number += 1
    return sums


# --- between cut and whole -------------------------------------------------------------------------------------------


class _Slopes:
    """The numbers a of a layer's sites, (B, T, 1), which the modules of these sites read."""

    def __init__(self) -> None:
        self.alphas: dict[Site, Tensor] = {}

    def start(self, shape: torch.Size, device: torch.device, sites: Collection[Site] = ()) -> dict[Site, Tensor]:
        """Set them to 0 for a batch, with gradients for some sites, whose numbers are returned."""
        self.alphas = {site: torch.zeros(*shape[:2], 1, device=device) for site in SITES}
        return {site: self.alphas[site].requires_grad_() for site in sorted(sites)}


class _Between(nn.Module):
    """Stands for an output module: gives what the cut one does, and a of what is missing to the whole one."""

    def __init__(self, whole: nn.Module, cut: nn.Module, slopes: _Slopes, site: Site):
        super().__init__()
        self.whole = whole
        self.cut = cut
        self.slopes = slopes
        self.site = site

    def forward(self, *inputs: Any) -> Tensor:
        """Return the cut module's output, which has a slope where one is asked for."""
        cut: Tensor = self.cut(*inputs)
        alpha = self.slopes.alphas[self.site]
        if not alpha.requires_grad:
            return cut
        with torch.no_grad():
            missing = self.whole(*inputs) - cut
        # Some families hand tokens on in one row.
        return cut + alpha.reshape(*cut.shape[:-1], 1).to(cut) * missing


@contextmanager
def _between(block: nn.Module, parameters: Mapping[str, Tensor], cuts: _LayerCuts) -> Iterator[_Slopes]:
    """Put a layer's output modules between cut and whole inside the block."""
    slopes = _Slopes()
    by_module: dict[str, dict[str, Tensor]] = {}
    for path, tensor in parameters.items():
        module, _, kind = path.rpartition(".")
        by_module.setdefault(module, {})[kind] = tensor

    originals = {path: block.get_submodule(path) for path in by_module}
    for path, original in originals.items():
        cut = _with_parameters(original, by_module[path])
        block.set_submodule(path, _Between(original, cut, slopes, cuts.site(path)))
    try:
        yield slopes
    finally:
        for path, original in originals.items():
            block.set_submodule(path, original)


def _with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that computes with other parameters; the rest it shares with the original."""
    changed = copy.copy(module)
    # A model that is spread over devices has a forward of its own in each module, bound to the original.
    changed.__dict__.pop("forward", None)
    frozen = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    changed._parameters = {**module._parameters, **frozen}
    return changed
