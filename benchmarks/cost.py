"""python -m benchmarks.cost

A cost model of the pipeline: seconds of each stage from the model's dimensions, the job, and what a machine does in a
second. Its predictions beside measurements of the real functions, in one thread here, at three sizes of Llama in
float32 with random weights; then the same formulas for a Llama-3-70B on GPUs, with the assumptions that stand below.

Seconds measured are of the CPU, all threads together: wall time of an idle machine, whatever else runs on this one.
Starting processes, and Ray, are not counted.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.merge import random_statistics
from benchmarks.shapes import LLAMA_3_70B
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import Moments
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import write_tensors
from seap_ray.models.forward import record
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.records import read_moments, save_moments
from seap_ray.pipeline.calibrate import group_shards
from seap_ray.pipeline.merge import RECORDS_HELD, TaskStatistics, merge_moments
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.planner import Planner, _layer_norms
from seap_ray.pipeline.prune import prepare_checkpoint
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.run import Run

# What is measured; tokens of a batch by hidden size, so that its float64 arrays are FRESH, as those of large models.
LAYERS, HEAD_DIM, VOCABULARY, SEQUENCE, RECORDS, RATIO = 4, 64, 1000, 512, 32, 0.5
TOKENS = {1280: 3584, 2048: 2048, 3072: 1536}
FRESH = 32 << 20  # bytes from which glibc has an array's pages from the kernel each time; it may keep smaller ones'
ARRAYS = (1 << 18, 1 << 23, 1 << 26)  # bytes of arrays in the core's cache, in the socket's, in memory

# The job on GPUs. Once the model was read, it is in the nodes' page caches.
TASKS, SHARDS_A_TASK, SHARD_SEQUENCES, LENGTH, MODELS = 9, 2, 64, 2048, 10  # one of the models without mean bias
STREAM_TOKENS, BATCH_TOKENS, FILE_BYTES = 262144, 4096, 5e9  # the defaults
GPUS_A_NODE, CORES_A_NODE = 8, 16  # a core does what the one here does
GPU_FLOPS, GPU_MEMORY = 0.4 * 989e12, 0.7 * 3.35e12  # H100: 40 % of dense bfloat16, 70 % of its memory's bytes/s
GPU: dict[str, Any] = {"flops": GPU_FLOPS, "attention": GPU_FLOPS, "passes": (GPU_MEMORY,) * 3, "faults": math.inf}
GPU_COPY, DISK_READ, DISK_WRITE = 8e9, 2e9, 1e9  # bytes/s: mapped pages to a GPU; a node's, of shared storage


@dataclass(frozen=True)
class Machine:
    """What one worker, a thread or a GPU, does in a second."""

    flops: float  # FLOP of products of matrices
    attention: float  # FLOP of causal attention, the half that is not masked
    passes: tuple[float, ...]  # bytes that an elementwise pass reads and writes, for each of ARRAYS
    faults: float  # bytes of new pages that the kernel maps and clears
    read: float  # bytes of a safetensors file in the page cache, mapped and read once
    write: float  # bytes of a file that is copied
    hashed: float  # bytes, SHA-256
    gathered: float  # elements picked from columns by their indices
    sorted: float  # elements, float64
    opened: float  # files of one tensor
    listed: float  # tensors in the header of a file that is opened
    got: float  # Moments of one column from an open file
    added: float  # sums of two Moments of one column
    calls: float  # operations of torch on one element

    def over(self, elements: float, moved: float, new: float = 0, itemsize: int = 8) -> float:
        """Seconds of passes that read and write ``moved`` bytes an element, ``new`` of them in arrays just made."""
        size = itemsize * elements
        rate = min(zip(ARRAYS, self.passes, strict=True), key=lambda known: abs(math.log(known[0] / size)))[1]
        return elements * (moved / rate + new / self.faults * (size >= FRESH))

    def in_blocks(self, read: float, moved: float) -> float:
        """Seconds of an element that is read once from memory, and passed over in a cache."""
        return read / self.passes[-1] + moved / self.passes[0]


def this_machine(folder: Path) -> Machine:
    """Rates of one thread here."""
    side, size, (large, small, copy) = 2048, ARRAYS[-1], (folder / name for name in ("large", "small", "copy"))
    x_ND, odd_N = torch.randn(side, side), torch.arange(0, side, 2)
    q, arrays = torch.randn(4, 16, SEQUENCE, HEAD_DIM), [torch.rand(n // 8, dtype=torch.float64) for n in ARRAYS]
    out, one, moments = torch.empty_like(arrays[-1]), torch.ones(1), Moments(1, torch.ones(1), torch.zeros(1))
    save_file({"x": torch.rand(size // 4)}, large)
    save_file({f"layers.{i}.attn.{part}": torch.ones(1) for i in range(80) for part in ("mean", "m2", "count")}, small)
    weights, records = (safe_open(path, "pt").__enter__() for path in (large, small))
    squares = [_best(lambda x: torch.square(x, out=out[: len(x)]), x, calls=1 + size // 64 // len(x)) for x in arrays]
    opening = _best(lambda: safe_open(large, "pt").get_tensor("x"), calls=100)
    listing = _best(lambda: safe_open(small, "pt").get_tensor("layers.0.attn.m2"), calls=100) - opening
    return Machine(
        flops=2 * side**3 / _best(linear, x_ND, x_ND),
        attention=2 * q.numel() * SEQUENCE / _best(lambda: scaled_dot_product_attention(q, q, q, is_causal=True)),
        passes=tuple(2 * n / seconds for n, seconds in zip(ARRAYS, squares, strict=True)),
        faults=size / (_best(torch.square, arrays[-1]) - squares[-1]),
        read=size / _best(lambda: weights.get_tensor("x").sum()),
        write=size / _best(lambda: shutil.copyfile(large, _gone(copy))),
        hashed=size / _best(hashlib.sha256, out.numpy().data),
        gathered=side**2 / 2 / _best(lambda: [of.numpy().take(odd_N.numpy(), axis=1) for of in x_ND.split(128)]),
        sorted=len(arrays[0]) / _best(lambda: arrays[0].sort(stable=True)),
        opened=1 / opening,
        listed=239 / listing,
        got=1 / _best(read_moments, records, (7, "attn"), calls=100),
        added=1 / _best(Moments.__add__, moments, moments, calls=100),
        calls=1 / _best(torch.add, one, one, calls=1000),
    )


def _best(work: Callable[..., Any], *of: Any, rounds: int = 5, calls: int = 1) -> float:
    """Seconds of a call, in the fastest of some rounds."""
    ends = [time.process_time()]
    for _ in range(rounds):
        for _ in range(calls):
            work(*of)
        ends.append(time.process_time())
    return min(after - before for before, after in pairwise(ends)) / calls


def _gone(path: Any) -> Any:
    path.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Model:
    """A Llama by its dimensions."""

    of: Architecture
    vocabulary: int
    b: int  # bytes of a weight

    def dimensions(self) -> tuple[int, int, int, int]:
        """L layers, H hidden size, A columns of ``o_proj``, I of ``down_proj``."""
        return self.of.n_layers, self.of.hidden_size, *self.of.widths

    def record_bytes(self) -> int:
        """Mean and squares of every column, and of each layer's cosine, float64."""
        return 16 * self.of.n_layers * (sum(self.of.widths) + 1)

    def n_bytes(self, *, kept: float = 1, embeddings: int = 2) -> float:
        return self.b * (kept * self.of.decoder_parameters + embeddings * self.vocabulary * self.of.hidden_size)


