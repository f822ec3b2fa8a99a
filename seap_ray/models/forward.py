"""Forward: the calibration's forward pass. A checkpoint and token sequences in, moments of every layer and site out.

``make_runner`` chooses by ``calibration.placement``: the whole model in memory, on one device or over several, or one
decoder layer at a time, read from disk. The moments are the same bytes either way.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from seap_ray.config import CalibrationSection, Config
from seap_ray.core.architecture import Architecture
from seap_ray.models.batching import Batch, make_batches
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.hidden_states import HiddenBatch, embed
from seap_ray.models.input_records import input_covariance_bytes
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.loading import decoder_of, first_device, free_memory, load_model, model_dtype, prepare_process
from seap_ray.models.recorder import SiteMoments, added, error_context, on_cpu, recording
from seap_ray.models.records import covariance_bytes
from seap_ray.models.sequences import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COVARIANCE_COPIES = 3
"""Times that a layer's covariances are in memory at once: the sum so far, a batch's part, and the sum of both."""
COVARIANCE_SHARE = 0.8
"""Share of a device's free memory that covariances may take; activations need the rest."""


class CalibrationRunner(Protocol):
    """A model that is ready to be calibrated."""

    def record(self, shards: Mapping[str, Sequences]) -> Iterator[tuple[str, SiteMoments]]:
        """Run the model over the sequences of every shard.

        Args:
            shards: Token ids of each shard's sequences, by its name.

        Yields:
            A shard's name and what was recorded in it of some layers, on the CPU, until every layer of every shard is.

        Raises:
            DataError: Activations are not finite; it names the shard, layer and site.
        """


def make_runner(config: Config, checkpoint: Checkpoint) -> CalibrationRunner:
    """Load what ``calibration.placement`` keeps in memory, on this worker's device or devices."""
    if config.calibration.placement == "stream":
        return LayerwiseRunner.load(config, checkpoint)
    return WholeModelRunner.load(config, checkpoint)


def recorded_bytes(architecture: Architecture, *, inputs: bool) -> int:
    """Return the bytes of the covariances that are recorded of a layer, as full float32 matrices."""
    return covariance_bytes(architecture) + (input_covariance_bytes(architecture) if inputs else 0)


