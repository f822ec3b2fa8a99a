"""Layerwise: a model of any depth, read one decoder layer at a time; token sequences in, moments of each layer out.

All sequences pass a layer before the next one is needed, so memory holds two layers (one works, one is being read) and
the hidden states, whatever the depth. The moments are the same bytes as those of the whole model in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.recorder import Batch, Recorded, Sequences, checked, recording_layer, rows_of, telling

PIECE = 1 << 24
"""Numbers of a weight that are copied to a GPU at a time."""
LAYERS = "layers."
"""What the names of decoder layers begin with in the decoder; in the checkpoint more stands before it."""


def attention_of(config: Mapping[str, Any]) -> str | None:
    """Where attention has a soft cap, as in Gemma 2, transformers' usual implementation leaves it out."""
    return "eager" if config.get("attn_logit_softcapping") else None


@dataclass
class _Passing:
    """A batch on its way through the layers."""

    batch: Batch
    hidden_BTD: Tensor
    named_L: list[dict[str, Any]]
    """What the decoder gives each layer besides: masks and rotary embeddings, made once and shared by the layers."""

    def to(self, device: torch.device) -> "_Passing":
        moved: dict[int, Tensor] = {}  # what layers share stays shared
        named_L = [{key: _moved(value, device, moved) for key, value in named.items()} for named in self.named_L]
        return _Passing(self.batch, self.hidden_BTD.to(device), named_L)


