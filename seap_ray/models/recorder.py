"""Recorder: hooks on a model's decoder layers and their ``o_proj`` and ``down_proj``; token batches in, moments out.

Letters: B sequences, T positions, N real tokens, D columns of a site.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional
from transformers import PreTrainedModel

from seap_ray.core.architecture import Family, family_of
from seap_ray.core.moments import Covariance, Moments, Site, blocks
from seap_ray.errors import DataError
from seap_ray.models.corpus import batches, packed

Recorded = dict[tuple[int, Site], Moments]
Sequences = Sequence[Sequence[int]]
"""Token ids of several texts."""


@contextmanager
def recording(decoder: Any, rows_N: Tensor | None, *, covariances: Container[int] = ()) -> Iterator[Recorded]:
    """While inside, every forward pass of ``decoder`` (the model without its head) adds to the yielded moments.

    Layers in ``covariances`` have a ``Covariance`` of each of their sites.

    Only the tokens that ``counted_rows`` has are read at all, so whatever stands at padding, NaN included, is left out.
    The hooks are gone afterwards, also after an error. Raises DataError for activations that are not finite.
    """
    recorded: Recorded = {}
    family = family_of(decoder.config.model_type)
    with ExitStack() as hooks:
        for layer, block in enumerate(decoder.layers):
            own = recording_layer(block, family, layer, rows_N, recorded, covariance=layer in covariances)
            hooks.enter_context(own)
        yield recorded


@contextmanager
def recording_layer(
    block: nn.Module, family: Family, layer: int, rows_N: Tensor | None, recorded: Recorded, *, covariance: bool
) -> Iterator[None]:
    """As ``recording``, of one decoder layer, adding to ``recorded``."""
    statistic = Covariance if covariance else Moments
    with ExitStack() as hooks:
        modules: dict[Site, str] = {"attn": family.o_proj, "mlp": family.down_proj}
        if family.is_mixture:
            del modules["mlp"]
            hook = _experts_hook(recorded, layer, rows_N)
            hooks.callback(block.get_submodule("mlp.experts").register_forward_pre_hook(hook).remove)
        for site, module in modules.items():
            hook = _input_hook(recorded, (layer, site), rows_N, statistic)
            hooks.callback(block.get_submodule(module).register_forward_pre_hook(hook).remove)
        hook = _block_hook(recorded, (layer, "block"), rows_N)
        hooks.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _input_hook(
    recorded: Recorded, key: tuple[int, Site], rows_N: Tensor | None, statistic: type[Moments]
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _add(recorded, key, statistic.of(*_counted(inputs[0], rows_N)))

    return hook


def _experts_hook(recorded: Recorded, layer: int, rows_N: Tensor | None) -> Callable[..., None]:
    """Of a mixture, whose experts are one module: what each expert's ``down_proj`` sees of the tokens routed to it."""

    def hook(experts: Any, inputs: tuple[Tensor, ...]) -> None:
        x_ND, chosen_NK = (x if rows is None else x[rows] for x, rows in (_counted(x, rows_N) for x in inputs[:2]))
        for expert, gate_up_JD in enumerate(experts.gate_up_proj):
            routed_ND = x_ND[(chosen_NK == expert).any(1)]
            gate_NC, up_NC = functional.linear(routed_ND, gate_up_JD).chunk(2, dim=-1)
            _add(recorded, (layer, f"mlp.{expert}"), Moments.of(experts.act_fn(gate_NC) * up_NC))

    return hook


def _block_hook(recorded: Recorded, key: tuple[int, Site], rows_N: Tensor | None) -> Callable[..., None]:
    """Cosine of a layer's input and output, each token's own: 1 less its mean is ShortGPT's Block Influence."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        x_ND, rows = _counted(before.to(after.device), rows_N)
        cosine_N = _cosines(x_ND, after.detach().flatten(0, -2), rows)
        _add(recorded, key, Moments.of(cosine_N[:, None]))

    return hook


def _cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """Of each counted token, float64."""
    if x_ND.is_cuda:
        from seap_ray.core import kernels  # Triton is there with a GPU alone

        return kernels.cosines(x_ND, y_ND, rows_N)
    pairs = zip(blocks(x_ND, rows_N), blocks(y_ND, rows_N), strict=True)
    return torch.cat([x_ND.new_empty(0, dtype=torch.float64), *(_cosine(x, y) for x, y in pairs)])


def _cosine(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    norms_N = vector_norm(x_ND, dim=1) * vector_norm(y_ND, dim=1)
    return x_ND.mul_(y_ND).sum(1) / norms_N.clamp_(min=1e-16)


def counted_rows(counted_BT: Tensor) -> Tensor | None:
    """Indices of the tokens that count among all of a batch; None where all do. Waits for the device of its input."""
    rows_N = counted_BT.flatten().nonzero().squeeze(1)
    return rows_N if len(rows_N) < counted_BT.numel() else None


def _counted(x: Tensor, rows_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A site's input by tokens, and which of them count: None for all."""
    x_ND = x.detach().flatten(0, -2)
    return x_ND, None if rows_N is None else rows_N.to(x_ND.device, non_blocking=True)


