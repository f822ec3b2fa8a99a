"""Stream: a checkpoint read layer by layer beside the whole model, and how much of the reading is hidden.

Letters: B sequences, T tokens of each.
"""

import copy
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.device import (
    DEVICE,
    DTYPE,
    HAS_GPU,
    SIZES,
    Ceilings,
    built,
    emptied,
    loaded,
    now,
    random_sequences,
    row,
    seconds_of,
)
from benchmarks.measure import Row, alternate
from seap_ray.models.batching import Sequences
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import record
from seap_ray.models.layerwise import LayerwiseModel


def stream_rows(_of: Ceilings) -> Iterator[Row]:
    """A checkpoint on disk, read layer by layer beside loaded as a whole; statistics of both to the byte."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    B, T = SIZES.batches[0]
    with TemporaryDirectory() as folder:
        built(config).save_pretrained(folder)
        emptied()
        checkpoint = Checkpoint.open(folder)
        layerwise = LayerwiseModel(checkpoint, DTYPE, DEVICE, 1 << 34)
        for n_shards in (1, 8):
            shards = {f"{i}": random_sequences(config, [T] * B) for i in range(n_shards)}
            tokens, of = B * T * n_shards, f"{SIZES.layers} layers of {name}, {B * T * n_shards} tokens"
            yield from _stream_rows(of, layerwise, folder, shards, tokens)


def _stream_rows(
    name: str, layerwise: LayerwiseModel, folder: str, shards: dict[str, Sequences], tokens: int
) -> Iterator[Row]:
    B, T = SIZES.batches[0]
    kept: dict[str, Any] = {}

    def single() -> None:
        model = loaded(folder)
        kept["single"] = {shard: record(model, of, batch_tokens=B * T) for shard, of in shards.items()}

    def stream() -> None:
        kept["stream"] = {shard: {} for shard in shards}
        for shard, recorded in layerwise.record(shards, batch_tokens=B * T):
            kept["stream"][shard] |= recorded

    found = alternate({"single": single, "stream": stream}, 3, now=now)
    yield row(
        f"stream beside single, loading included, {name}",
        ours=tokens / found.median("stream"),
        baseline=tokens / found.median("single"),
        unit="tokens/s",
        ratios=found.speedups("stream", "single"),
    )
    is_equal = all(
        torch.equal(getattr(moments, part), getattr(kept["stream"][shard][key], part))
        for shard, recorded in kept["single"].items()
        for key, moments in recorded.items()
        for part in ("mean_D", "m2_D")
    )
    yield row(f"stream and single the same bytes, {name}", ours=float(is_equal), unit="yes", target="ours >= 1")
    yield from _overlap_rows(name, layerwise, folder, shards, found.median("stream"))


def _overlap_rows(
    name: str, layerwise: LayerwiseModel, folder: str, shards: dict[str, Sequences], streamed: float
) -> Iterator[Row]:
    """How much of the shorter of reading and computing is hidden behind the other, of what can be.

    Before there are layers, sequences are embedded; then nothing can be computed while the first layer is read, nor
    anything read while the last one works.
    """
    B, T = SIZES.batches[0]
    skeleton = layerwise._skeleton()
    before = {"embed": lambda: layerwise._embed_all(layerwise._skeleton(), shards, B * T, False)}
    embedding = alternate(before, 3, now=now).median("embed")
    reading = SIZES.layers * alternate({"one": lambda: layerwise._read_layer(skeleton.layers, 1)}, 5, now=now).median(
        "one"
    )
    model = loaded(folder)
    whole = alternate({"all": lambda: [record(model, of, batch_tokens=B * T) for of in shards.values()]}, 3, now=now)
    computing = whole.median("all")
    n_bytes = sum(parameter.nbytes for parameter in model.get_decoder().layers[0].parameters())
    yield row(
        f"reading a layer, {name}",
        ours=SIZES.layers * n_bytes / reading / 1e9,
        unit="GB/s",
        limit=_pinned_bytes_per_s() / 1e9,
        limit_name="copy from pinned memory",
    )
    yield row(f"embedding before the first layer, {name}", ours=embedding, unit="s")
    longer, shorter = sorted((reading, computing), reverse=True)
    hideable = shorter * (1 - 1 / SIZES.layers)
    least = embedding + longer + shorter - hideable
    yield row(
        f"stream beside the least that reading and computing take together, {name}",
        ours=streamed,
        baseline=least,
        unit="s",
        ratios=[streamed / least],
    )
    hidden = (embedding + longer + shorter - streamed) / hideable
    named = f"share of the shorter of reading and computing that is hidden behind the other, {name}"
    yield row(
        named,
        ours=hidden,
        unit="share",
        target="ours >= 0.8" if shorter > longer / 2 else "",
        why="what surrounds a layer is as long as its few tokens; with more of them it is hidden",
    )


def _pinned_bytes_per_s() -> float:
    pinned = torch.empty(SIZES.copied // 16, dtype=torch.uint8, pin_memory=HAS_GPU)
    there = torch.empty_like(pinned, device=DEVICE)
    return pinned.nbytes / seconds_of(lambda: there.copy_(pinned, non_blocking=True), 5)