def _moved(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    return type(value)(_moved(item, device, moved) for item in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class LayerwiseModel:
    """A checkpoint to be run layer by layer on one device."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    room: int
    """Bytes that hidden states and masks may take on the device; where they are more, they wait on the host."""
    trust_remote_code: bool = False

    def record(
        self,
        shards: Mapping[str, Sequences],
        *,
        batch_tokens: int,
        skip_first_token: bool = False,
        covariance: bool = False,
    ) -> Iterator[tuple[str, Recorded]]:
        """For each layer in turn, each shard's name and what ``recorder.record`` finds of the layer in its sequences.

        Raises DataError, with the shard's name, for activations that are not finite.
        """
        skeleton = self._skeleton()
        passing = self._enter(skeleton, shards, batch_tokens, skip_first_token)
        blocks = self._blocks(skeleton.layers)
        for layer in range(len(skeleton.layers)):
            block = next(blocks)  # not by enumerate, which would hold on to the last one
            for shard in shards:
                yield shard, self._through(block, layer, passing[shard], covariance, shard)
            del block  # before the next but one is read

    def _skeleton(self) -> Any:
        """The decoder without weights, but for what must be computed."""
        import seap_ray.models.hf  # noqa: F401  the checkpoint may be compacted already

        config = AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=self.trust_remote_code)
        if attention := attention_of(self.checkpoint.config):
            config._attn_implementation = attention
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            ).eval()
        for module in model.modules():  # on the CPU, as from_pretrained has it
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
                model._init_weights(module)
        return model.get_decoder()

    @torch.inference_mode()
    def _enter(
        self, skeleton: Any, shards: Mapping[str, Sequences], batch_tokens: int, skip_first: bool
    ) -> dict[str, list[_Passing]]:
        """Embed the sequences, and catch what the decoder would give to its layers."""
        decoder = deepcopy(skeleton)
        of_shards = {shard: rows_of(decoder, sequences, batch_tokens) for shard, sequences in shards.items()}
        home = self._home(of_shards)
        decoder.layers, decoder.norm = nn.ModuleList(_Catcher() for _ in skeleton.layers), nn.Identity()
        self._load(decoder, self.checkpoint.architecture.layout.layers.removesuffix(LAYERS))
        decoder.to(self.device)
        entered: dict[str, list[_Passing]] = {shard: [] for shard in shards}
        for shard, of_batches in of_shards.items():
            for rows in of_batches:
                batch = Batch.of(rows, skip_first, self.device)
                decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
                caught = [catcher.caught for catcher in decoder.layers]
                entered[shard].append(_Passing(batch, caught[0][0], [named for _, named in caught]).to(home))
        return entered

    def _home(self, shards: Mapping[str, list[list[Sequences]]]) -> torch.device:
        """Where hidden states wait for the next layer."""
        lengths = [sum(map(len, row)) for of_batches in shards.values() for rows in of_batches for row in rows]
        of_token = self.checkpoint.architecture.hidden_size * self.dtype.itemsize + max(lengths)  # and a row of a mask
        return self.device if sum(lengths) * of_token <= self.room else torch.device("cpu")

    @torch.inference_mode()
    def _through(self, block: nn.Module, layer: int, passing: list[_Passing], covariance: bool, shard: str) -> Recorded:
        """Take a shard's batches through one layer; its moments, on the CPU."""
        total: Recorded = {}
        for one in passing:
            part: Recorded = {}
            family = self.checkpoint.architecture.layout
            with recording_layer(block, family, layer, one.batch.rows_N, part, covariance=covariance):
                moved: dict[int, Tensor] = {}
                named = {key: _moved(value, self.device, moved) for key, value in one.named_L[layer].items()}
                output = self._run(block, one.hidden_BTD.to(self.device), named)
            after_BTD = output[0] if isinstance(output, tuple) else output
            one.hidden_BTD = after_BTD.to(one.hidden_BTD.device)
            total = {key: total[key] + part[key] for key in part} if total else part
        with telling(f"shard {shard}"):
            return checked(total)

    def _run(self, block: nn.Module, hidden_BTD: Tensor, named: dict[str, Any]) -> Any:
        try:
            return block(hidden_BTD, **named)
        except torch.OutOfMemoryError:
            tokens = hidden_BTD.shape[0] * hidden_BTD.shape[1]
            raise ConfigError(
                f"calibration.batch_tokens: {self.device} has no room for a batch of {tokens} tokens; halve it"
            ) from None

    def _blocks(self, empty: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Each decoder layer with its weights, while the next one is read."""
        # A copy waits for all that its stream has to do, so on a GPU the reader has one of its own. A layer's memory
        # goes back to that stream when the layer is done with, which is after its moments came to the CPU.
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def read(layer: int) -> nn.Module:
            with torch.cuda.stream(stream):
                block = self._block(empty, layer)
            if stream:
                stream.synchronize()
            return block

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, 0)
            for layer in range(1, len(empty) + 1):
                block = coming.result()
                if layer < len(empty):
                    coming = reader.submit(read, layer)
                yield block
                del block

    def _block(self, empty: Sequence[nn.Module], layer: int) -> nn.Module:
        block = deepcopy(empty[layer])
        self._load(block, f"{self.checkpoint.architecture.layout.layers}{layer}.")
        return block

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Give a module its weights, copied: what safetensors returns is read only when it is used."""
        weights = {name: self._copied(self._stored(prefix, name)) for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)

    def _copied(self, stored: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return stored.to(self.device, self.dtype, copy=True)
        # From pinned memory, a piece at a time: a copy from any other would keep the driver, so that nothing could be
        # launched meanwhile. All cores read a piece, and PyTorch gives its memory out again when it has been copied.
        copied = torch.empty(stored.shape, dtype=self.dtype, device=self.device)
        for source, target in zip(stored.flatten().split(PIECE), copied.flatten().split(PIECE), strict=True):
            pinned = torch.empty(source.shape, dtype=self.dtype, pin_memory=True)
            target.copy_(pinned.copy_(source), non_blocking=True)
        return copied

    def _stored(self, prefix: str, name: str) -> Tensor:
        """A weight of a module by its name there; a mixture has its experts' matrices as one, as no checkpoint does."""
        architecture, family = self.checkpoint.architecture, self.checkpoint.architecture.layout
        if not family.is_mixture or not name.startswith("mlp."):
            return self.checkpoint.read(prefix + name)
        of_experts = {
            "mlp.experts.gate_up_proj": [module for module in family.rows if "{e}" in module],
            "mlp.experts.down_proj": [family.down_proj],
        }
        if name in of_experts:
            each = (
                torch.cat([self.checkpoint.read(f"{prefix}{m.format(e=e)}.weight") for m in of_experts[name]])
                for e in range(architecture.n_experts)
            )
            return torch.stack([*each])
        stem = family.down_proj.partition(".experts")[0]
        return self.checkpoint.read(f"{prefix}{stem}{name.removeprefix('mlp')}")


class _Catcher(nn.Module):
    """Stands for a decoder layer: keeps what it is given, and hands it on."""

    caught: tuple[Tensor, dict[str, Any]]

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        self.caught = hidden_states, named
        return hidden_states
