"""Stream: a checkpoint read layer by layer beside the whole model, and how much of the reading is hidden.

Letters: B sequences, T tokens of each.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.device import (
    DEVICE,
    DTYPE,
    HAS_GPU,
    SIZES,
    Ceilings,
    build_model,
    free_memory,
    gpu_row,
    load_model,
    median_seconds,
    now,
    random_sequences,
)
from benchmarks.measure import Row, alternate
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import record
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.recorder import SiteMoments
from seap_ray.models.sequences import Sequences

ROUNDS = 3
LAYER_ROUNDS = 5
"""Rounds of reading one layer."""
MEMORY_BUDGET = 1 << 34
"""Bytes that hidden states may take on the device: all fit."""


@dataclass(frozen=True)
class _Case:
    """A checkpoint, some shards, and how many of their tokens are a batch."""

    name: str
    layerwise: LayerwiseModel
    shards: dict[str, Sequences]
    batch_tokens: int
    n_tokens: int

    @property
    def folder(self) -> str:
        """Folder of the checkpoint."""
        return str(self.layerwise.checkpoint.folder)

    def record_whole(self) -> dict[str, SiteMoments]:
        """Load the model, and record every shard."""
        model = load_model(self.folder)
        return {
            shard: record(model, sequences, batch_tokens=self.batch_tokens) for shard, sequences in self.shards.items()
        }

    def record_layerwise(self) -> dict[str, SiteMoments]:
        """Record every shard layer by layer."""
        moments: dict[str, SiteMoments] = {shard: {} for shard in self.shards}
        for shard, recorded in self.layerwise.record(self.shards, batch_tokens=self.batch_tokens):
            moments[shard] |= recorded
        return moments


def stream_rows(_ceilings: Ceilings) -> Iterator[Row]:
    """Yield a checkpoint on disk, read layer by layer beside loaded as a whole; statistics of both to the byte."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    B, T = SIZES.batches[0]

    with TemporaryDirectory() as folder:
        build_model(config).save_pretrained(folder)
        free_memory()
        layerwise = LayerwiseModel(Checkpoint.open(folder), DTYPE, DEVICE, MEMORY_BUDGET)
        # With few tokens reading is the longer work, with many computing.
        for n_shards in (1, 8):
            shards = {f"{i}": random_sequences(config, [T] * B) for i in range(n_shards)}
            n_tokens = B * T * n_shards
            case = f"{SIZES.layers} layers of {name}, {n_tokens} tokens"
            yield from _case_rows(_Case(case, layerwise, shards, B * T, n_tokens))


def _case_rows(case: _Case) -> Iterator[Row]:
    moments: dict[str, dict[str, SiteMoments]] = {}

    def single() -> None:
        """Record with the whole model in memory, loading included."""
        moments["single"] = case.record_whole()

    def stream() -> None:
        """Record layer by layer."""
        moments["stream"] = case.record_layerwise()

    timings = alternate({"single": single, "stream": stream}, ROUNDS, now=now)
    yield gpu_row(
        f"stream beside single, loading included, {case.name}",
        ours=case.n_tokens / timings.median("stream"),
        baseline=case.n_tokens / timings.median("single"),
        unit="tokens/s",
        ratios=timings.speedups("stream", "single"),
    )
    is_same = all(_is_same(recorded, moments["stream"][shard]) for shard, recorded in moments["single"].items())
    same_bytes = f"stream and single the same bytes, {case.name}"
    yield gpu_row(same_bytes, ours=float(is_same), unit="yes", target="ours >= 1")
    yield from _overlap_rows(case, timings.median("stream"))


def _is_same(moments: SiteMoments, other: SiteMoments) -> bool:
    """Return whether moments are the same bytes."""
    for key, part in moments.items():
        if not torch.equal(part.mean_D, other[key].mean_D) or not torch.equal(part.m2_D, other[key].m2_D):
            return False
    return True


def _overlap_rows(case: _Case, streamed_s: float) -> Iterator[Row]:
    """Yield how much of the shorter of reading and computing is hidden behind the other, of what can be.

    Before there are layers, sequences are embedded; then nothing can be computed while the first layer is read, nor
    anything read while the last one works.
    """
    embedding_s = _embedding_seconds(case)
    reading_s = SIZES.layers * _layer_reading_seconds(case)
    model = load_model(case.folder)

    def compute() -> None:
        """Record with a model that is in memory already."""
        for sequences in case.shards.values():
            record(model, sequences, batch_tokens=case.batch_tokens)

    computing_s = alternate({"compute": compute}, ROUNDS, now=now).median("compute")
    layer_bytes = sum(parameter.nbytes for parameter in model.get_decoder().layers[0].parameters())
    yield gpu_row(
        f"reading a layer, {case.name}",
        ours=SIZES.layers * layer_bytes / reading_s / 1e9,
        unit="GB/s",
        limit=_pinned_bytes_per_s() / 1e9,
        limit_name="copy from pinned memory",
    )
    yield gpu_row(f"embedding before the first layer, {case.name}", ours=embedding_s, unit="s")

    # All but one layer of the shorter work can go on behind the longer.
    shorter_s, longer_s = sorted((reading_s, computing_s))
    hideable_s = shorter_s * (1 - 1 / SIZES.layers)
    least_s = embedding_s + longer_s + shorter_s - hideable_s

    yield gpu_row(
        f"stream beside the least that reading and computing take together, {case.name}",
        ours=streamed_s,
        baseline=least_s,
        unit="s",
        ratios=[streamed_s / least_s],
    )
    hidden_share = (embedding_s + longer_s + shorter_s - streamed_s) / hideable_s

    yield gpu_row(
        f"share of the shorter of reading and computing that is hidden behind the other, {case.name}",
        ours=hidden_share,
        unit="share",
        target="ours >= 0.8" if shorter_s > longer_s / 2 else "",
        why="what surrounds a layer is as long as its few tokens; with more of them it is hidden",
    )


def _embedding_seconds(case: _Case) -> float:
    """Return the seconds until the first layer can work, without its weights."""

    def embed() -> None:
        """Build the decoder without layers, and embed all sequences."""
        case.layerwise._embed_all(case.layerwise._skeleton(), case.shards, case.batch_tokens, False)

    return alternate({"embed": embed}, ROUNDS, now=now).median("embed")


def _layer_reading_seconds(case: _Case) -> float:
    """Return the seconds of reading one layer onto the device."""
    # The skeleton is built once; it has no weights.
    skeleton = case.layerwise._skeleton()
    reading = {"layer": lambda: case.layerwise._read_layer(skeleton.layers, 1)}
    return alternate(reading, LAYER_ROUNDS, now=now).median("layer")


def _pinned_bytes_per_s() -> float:
    """Return the bytes per second that a copy from pinned memory to the device reaches."""
    pinned = torch.empty(SIZES.copied // 16, dtype=torch.uint8, pin_memory=HAS_GPU)
    on_device = torch.empty_like(pinned, device=DEVICE)
    return pinned.nbytes / median_seconds(lambda: on_device.copy_(pinned, non_blocking=True), 5)