def _add(recorded: Recorded, key: tuple[int, Site], moments: Moments) -> None:
    recorded[key] = recorded[key] + moments if key in recorded else moments


def record(
    model: PreTrainedModel,
    sequences: Sequences,
    *,
    batch_tokens: int,
    skip_first_token: bool = False,
    covariances: Container[int] = (),
) -> Recorded:
    """Moments of every site over all tokens of ``sequences``, and covariances of some layers, on the CPU.

    Runs the decoder alone: no head, no cache, no gradients. Sequences are packed, and do not see
    each other. Where memory runs out, the batch is halved and run again.
    Raises DataError for activations that are not finite.
    """
    total: Recorded = {}
    for rows in rows_of(model.get_decoder(), sequences, batch_tokens):
        part = _run(model, rows, skip_first_token, covariances)
        total = {key: total[key] + part[key] for key in part} if total else part
    return checked(total)


def rows_of(decoder: Any, sequences: Sequences, batch_tokens: int) -> list[list[Sequences]]:
    """Batches of rows of sequences; code that is not transformers' own may not keep those of a row apart."""
    lengths = [len(sequence) for sequence in sequences]
    if family_of(decoder.config.model_type).packs and type(decoder).__module__.startswith("transformers."):
        groups = packed(lengths, batch_tokens)
    else:
        groups = [[[i] for i in group] for group in batches(lengths, batch_tokens)]
    return [[[sequences[i] for i in row] for row in rows] for rows in groups]


def _run(model: PreTrainedModel, rows: list[Sequences], skip_first: bool, covariances: Container[int]) -> Recorded:
    try:
        return _forward(model, rows, skip_first, covariances)
    except RuntimeError as error:
        if not _out_of_memory(error) or sum(map(len, rows)) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows = rows if len(rows) > 1 else [[sequence] for sequence in rows[0]]
    half = len(rows) // 2
    first, second = (_run(model, part, skip_first, covariances) for part in (rows[:half], rows[half:]))
    return {key: first[key] + second[key] for key in first}


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.inference_mode()
def _forward(model: PreTrainedModel, rows: list[Sequences], skip_first: bool, covariances: Container[int]) -> Recorded:
    batch, decoder = Batch.of(rows, skip_first, model.device), model.get_decoder()
    with recording(decoder, batch.rows_N, covariances=covariances) as recorded:
        decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
    return recorded


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of sequences, one after another in a row, padded at their end to the longest row."""

    ids_BT: Tensor
    positions_BT: Tensor | None
    """Of each token in its sequence: where one begins anew, transformers' masks keep what is before it apart. At
    padding 0, so that nothing there is seen. None where every row is one sequence: attention then needs no mask, since
    nothing sees the padding behind it."""
    rows_N: Tensor | None
    """Tokens that count, as ``counted_rows`` has them."""

    @classmethod
    def of(cls, rows: Sequence[Sequences], skip_first: bool, device: torch.device) -> "Batch":
        width = max(sum(map(len, row)) for row in rows)
        ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        positions_BT, counted_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids, positions = chain(*row), chain(*(range(len(sequence)) for sequence in row))
            n_tokens = sum(map(len, row))
            ids_BT[i, :n_tokens] = torch.tensor([*ids])
            positions_BT[i, :n_tokens] = torch.tensor([*positions])
            counted_BT[i, :n_tokens] = True
        if skip_first:
            counted_BT &= positions_BT > 0
        rows_N = counted_rows(counted_BT)
        is_packed = any(len(row) > 1 for row in rows)
        return cls(
            ids_BT.to(device, non_blocking=True),
            positions_BT.to(device, non_blocking=True) if is_packed else None,
            None if rows_N is None else rows_N.to(device, non_blocking=True),
        )


def checked(recorded: Recorded) -> Recorded:
    """Moments on the CPU, where looking at them makes no device wait: what is not finite stays so in a sum.

    Raises DataError that names the first layer and site whose activations are not.
    """
    found = {key: moments.coming() for key, moments in recorded.items()}
    for device in {moments.mean_D.device for moments in recorded.values() if moments.mean_D.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    for (layer, site), moments in found.items():
        if not torch.isfinite(moments.m2_D).all():
            raise DataError(f"activations of layer {layer}, site {site}, are not finite")
    return found


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Put a name before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