def forward(model: Model, machine: Machine, sequence: int, batch: int) -> float:
    """Seconds of a token: 2 FLOP a weight; 2 A n of a layer's attention over n tokens, half of 4 as it is causal; and
    elementwise passes, in bytes: a norm 28, and 8 to convert; a residual sum 3 b, the gate 5 b, the rotary embedding of
    queries and keys 10 b (two products, a turn in two steps, a sum). Each writes a new array.
    """
    (layers, hidden, attn, mlp), b = model.dimensions(), model.b
    turned, of_hidden = attn + model.of.dense.groups * model.of.head_dim, 2 * (28 + 8 * (b < 4) + 3 * b)
    passes = ((hidden, of_hidden, 8 * b), (turned, 10 * b, 5 * b), (mlp, 5 * b, 4 * b))  # columns; bytes moved, and new
    elementwise = sum(machine.over(batch * width, moved, new, itemsize=b) for width, moved, new in passes)
    of_layer = 2 * attn * sequence / machine.attention + elementwise / batch
    return 2 * model.of.decoder_parameters / machine.flops + layers * of_layer


def statistics(model: Model, machine: Machine, batch: int) -> float:
    """Seconds of a token: ``Moments.of`` both sites, and a layer's cosine, in bytes of a column. A site, read (b), then
    in blocks: made float64 (8), less the mean (16), squared (16), two sums (8 each). A cosine, of two that are read
    (2 b): made float64 (16), two norms (8 each), a product (24), its sum (8).
    """
    layers, hidden, *widths = model.dimensions()
    of_sites, of_cosine = machine.in_blocks(model.b, 56), machine.in_blocks(2 * model.b, 64)
    return layers * (sum(widths) * of_sites + hidden * of_cosine)