# --- the whole model in memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeModelRunner:
    """A model that is whole in memory; covariances that do not fit beside it take several passes over a shard."""

    model: "PreTrainedModel"
    architecture: Architecture
    settings: CalibrationSection
    records_inputs: bool = False
    """Whether layers have covariances of all their inputs."""

    @classmethod
    def load(cls, config: Config, checkpoint: Checkpoint) -> "WholeModelRunner":
        """Load the model by ``calibration.placement``."""
        model = load_model(config, checkpoint, checkpoint.folder)
        return cls(model, checkpoint.architecture, config.calibration, config.records_inputs)

    def record(self, shards: Mapping[str, Sequences]) -> Iterator[tuple[str, SiteMoments]]:
        """Run the model over one shard after another."""
        for shard, sequences in shards.items():
            for layers in self._passes():  # by the memory that is free now
                with error_context(f"shard {shard}"):
                    recorded = record(
                        self.model,
                        sequences,
                        batch_tokens=self.settings.batch_tokens,
                        skip_first_token=self.settings.skip_first_token,
                        covariances=layers,
                        inputs=self.records_inputs,
                    )
                yield shard, recorded

    def _passes(self) -> list[range]:
        """Return the layers whose covariances are recorded in each pass over a shard; without any: one pass."""
        if self.settings.statistics != "covariance":
            # Moments alone: no layer has covariances.
            return [range(0)]

        layers = range(self.architecture.n_layers)
        size = self._layers_a_pass()
        return [layers[first : first + size] for first in range(0, len(layers), size)]

    def _layers_a_pass(self) -> int:
        if self.settings.covariance_layers != "auto":
            return self.settings.covariance_layers

        free = free_memory(self.model.device, self.settings.num_gpus)
        layer_bytes = recorded_bytes(self.architecture, inputs=self.records_inputs)
        fitting = int(free * COVARIANCE_SHARE // (COVARIANCE_COPIES * layer_bytes))
        # One layer is tried whatever the memory; where it runs out, batches are halved.
        return max(1, fitting)


def record(
    model: "PreTrainedModel",
    sequences: Sequences,
    *,
    batch_tokens: int,
    skip_first_token: bool = False,
    covariances: Container[int] = (),
    inputs: bool = False,
) -> SiteMoments:
    """Run a model over sequences and return the moments of its activations.

    The decoder alone runs: no head, no cache, no gradients. Sequences are packed, and do not see each other. Where
    memory runs out, the batch is halved and run again.

    Args:
        model: A causal language model of a supported family, in evaluation mode.
        sequences: Token ids of each text.
        batch_tokens: Tokens of a forward pass, padding included.
        skip_first_token: Leave the first token of every sequence out of the statistics.
        covariances: Layers that have a ``Covariance`` of each of their sites in place of ``Moments``.
        inputs: Whether these layers have one of each of their other inputs (``INPUTS``), too.

    Returns:
        Moments over all tokens by (layer, site), float64, on the CPU. The sites of a layer are ``attn`` (input of
        ``o_proj``), ``mlp`` (input of ``down_proj``; in an MoE model ``mlp.0``, ``mlp.1``, ... for its experts) and
        ``block`` (cosine of the layer's input and output, one column).

    Raises:
        DataError: Activations are not finite; it names the first layer and site.
        ConfigError: The model's family is not supported.
    """
    # Nothing is copied to the CPU, and so nothing waits for the device, before the last batch.
    total: SiteMoments = {}

    for rows in make_batches(decoder_of(model), sequences, batch_tokens):
        total = added(total, _run_halving(model, rows, skip_first_token, covariances, inputs))
    return on_cpu(total)


def _run_halving(
    model: "PreTrainedModel", rows: list[Sequences], skip_first: bool, covariances: Container[int], inputs: bool
) -> SiteMoments:
    """Run a batch; where memory runs out, run its halves. A single sequence that does not fit raises."""
    try:
        return _forward(model, rows, skip_first, covariances, inputs)
    except RuntimeError as error:
        if not _is_out_of_memory(error) or sum(map(len, rows)) == 1:
            raise

    # Outside the except block, whose traceback holds on to the tensors of the failed pass.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:  # a row of several sequences: from here each has its own
        rows = [[sequence] for sequence in rows[0]]

    half = len(rows) // 2
    first = _run_halving(model, rows[:half], skip_first, covariances, inputs)
    second = _run_halving(model, rows[half:], skip_first, covariances, inputs)
    return added(first, second)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.inference_mode()
def _forward(
    model: "PreTrainedModel", rows: list[Sequences], skip_first: bool, covariances: Container[int], inputs: bool
) -> SiteMoments:
    batch = Batch.of(rows, skip_first, model.device)
    decoder = decoder_of(model)

    with recording(decoder, batch.rows_N, covariances=covariances, inputs=inputs) as recorded:
        decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
    return recorded


# --- layer by layer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerwiseRunner:
    """A model of any depth, of which two decoder layers are in memory; all shards pass a layer before the next one."""

    model: LayerwiseModel
    settings: CalibrationSection
    records_inputs: bool = False
    """Whether layers have covariances of all their inputs."""

    @classmethod
    def load(cls, config: Config, checkpoint: Checkpoint) -> "LayerwiseRunner":
        """Prepare the device; weights are read when shards come."""
        settings = config.calibration
        prepare_process(settings)
        device = first_device(settings)
        # Half of what is free is left to two layers and a batch's activations.
        memory_budget = free_memory(device, settings.num_gpus) // 2
        if settings.statistics == "covariance":
            layer_bytes = recorded_bytes(checkpoint.architecture, inputs=config.records_inputs)
            memory_budget -= COVARIANCE_COPIES * layer_bytes

        dtype = model_dtype(config.model, checkpoint)
        model = LayerwiseModel(checkpoint, dtype, device, memory_budget, config.model.trust_remote_code)
        return cls(model, settings, config.records_inputs)

    def record(self, shards: Mapping[str, Sequences]) -> Iterator[tuple[str, SiteMoments]]:
        """Run all shards through one decoder layer after another."""
        return self.model.record(
            shards,
            batch_tokens=self.settings.batch_tokens,
            skip_first_token=self.settings.skip_first_token,
            covariance=self.settings.statistics == "covariance",
            inputs=self.records_inputs,
        )


# --- single layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedLayers:
    """A dense model whose decoder layers are run one by one, from memory or, under ``stream``, from disk."""

    model: Any
    """The model, whose embedding and head are used; its own layers may be missing."""
    read_layers: Callable[[Sequence[int]], Iterator[nn.Module]]
    """Yields decoder layers by their numbers, each of which is done with before the next one is taken."""
    settings: CalibrationSection

    @classmethod
    def open(cls, config: Config, checkpoint: Checkpoint) -> "OpenedLayers":
        """Load what ``calibration.placement`` keeps in memory."""
        if config.calibration.placement == "stream":
            layerwise = LayerwiseRunner.load(config, checkpoint).model
            return cls(layerwise.without_layers(), layerwise.read_layers, config.calibration)

        model = load_model(config, checkpoint, checkpoint.folder)
        layers = decoder_of(model).layers
        return cls(model.requires_grad_(False), lambda numbers: (layers[i] for i in numbers), config.calibration)

    def forwards(self) -> Iterator[nn.Module]:
        """Yield all decoder layers from the first to the last."""
        return self.read_layers(range(self.model.config.get_text_config().num_hidden_layers))

    def backwards(self) -> Iterator[nn.Module]:
        """Yield all decoder layers from the last to the first."""
        return self.read_layers(range(self.model.config.get_text_config().num_hidden_layers)[::-1])

    def embed(self, sequences: Sequences) -> list[HiddenBatch]:
        """Return the sequences in batches as they come to the first layer."""
        decoder = decoder_of(self.model)
        device = self.model.get_input_embeddings().weight.device
        batches = make_batches(decoder, sequences, self.settings.batch_tokens)
        return [embed(decoder, rows, self.settings.skip_first_token, device) for rows in batches]
