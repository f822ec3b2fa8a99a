"""Layerwise: a model of any depth, read one decoder layer at a time; token sequences in, moments of each layer out.

All sequences pass a layer before the next one is needed, so memory holds two layers (one works, one is being read) and
the hidden states, whatever the depth. The moments are the same bytes as those of the whole model in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from seap_ray.core.families import FusedExperts
from seap_ray.core.fused_experts import joined
from seap_ray.errors import ConfigError
from seap_ray.models.batching import make_batches
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.hidden_states import HiddenBatch, Placeholder, embed
from seap_ray.models.loading import attention_of, decoder_of
from seap_ray.models.recorder import SiteMoments, added, error_context, on_cpu, recording_layer
from seap_ray.models.sequences import Sequences

COPY_ELEMENTS = 1 << 24
"""Elements of a weight that are copied to a GPU at a time."""
LAYERS_PREFIX = "layers."
"""Beginning of the names of decoder layers in the decoder; in the checkpoint more stands before it."""


@dataclass(frozen=True)
class LayerwiseModel:
    """A checkpoint to be run layer by layer on one device."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    memory_budget: int
    """Bytes that hidden states and masks may take on the device; where they are more, they wait on the host."""
    trust_remote_code: bool = False

    def record(
        self,
        shards: Mapping[str, Sequences],
        *,
        batch_tokens: int,
        skip_first_token: bool = False,
        covariance: bool = False,
        inputs: bool = False,
    ) -> Iterator[tuple[str, SiteMoments]]:
        """Run all shards through one layer after another.

        Args:
            shards: Token ids of each shard's sequences, by its name.
            batch_tokens: Tokens of a forward pass, padding included.
            skip_first_token: Leave the first token of every sequence out of the statistics.
            covariance: Record a ``Covariance`` of every site.
            inputs: Record one of each of the layer's other inputs (``INPUTS``), too.

        Yields:
            For each layer in turn, each shard's name and what ``forward.record`` finds of the layer in its sequences.

        Raises:
            DataError: Activations are not finite; it names the shard, layer and site.
            ConfigError: A batch does not fit the device.
        """
        skeleton = self._skeleton()
        in_flight = self._embed_all(skeleton, shards, batch_tokens, skip_first_token)
        blocks = self._read_layers(skeleton.layers, range(len(skeleton.layers)))
        for layer in range(len(skeleton.layers)):
            block = next(blocks)  # not by enumerate, which would hold on to the last one
            for shard in shards:
                with error_context(f"shard {shard}"):
                    recorded = self._run_layer(block, layer, in_flight[shard], covariance, inputs)
                yield shard, recorded
            del block  # before the next but one is read

    def _skeleton(self) -> Any:
        """Build the decoder without weights, but with the buffers that no checkpoint holds and that are computed."""
        return decoder_of(self._skeleton_model())

    def _skeleton_model(self) -> Any:
        """Build the whole model as ``_skeleton`` builds its decoder."""
        from transformers import AutoConfig, AutoModelForCausalLM

        import seap_ray.models.hf  # noqa: F401  the checkpoint may be cut already

        config = self.checkpoint.nested_settings.get("config") or AutoConfig.from_pretrained(
            self.checkpoint.folder, trust_remote_code=self.trust_remote_code
        )
        if attention := attention_of(self.checkpoint.config):
            # As load_model does, so that both compute the same.
            config._attn_implementation = attention
        # On meta, where tensors have shapes and no memory.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            ).eval()
        # Some routers are computed with in float32, whatever the type of the other weights.
        kept_in = model._get_dtype_plan(self.dtype)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            for pattern, dtype in kept_in.items():
                if pattern in name:
                    tensor.data = tensor.data.to(dtype)
        # Rotary frequencies and the like are computed on the CPU, as from_pretrained does.
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        # A Falcon-H1's decoder fills the buffers of its layers.
        for module in model.modules():
            if module is decoder_of(model) or module._non_persistent_buffers_set:
                model._init_weights(module)
        return model

    def without_layers(self) -> Any:
        """Return the model with all its weights but those of the decoder layers, which cannot be run."""
        model = self._skeleton_model()
        decoder = decoder_of(model)
        decoder.layers = nn.ModuleList(map(Placeholder, decoder.layers))
        family = self.checkpoint.architecture.family
        self._load_weights(decoder, family.layers.removesuffix(LAYERS_PREFIX))

        # A head of its own has this name; a tied one is the embedding.
        if family.head in self.checkpoint.tensors:
            self._load_weights(model.get_output_embeddings(), family.head.removesuffix("weight"))
        else:
            model.tie_weights()
        return model.to(self.device)

    def read_layers(self, numbers: Sequence[int]) -> Iterator[nn.Module]:
        """Yield decoder layers by their numbers with their weights; the one before should be done with by then."""
        return self._read_layers(self._skeleton().layers, numbers)

    # --- hidden states -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _embed_all(
        self, skeleton: Any, shards: Mapping[str, Sequences], batch_tokens: int, skip_first: bool
    ) -> dict[str, list[HiddenBatch]]:
        """Embed the sequences of every shard, and catch what the decoder would give to its layers."""
        # A copy: the skeleton keeps its layers, into which weights are read later.
        decoder = deepcopy(skeleton)
        batches_by_shard: dict[str, list[list[Sequences]]] = {}

        for shard, sequences in shards.items():
            batches_by_shard[shard] = make_batches(decoder, sequences, batch_tokens)
        waiting_device = self._waiting_device(batches_by_shard)

        # What is left of the decoder, embeddings and masks, runs as in the whole model.
        decoder.layers = nn.ModuleList(map(Placeholder, skeleton.layers))
        # The last norm comes after all layers; nothing reads what it gives.
        decoder.norm = nn.Identity()
        self._load_weights(decoder, self.checkpoint.architecture.family.layers.removesuffix(LAYERS_PREFIX))
        decoder.to(self.device)

        in_flight: dict[str, list[HiddenBatch]] = {}
        for shard, batches in batches_by_shard.items():
            in_flight[shard] = [embed(decoder, rows, skip_first, self.device).to(waiting_device) for rows in batches]
        return in_flight

    def _waiting_device(self, batches_by_shard: Mapping[str, list[list[Sequences]]]) -> torch.device:
        """Choose where hidden states wait for the next layer: on the device if they fit ``memory_budget``."""
        lengths: list[int] = []
        for batches in batches_by_shard.values():
            for rows in batches:
                lengths += [sum(map(len, row)) for row in rows]
        # A token has its hidden state, and a row of a mask that is as long as the longest row, a byte a token.
        token_bytes = self.checkpoint.architecture.hidden_size * self.dtype.itemsize + max(lengths)
        return self.device if sum(lengths) * token_bytes <= self.memory_budget else torch.device("cpu")

    @torch.inference_mode()
    def _run_layer(
        self, block: nn.Module, layer: int, in_flight: list[HiddenBatch], covariance: bool, inputs: bool
    ) -> SiteMoments:
        """Take a shard's batches through one layer, whose output they hold then; return its moments, on the CPU."""
        family = self.checkpoint.architecture.family
        total: SiteMoments = {}
        # Batch by batch in the order of the whole model's, so that sums are the same bytes.
        for passing in in_flight:
            part: SiteMoments = {}
            rows_N = passing.batch.rows_N
            with recording_layer(block, family, layer, rows_N, part, covariance=covariance, inputs=inputs):
                passing.hidden_BTD = self._forward(block, layer, passing)
            total = added(total, part)
        return on_cpu(total)

    def _forward(self, block: nn.Module, layer: int, passing: HiddenBatch) -> Tensor:
        try:
            return passing.run(block, layer, passing.hidden_BTD, self.device)
        except torch.OutOfMemoryError:
            tokens = passing.hidden_BTD.shape[0] * passing.hidden_BTD.shape[1]
            raise ConfigError(
                f"calibration.batch_tokens: {self.device} has no room for a batch of {tokens} tokens; halve it"
            ) from None

    # --- weights -----------------------------------------------------------------------------------------------------

    def _read_layers(self, empty: Sequence[nn.Module], numbers: Sequence[int]) -> Iterator[nn.Module]:
        """Yield decoder layers with their weights, while the next one is read."""
        # A copy waits for all that its stream has to do, so on a GPU the reader has one of its own. A layer's memory
        # goes back to that stream when the layer is done with, which is after its moments came to the CPU.
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def read(layer: int) -> nn.Module:
            """Read a layer on the reader's own stream, and wait until it is there."""
            with torch.cuda.stream(stream):
                block = self._read_layer(empty, layer)

            if stream:
                stream.synchronize()
            return block

        with ThreadPoolExecutor(1) as reader:
            next_block = reader.submit(read, numbers[0])
            # What comes after each; nothing after the last.
            for following in [*numbers[1:], None]:
                block = next_block.result()
                if following is not None:
                    next_block = reader.submit(read, following)
                yield block
                # Given back before the wait for the next one.
                del block

    def _read_layer(self, empty: Sequence[nn.Module], layer: int) -> nn.Module:
        # A copy: filled in itself, the empty layer would hold on to its weights.
        block = deepcopy(empty[layer])
        self._load_weights(block, f"{self.checkpoint.architecture.family.layers}{layer}.")
        return block

    def _load_weights(self, module: nn.Module, prefix: str) -> None:
        """Give a module its weights, copied: what safetensors returns is read only when it is used."""
        weights: dict[str, Tensor] = {}
        for name, empty in module.state_dict().items():
            weights[name] = self._to_device(self._read_weight(prefix, name), empty.dtype)
        module.load_state_dict(weights, assign=True)

    def _to_device(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if self.device.type != "cuda":
            return stored.to(self.device, dtype, copy=True)
        # From pinned memory, a piece at a time: a copy from any other would keep the driver, so that nothing could be
        # launched meanwhile. All cores read a piece, and PyTorch gives its memory out again when it has been copied.
        copied = torch.empty(stored.shape, dtype=dtype, device=self.device)
        sources = stored.flatten().split(COPY_ELEMENTS)
        targets = copied.flatten().split(COPY_ELEMENTS)
        for source, target in zip(sources, targets, strict=True):
            pinned = torch.empty(source.shape, dtype=dtype, pin_memory=True)
            target.copy_(pinned.copy_(source), non_blocking=True)
        return copied

    def _read_weight(self, prefix: str, name: str) -> Tensor:
        """Read a weight by its name in a module; in transformers' MoE layers the experts' matrices are one tensor."""
        family = self.checkpoint.architecture.family
        if not family.is_moe or not name.startswith(f"{family.mixture}."):
            return self.checkpoint.read(prefix + name)

        if fused := family.fused_experts.get(name):
            n_experts = self.checkpoint.architecture.n_experts
            return torch.stack([self._read_expert(prefix, fused, e) for e in range(n_experts)])

        # Checkpoints have other names before ``experts``.
        stem = family.down_proj.partition(".experts")[0]
        stored = f"{stem}{name.removeprefix(family.mixture)}"
        for of_module, of_checkpoint in family.renamed.items():
            stored = stored.replace(of_module, of_checkpoint)
        return self.checkpoint.read(f"{prefix}{stored}")

    def _read_expert(self, prefix: str, fused: FusedExperts, expert: int) -> Tensor:
        """Read what a tensor of all MoE experts holds of one."""
        names = [f"{prefix}{module.format(e=expert)}.{fused.kind}" for module in fused.modules]
        return joined(fused, [self.checkpoint.read(name) for name in names])
