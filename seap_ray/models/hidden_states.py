"""Hidden states: batches on their way through the decoder layers, which are run one at a time.

Letters: B rows, T positions, of which P are asked for, D hidden size, L layers, V vocabulary.
"""

from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from seap_ray.core.families import family_of
from seap_ray.models.batching import Batch
from seap_ray.models.loading import decoder_of
from seap_ray.models.sequences import Sequences

POSITIONAL = "*"
"""Key of the arguments without names behind the hidden states: Gemma 4's inputs of a layer's own."""
SHARED = "shared_kv_states"
"""Argument in which layers of Gemma 4 leave keys and values for later ones."""


@dataclass
class HiddenBatch:
    """A batch of sequences on its way through the layers."""

    batch: Batch
    rows: Sequence[Sequences]
    """Sequences of every row, which stand one after another in it."""
    hidden_BTD: Tensor
    """Hidden states before the next layer."""
    arguments_L: list[dict[str, Any]]
    """Keyword arguments that the decoder gives each layer: masks and rotary embeddings, made once and shared."""
    shared: Any = field(default_factory=WeakTensorKeyDictionary)
    """Keys and values that later layers take from earlier ones, by the hidden states that they lead to: those of a
    cut model are others than the dense model's."""

    def run(self, block: nn.Module, layer: int, hidden_BTD: Tensor, device: torch.device) -> Tensor:
        """Return what a layer makes of hidden states of this batch, on the device where these wait."""
        arguments = _move_all(self.arguments_L[layer], device, {})
        positional = arguments.pop(POSITIONAL, ())
        shares = SHARED in arguments
        if shares:
            arguments[SHARED] = UserDict(self.shared.get(hidden_BTD, {}))
        output = block(hidden_BTD.to(device), *positional, **arguments)
        after_BTD = (output[0] if isinstance(output, tuple) else output).to(hidden_BTD.device)
        if shares:
            self.shared[after_BTD] = arguments[SHARED]
        return after_BTD

    def to(self, device: torch.device) -> "HiddenBatch":
        """Copy hidden states and arguments to a device; a tensor that layers share stays one tensor."""
        moved: dict[int, Tensor] = {}
        arguments_L = [_move_all(arguments, device, moved) for arguments in self.arguments_L]

        return HiddenBatch(self.batch, self.rows, self.hidden_BTD.to(device), arguments_L)


def _move_all(arguments: dict[str, Any], device: torch.device, moved: dict[int, Tensor]) -> dict[str, Any]:
    return {name: _move(value, device, moved) for name, value in arguments.items()}


def _move(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """Copy the tensors of a value to a device, each once; ``moved`` remembers the copies by the tensors' ids."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device, moved) for item in value)
    return value


class Placeholder(nn.Module):
    """Stands for a decoder layer, of which it has what the decoder of some hybrids reads to choose a mask."""

    def __init__(self, layer: Any):
        super().__init__()
        if hasattr(layer, "block_type"):
            self.block_type = layer.block_type


class _Catcher(Placeholder):
    """Stands for a decoder layer: keeps what it is given, and hands it on."""

    hidden_BTD: Tensor
    arguments: dict[str, Any]

    def __init__(self, layer: Any, returns_tuples: bool):
        super().__init__(layer)
        self.returns_tuples = returns_tuples

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
        """Keep the input and the arguments; return the input, which the next catcher is given."""
        self.hidden_BTD = hidden_states
        self.arguments = arguments | ({POSITIONAL: positional} if positional else {})
        return (hidden_states,) if self.returns_tuples else hidden_states


class _Replay(Placeholder):
    """Stands for all decoder layers: returns hidden states that were computed before."""

    def __init__(self, layer: Any, hidden_BTD: Tensor, returns_tuples: bool):
        super().__init__(layer)
        self.hidden_BTD = hidden_BTD
        self.returns_tuples = returns_tuples

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
        """Return the hidden states, whatever comes in."""
        return (self.hidden_BTD,) if self.returns_tuples else self.hidden_BTD


@contextmanager
def _layers_replaced(decoder: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Give a decoder other layers inside the block."""
    whole_layers = decoder.layers
    decoder.layers = nn.ModuleList(layers)
    try:
        yield
    finally:
        decoder.layers = whole_layers


@torch.no_grad()
def embed(decoder: Any, rows: Sequence[Sequences], skip_first: bool, device: torch.device) -> HiddenBatch:
    """Return a batch as it comes to the first layer, with what the decoder gives to every layer.

    Args:
        decoder: A model without its head; its layers are not run.
        rows: Sequences of every row.
        skip_first: Whether the first token of every sequence does not count.
        device: Device of the decoder's embedding.

    Returns:
        Hidden states (B, T, D) in the decoder's dtype, with the arguments of every layer; a graph may begin with them.
    """
    batch = Batch.of(rows, skip_first, device)
    returns_tuples = family_of(decoder.config.model_type).returns_tuples
    catchers = [_Catcher(layer, returns_tuples) for layer in decoder.layers]
    with _layers_replaced(decoder, catchers):
        decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
    return HiddenBatch(batch, rows, catchers[0].hidden_BTD, [catcher.arguments for catcher in catchers])


def head_logits(model: Any, batch: Batch, hidden_BTD: Tensor, positions_P: Tensor) -> Tensor:
    """Return the logits that a model makes of the last layer's hidden states at some positions.

    The model's own forward runs with all layers left out, since families scale and cap logits in it.

    Args:
        model: A causal language model; its layers are not run.
        batch: The batch that the hidden states belong to.
        hidden_BTD: What the last layer returned, (B, T, D).
        positions_P: Places in the rows, (P,), int64, on the batch's device.

    Returns:
        Logits, (B, P, V), float32.
    """
    decoder = decoder_of(model)
    returns_tuples = family_of(decoder.config.model_type).returns_tuples
    replay = _Replay(decoder.layers[0], hidden_BTD.to(batch.ids_BT.device), returns_tuples)
    with _layers_replaced(decoder, [replay]):
        output = model(
            input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False, logits_to_keep=positions_P
        )
    return output.logits.float()
