"""Recorder: hooks on a model's decoder layers and their ``o_proj`` and ``down_proj``; token batches in, moments out.

Letters: B sequences, T positions, N real tokens, D columns of a site.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from seap_ray.architecture import Family, family_of
from seap_ray.corpus import batches
from seap_ray.errors import DataError
from seap_ray.moments import Covariance, Moments, Site, chosen

Recorded = dict[tuple[int, Site], Moments]
Sequences = Sequence[Sequence[int]]
"""Token ids of several texts."""


@contextmanager
def recording(decoder: Any, counted_BT: Tensor, *, covariances: Container[int] = ()) -> Iterator[Recorded]:
    """While inside, every forward pass of ``decoder`` (the model without its head) adds to the yielded moments.

    Layers in ``covariances`` have a ``Covariance`` of each of their sites.

    Only positions where ``counted_BT`` is True are read at all, so whatever stands at padding, NaN included, is left
    out. The hooks are gone afterwards, also after an error. Raises DataError for activations that are not finite.
    """
    recorded: Recorded = {}
    family, rows_N = family_of(decoder.config.model_type), counted_rows(counted_BT)
    with ExitStack() as hooks:
        for layer, block in enumerate(decoder.layers):
            own = recording_layer(block, family, layer, rows_N, recorded, covariance=layer in covariances)
            hooks.enter_context(own)
        yield recorded


@contextmanager
def recording_layer(
    block: nn.Module, family: Family, layer: int, rows_N: Tensor | None, recorded: Recorded, *, covariance: bool
) -> Iterator[None]:
    """As ``recording``, of one decoder layer and the tokens ``counted_rows`` has, adding to ``recorded``."""
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
        x_ND = _flat(inputs[0])
        _add(recorded, key, statistic.of(x_ND, _at(rows_N, x_ND.device)))

    return hook


def _experts_hook(recorded: Recorded, layer: int, rows_N: Tensor | None) -> Callable[..., None]:
    """Of a mixture, whose experts are one module: what each expert's ``down_proj`` sees of the tokens routed to it."""

    def hook(experts: Any, inputs: tuple[Tensor, ...]) -> None:
        x_ND, chosen_NK = (chosen(_flat(x), _at(rows_N, x.device)) for x in inputs[:2])
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
        x_ND, y_ND = (_flat(x).to(after.device) for x in (before, after))
        _add(recorded, key, Moments.of(_cosines(x_ND, y_ND, _at(rows_N, after.device))[:, None]))

    return hook


def _cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """Of each counted token, float64."""
    if x_ND.is_cuda:
        from seap_ray import kernels  # Triton is there with a GPU alone

        return kernels.cosines(x_ND, y_ND, rows_N)
    return cosine_similarity(chosen(x_ND, rows_N).double(), chosen(y_ND, rows_N).double(), dim=1)


def counted_rows(counted_BT: Tensor) -> Tensor | None:
    """Indices of the tokens that count among all of a batch; None where all do. Waits for the device of its input."""
    rows_N = counted_BT.flatten().nonzero().squeeze(1)
    return rows_N if len(rows_N) < counted_BT.numel() else None


def _at(rows_N: Tensor | None, device: torch.device) -> Tensor | None:
    return None if rows_N is None else rows_N.to(device)


def _flat(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2)


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

    Runs the decoder alone: no head, no cache, no gradients. Where memory runs out, the batch is halved and run again.
    Raises DataError for activations that are not finite.
    """
    total: Recorded = {}
    for group in batches([len(sequence) for sequence in sequences], batch_tokens):
        part = _run(model, [sequences[i] for i in group], skip_first_token, covariances)
        total = {key: total[key] + part[key] for key in part} if total else part
    return checked(total)


def _run(
    model: PreTrainedModel, sequences: list[Sequence[int]], skip_first: bool, covariances: Container[int]
) -> Recorded:
    try:
        return _forward(model, sequences, skip_first, covariances)
    except RuntimeError as error:
        if len(sequences) == 1 or not _out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(sequences) // 2
    first, second = (_run(model, part, skip_first, covariances) for part in (sequences[:half], sequences[half:]))
    return {key: first[key] + second[key] for key in first}


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.inference_mode()
def _forward(
    model: PreTrainedModel, sequences: list[Sequence[int]], skip_first: bool, covariances: Container[int]
) -> Recorded:
    batch = Batch.of(sequences, skip_first, model.device)
    with recording(model.get_decoder(), batch.counted_BT, covariances=covariances) as recorded:
        model.get_decoder()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
    return recorded


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of tokens, padded at their end to the longest."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    """Where tokens are real; None where all are."""
    counted_BT: Tensor
    """Where tokens count."""
    rows_N: Tensor | None
    """The same, as ``counted_rows`` has it."""

    @classmethod
    def of(cls, sequences: Sequences, skip_first: bool, device: torch.device) -> "Batch":
        longest = max(len(sequence) for sequence in sequences)
        ids_BT = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids_BT[row, : len(sequence)] = torch.as_tensor(sequence)
            mask_BT[row, : len(sequence)] = True
        counted_BT = mask_BT.clone()
        counted_BT[:, 0] &= not skip_first
        is_padded = not bool(mask_BT.all())
        mask = mask_BT.to(device) if is_padded else None
        return cls(ids_BT.to(device), mask, counted_BT.to(device), _at(counted_rows(counted_BT), device))


def checked(recorded: Recorded) -> Recorded:
    """Moments on the CPU, where looking at them makes no device wait: what is not finite stays so in a sum.

    Raises DataError that names the first layer and site whose activations are not.
    """
    found = {key: moments.cpu() for key, moments in recorded.items()}
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