def reading(model: Model, machine: Machine) -> float:
    """Seconds of ``LayerwiseModel`` reading all but the head: from mapped pages to new arrays."""
    matrix = model.of.hidden_size * model.of.dense.channels
    writing = machine.over(matrix, model.b, model.b, itemsize=model.b) / matrix / model.b
    return model.n_bytes(embeddings=1) * (1 / machine.read + writing)


def merging(model: Model, machine: Machine, records: int) -> float:
    """Seconds of ``merge_moments``: a record opened once a group of keys, and added: 144 bytes a column in seven
    operations, of which both operands and the result, 48, lie in memory; the sum hashed and written.
    """
    layers, _, *widths = model.dimensions()
    groups = -(-(records.bit_length() + 2) // RECORDS_HELD)
    getting = groups * (1 / machine.opened + 9 * layers / machine.listed) + 3 * layers / machine.got
    adding = 3 / machine.added + sum(machine.over(width, 96) + width * 48 / machine.passes[-1] for width in widths)
    saving = model.record_bytes() * (1 / machine.hashed + 1 / machine.write)
    return records * getting + (records - 1) * layers * adding + saving


def norms(model: Model, machine: Machine) -> float:
    """Seconds of ``Norms.of``, in bytes of a weight: read (b), float64 (8), size and square (16 each), two sums (8)."""
    layers, hidden, *widths = model.dimensions()
    return layers * hidden * sum(widths) * machine.in_blocks(model.b, 56)


def planning(model: Model, machine: Machine) -> float:
    """Seconds of a plan: of a layer the channels sorted, the kept half again, and groups, 20 calls' time each."""
    layers, dense = model.of.n_layers, model.of.dense
    return layers * (1.5 * dense.channels / machine.sorted + 20 * dense.groups / machine.calls)


def compaction(model: Model, machine: Machine, ratio: float, *, repaired: bool) -> float:
    """Seconds of ``write_tensors``, one model: kept rows copied, kept columns gathered, all hashed and written.
    A mean bias is of the cut columns: gathered, made float64 (b + 8), and multiplied (8).
    """
    (layers, hidden, attn, mlp), b = model.dimensions(), model.b
    columns = layers * hidden * (attn + mlp)
    repairing = 1 / machine.gathered + machine.in_blocks(0, b + 16)
    kept = (model.of.decoder_parameters - columns) * machine.in_blocks(b, b) + columns / machine.gathered
    storing = model.n_bytes(kept=1 - ratio) * (1 / machine.hashed + 1 / machine.write)
    return (1 - ratio) * kept + ratio * columns * repairing * repaired + storing


def compared(hidden: int, machine: Machine, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, and bytes: predicted, measured, and the one by the other."""
    tokens, sizes = TOKENS[hidden], {"hidden_size": hidden, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    sizes |= {"intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // HEAD_DIM}
    loaded = LlamaForCausalLM(LlamaConfig.from_dict(sizes)).eval()
    loaded.save_pretrained(folder / "base")
    checkpoint = Checkpoint.open(str(folder / "base"))
    model = Model(of := checkpoint.architecture, VOCABULARY, b=4)
    settings = {"run": {"name": "run", "storage": str(folder)}, "model": {"source": checkpoint.source.name}}
    config = Config.model_validate({**settings, "tasks": ["sort"], "pruning": {"ratio": RATIO}})
    run = Run.of(config)
    records = ShardRecords(Calibration("", "", skip_first_token=False, batch_tokens=tokens), run, of)
    shards = [Shard("sort", str(i), 1, 1000, str(i)) for i in range(RECORDS)]
    for shard in shards:
        save_moments(records.path(shard), random_statistics(of, seed=int(shard.shard)))
    sequences = torch.randint(VOCABULARY, (tokens // SEQUENCE, SEQUENCE)).tolist()
    streamed = LayerwiseModel(checkpoint, torch.float32, torch.device("cpu"), room=1 << 40)
    found_norms = {(i, site): one for i in range(LAYERS) for site, one in _layer_norms(checkpoint, i).items()}
    planner = Planner(config, checkpoint, {"sort": random_statistics(of, seed=0)}, found_norms, {"sort": ""}, {}, run)
    expert, written, merged = model_specs(config)[1], folder / "expert.safetensors", run.statistics("sort")
    cut = prepare_checkpoint(planner, run, expert, planner.plan(expert, RATIO))
    loading, cutting = reading(model, machine), compaction(model, machine, RATIO, repaired=True)
    computing = tokens * (forward(model, machine, SEQUENCE, tokens) + statistics(model, machine, tokens))
    stages: dict[str, tuple[float, Callable[[], Any]]] = {
        "single": (computing, lambda: record(loaded, sequences, batch_tokens=tokens)),
        "stream": (computing + loading, lambda: [*streamed.record({"": sequences}, batch_tokens=tokens)]),
        "merge": (
            merging(model, machine, RECORDS),
            lambda: merge_moments(TaskStatistics(records, shards, _gone(merged))),
        ),
        "norms": (norms(model, machine), lambda: [_layer_norms(checkpoint, layer) for layer in range(LAYERS)]),
        "plan": (planning(model, machine), lambda: planner.plan(expert, RATIO)),
        "compaction": (cutting, lambda: write_tensors(cut.compaction, cut.files["model.safetensors"], _gone(written))),
    }
    found = {stage: (guess, _best(work, rounds=1 if guess > 3 else 5)) for stage, (guess, work) in stages.items()}
    found["bytes of a record"] = model.record_bytes(), records.path(shards[0]).stat().st_size
    found["bytes of an expert"] = model.n_bytes(kept=1 - RATIO), written.stat().st_size
    return {what: {"predicted": one, "measured": two, "ratio": one / two} for what, (one, two) in found.items()}


def on_gpus(model: Model, here: Machine, gpus: int) -> dict[str, Any]:
    """Seconds of each stage of the job, the longest one, and what they consist of."""
    nodes, gpu = -(-gpus // GPUS_A_NODE), replace(here, **GPU)
    cores, written = nodes * CORES_A_NODE, MODELS * model.n_bytes(kept=1 - RATIO)
    shards = [Shard("", "", SHARD_SEQUENCES, SHARD_SEQUENCES * LENGTH, "")] * (TASKS * SHARDS_A_TASK)
    groups = group_shards(shards, STREAM_TOKENS, workers := min(gpus, len(shards)))
    rounds, tokens = -(-len(groups) // workers), max(map(len, groups)) * SHARD_SEQUENCES * LENGTH
    computing = tokens * forward(model, gpu, LENGTH, BATCH_TOKENS)
    recording = tokens * statistics(model, gpu, BATCH_TOKENS)
    reads = [model.n_bytes(embeddings=1) / rate for rate in (DISK_READ, *[GPU_COPY] * (rounds - 1))]
    writers = min(cores, MODELS * math.ceil(written / MODELS / FILE_BYTES))
    cutting = sum(compaction(model, here, RATIO, repaired=i > 0) for i in range(MODELS)) / writers
    seconds = {
        "calibration": rounds * (computing + recording) + sum(reads),  # one CUDA stream copies and computes
        "merge": -(-TASKS // cores) * merging(model, here, SHARDS_A_TASK),
        "norms": -(-model.of.n_layers // cores) * norms(model, here) / model.of.n_layers,
        "plans": MODELS * planning(model, here),
        "compaction": max(cutting, written / nodes / DISK_WRITE),
    }
    parts = {
        "calibration: workers, passes of each": [workers, rounds],
        "calibration: forward": rounds * computing,
        "calibration: statistics": rounds * recording,
        "calibration: reading": sum(reads),
        "calibration, if it read meanwhile": sum(max(computing + recording, read) for read in reads),
        "compaction: cores": cutting,
    }
    return {"longest": max(seconds, key=lambda stage: seconds[stage])} | seconds | parts


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        machine = this_machine(Path(folder))
    found: dict[str, Any] = {"machine": asdict(machine)}
    for hidden in TOKENS:
        with tempfile.TemporaryDirectory() as folder:
            found[f"hidden size {hidden}"] = compared(hidden, machine, Path(folder))
    model = Model(Architecture.of(LLAMA_3_70B.to_dict()), LLAMA_3_70B.vocab_size, 2)
    found |= {f"70B, GPUs: {gpus}": on_gpus(model, machine, gpus) for gpus in (1, 8, 64)}
    print(json.dumps(json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.3g}")), indent=2))


if __name__ == "__main__":
    main()
