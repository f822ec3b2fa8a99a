"""python -m benchmarks.cost

A cost model of the pipeline: seconds of each stage from the model's dimensions, the job, and what a machine does in a
second. Its predictions beside measurements of the real functions, in one thread here, at three sizes of Llama in
float32 with random weights; then the same formulas for a Llama-3-70B on GPUs, with the assumptions that stand below.
Bytes and FLOP are by the formulas of ``seap_ray.pipeline.needs``, which the doctor prints.

Seconds measured are of the CPU, all threads together: wall time of an idle machine, whatever else runs on this one.
Starting processes, and Ray, are not counted.
"""

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
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.merge import random_statistics
from benchmarks.plan import FIXED_SETTINGS
from benchmarks.shapes import LLAMA_3_70B
from seap_ray.config import Config
from seap_ray.core.moments import Moments
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import write_tensors
from seap_ray.models.forward import record
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.records import read_moments, save_moments
from seap_ray.pipeline.calibrate import group_shards
from seap_ray.pipeline.checkpoint_writer import prepare_checkpoint
from seap_ray.pipeline.merge import RECORDS_HELD, TaskStatistics, merge_moments
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.needs import H100, ModelSize, moments_bytes, token_flops
from seap_ray.pipeline.plan_choice import PlanChooser
from seap_ray.pipeline.planner import Planner, _layer_norms
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import progress
from seap_ray.storage.run import Run

# What is measured: layers, head size, vocabulary, tokens of a sequence, records to merge, ratio of the cut.
LAYERS = 4
HEAD_DIM = 64
VOCABULARY = 1000
SEQUENCE = 512
RECORDS = 32
RATIO = 0.5
BATCH_TOKENS_BY_HIDDEN_SIZE = {1280: 3584, 2048: 2048, 3072: 1536}
"""So many that a batch's float64 arrays are in fresh pages, as those of large models are."""
FRESH_PAGES_BYTES = 32 << 20
"""Size from which glibc has an array's pages from the kernel each time; it may keep those of smaller ones."""
ARRAY_BYTES = (1 << 18, 1 << 23, 1 << 26)
"""Sizes of arrays in the core's cache, in the socket's, in memory."""
SLOW_SECONDS = 3
"""A stage that takes longer is measured once."""

# The job on GPUs. Once the model was read, it is in the nodes' page caches.
TASKS = 9
SHARDS_PER_TASK = 2
SHARD_SEQUENCES = 64
LONG_SEQUENCE = 2048
MODELS = 10
"""One of them without mean bias."""
STREAM_TOKENS = 262144
BATCH_TOKENS = 4096
FILE_BYTES = 5e9
GPUS_PER_NODE = 8
CORES_PER_NODE = 16
"""A core does what the one here does."""
GPU_MEMORY_RATE = 0.7 * 3.35e12
"""Bytes that an H100 reads and writes in a second: 70 % of its memory's."""
GPU_COPY_RATE = 8e9
"""Bytes from mapped pages to a GPU in a second."""
GPU_RATES: dict[str, Any] = {
    "flops": H100.flop_per_s,
    "attention": H100.flop_per_s,
    "passes": (GPU_MEMORY_RATE,) * len(ARRAY_BYTES),
    "faults": math.inf,
}


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What one worker, a thread or a GPU, does in a second."""

    flops: float
    """FLOP of products of matrices."""
    attention: float
    """FLOP of causal attention, the half that is not masked."""
    passes: tuple[float, ...]
    """Bytes that an elementwise pass reads and writes, for each of ``ARRAY_BYTES``."""
    faults: float
    """Bytes of new pages that the kernel maps and clears."""
    read: float
    """Bytes of a safetensors file in the page cache, mapped and read once."""
    write: float
    """Bytes of a file that is copied."""
    hashed: float
    """Bytes, BLAKE3."""
    gathered: float
    """Elements picked from columns by their indices."""
    sorted: float
    """Elements, float64."""
    opened: float
    """Files of one tensor."""
    listed: float
    """Tensors in the header of a file that is opened."""
    got: float
    """Moments of one column from an open file."""
    added: float
    """Sums of two Moments of one column."""
    calls: float
    """Operations of torch on one element."""

    def over(self, elements: float, moved: float, new: float = 0, itemsize: float = 8) -> float:
        """Return the seconds of passes that move ``moved`` bytes an element, ``new`` of them in arrays just made."""
        n_bytes = itemsize * elements
        # The measured size that is nearest to this one, as a ratio.
        nearest = min(range(len(ARRAY_BYTES)), key=lambda i: abs(math.log(ARRAY_BYTES[i] / n_bytes)))
        faulting = new / self.faults if n_bytes >= FRESH_PAGES_BYTES else 0
        return elements * (moved / self.passes[nearest] + faulting)

    def in_blocks(self, read: float, moved: float) -> float:
        """Return the seconds of an element that is read once from memory, and passed over in a cache."""
        return read / self.passes[-1] + moved / self.passes[0]


def measure_machine(folder: Path) -> Machine:
    """Measure one thread here; files lie in ``folder``."""
    side = 2048
    size = ARRAY_BYTES[-1]
    x_ND = torch.randn(side, side)
    odd = torch.arange(0, side, 2).numpy()
    blocks = [block_ND.numpy() for block_ND in x_ND.split(128)]
    q_BHTD = torch.randn(4, 16, SEQUENCE, HEAD_DIM)
    arrays = [torch.rand(n // 8, dtype=torch.float64) for n in ARRAY_BYTES]
    out = torch.empty_like(arrays[-1])
    scalar = torch.ones(1)
    moments = Moments(1, torch.ones(1), torch.zeros(1))

    large = folder / "large"
    small = folder / "small"
    copy = folder / "copy"
    save_file({"x": torch.rand(size // 4)}, large)
    names = [f"layers.{i}.attn.{part}" for i in range(80) for part in ("mean", "m2", "count")]
    save_file({name: torch.ones(1) for name in names}, small)
    weights, records = (safe_open(path, "pt").__enter__() for path in (large, small))

    # Small arrays are squared more often, so that every measurement takes some milliseconds.
    squares = [_best(lambda x: torch.square(x, out=out[: len(x)]), x, calls=1 + size // 64 // len(x)) for x in arrays]
    opening = _best(lambda: safe_open(large, "pt").get_tensor("x"), calls=100)
    listing = _best(lambda: safe_open(small, "pt").get_tensor("layers.0.attn.m2"), calls=100) - opening

    return Machine(
        flops=2 * side**3 / _best(linear, x_ND, x_ND),
        attention=2
        * q_BHTD.numel()
        * SEQUENCE
        / _best(lambda: scaled_dot_product_attention(q_BHTD, q_BHTD, q_BHTD, is_causal=True)),
        passes=tuple(2 * n / seconds for n, seconds in zip(ARRAY_BYTES, squares, strict=True)),
        faults=size / (_best(torch.square, arrays[-1]) - squares[-1]),
        read=size / _best(lambda: weights.get_tensor("x").sum()),
        write=size / _best(lambda: shutil.copyfile(large, _without(copy))),
        hashed=size / _best(blake3, out.numpy().data),
        gathered=side**2 / 2 / _best(lambda: [block.take(odd, axis=1) for block in blocks]),
        sorted=len(arrays[0]) / _best(lambda: arrays[0].sort(stable=True)),
        opened=1 / opening,
        listed=(len(names) - 1) / listing,
        got=1 / _best(read_moments, records, (7, "attn"), calls=100),
        added=1 / _best(Moments.__add__, moments, moments, calls=100),
        calls=1 / _best(torch.add, scalar, scalar, calls=1000),
    )


def _best(work: Callable[..., Any], *arguments: Any, rounds: int = 5, calls: int = 1) -> float:
    """Return the seconds of a call, in the fastest of some rounds."""
    ends = [time.process_time()]
    for _ in range(rounds):
        for _ in range(calls):
            work(*arguments)
        ends.append(time.process_time())
    return min(after - before for before, after in pairwise(ends)) / calls


def _without(path: Any) -> Any:
    """Remove a file, so that it is made anew, and return its path."""
    path.unlink(missing_ok=True)
    return path


# --- the stages ------------------------------------------------------------------------------------------------------
# L layers, H hidden size, A columns of o_proj, I of down_proj, b bytes of a weight.


def pruned_bytes(model: ModelSize, ratio: float) -> float:
    """Return the bytes of a model without a share of its decoder layers."""
    return model.item_bytes * (model.parameters - ratio * model.architecture.decoder_parameters)


def streamed_bytes(model: ModelSize) -> float:
    """Return the bytes of all weights but the head."""
    return model.n_bytes - model.item_bytes * model.outer_parameters / 2


def forward_seconds(model: ModelSize, machine: Machine, sequence: int, batch: int) -> float:
    """Return the seconds of a token: products, attention, and elementwise passes, each of which writes a new array.

    Passes in bytes: a norm 28, and 8 to convert; a residual sum 3 b, the gate 5 b, the rotary embedding of queries and
    keys 10 b (two products, a turn in two steps, a sum).
    """
    architecture = model.architecture
    b = model.item_bytes
    attn, mlp = architecture.widths
    turned = attn + architecture.dense.groups * architecture.head_dim
    norm_and_sum = 2 * (28 + 8 * (b < 4) + 3 * b)
    elementwise = (
        machine.over(batch * architecture.hidden_size, norm_and_sum, 8 * b, itemsize=b)
        + machine.over(batch * turned, 10 * b, 5 * b, itemsize=b)
        + machine.over(batch * mlp, 5 * b, 4 * b, itemsize=b)
    )
    flops = token_flops(architecture, sequence)
    layers = architecture.n_layers * elementwise / batch
    return flops.products / machine.flops + flops.attention / machine.attention + layers


def statistics_seconds(model: ModelSize, machine: Machine) -> float:
    """Return the seconds of a token: ``Moments.of`` both sites, and a layer's cosine.

    In bytes of a column. A site, read (b), then in blocks: made float64 (8), less the mean (16), squared (16), two sums
    (8 each). A cosine, of two that are read (2 b): made float64 (16), two norms (8 each), a product (24), its sum (8).
    """
    architecture = model.architecture
    sites = sum(architecture.widths) * machine.in_blocks(model.item_bytes, 56)
    cosine = architecture.hidden_size * machine.in_blocks(2 * model.item_bytes, 64)
    return architecture.n_layers * (sites + cosine)


def reading_seconds(model: ModelSize, machine: Machine) -> float:
    """Return the seconds of ``LayerwiseModel`` reading all but the head: from mapped pages to new arrays."""
    b = model.item_bytes
    matrix = model.architecture.hidden_size * model.architecture.dense.channels
    writing = machine.over(matrix, b, b, itemsize=b) / matrix / b
    return streamed_bytes(model) * (1 / machine.read + writing)


def merging_seconds(model: ModelSize, machine: Machine, records: int) -> float:
    """Return the seconds of ``merge_moments``: a record opened once a group of keys, and added; the sum is written.

    An addition takes 144 bytes a column in seven operations, of which both operands and the result, 48, lie in memory.
    """
    n_layers = model.architecture.n_layers
    groups = -(-(records.bit_length() + 2) // RECORDS_HELD)
    getting = groups * (1 / machine.opened + 9 * n_layers / machine.listed) + 3 * n_layers / machine.got
    adding = 3 / machine.added
    for width in model.architecture.widths:
        adding += machine.over(width, 96) + width * 48 / machine.passes[-1]
    saving = moments_bytes(model.architecture) * (1 / machine.hashed + 1 / machine.write)
    return records * getting + (records - 1) * n_layers * adding + saving


def norms_seconds(model: ModelSize, machine: Machine) -> float:
    """Return the seconds of ``Norms.of``.

    In bytes of a weight: read (b), float64 (8), size and square (16 each), two sums (8).
    """
    architecture = model.architecture
    weights = architecture.n_layers * architecture.hidden_size * sum(architecture.widths)
    return weights * machine.in_blocks(model.item_bytes, 56)


def planning_seconds(model: ModelSize, machine: Machine) -> float:
    """Return the seconds of a plan: a layer's channels sorted, the kept half again, and groups, 20 calls' time each."""
    dense = model.architecture.dense
    return model.architecture.n_layers * (1.5 * dense.channels / machine.sorted + 20 * dense.groups / machine.calls)


def export_seconds(model: ModelSize, machine: Machine, ratio: float, *, repaired: bool) -> float:
    """Return the seconds of ``write_tensors``, one model: kept rows copied, kept columns gathered, all hashed, written.

    A mean bias is of the cut columns: gathered, made float64 (b + 8), and multiplied (8).
    """
    architecture = model.architecture
    b = model.item_bytes
    columns = architecture.n_layers * architecture.hidden_size * sum(architecture.widths)
    rows = architecture.decoder_parameters - columns
    kept = rows * machine.in_blocks(b, b) + columns / machine.gathered
    repairing = columns * (1 / machine.gathered + machine.in_blocks(0, b + 16)) if repaired else 0
    storing = pruned_bytes(model, ratio) * (1 / machine.hashed + 1 / machine.write)
    return (1 - ratio) * kept + ratio * repairing + storing


# --- measured here ---------------------------------------------------------------------------------------------------


def compare(hidden_size: int, machine: Machine, folder: Path) -> dict[str, Any]:
    """Return seconds of each stage, and bytes: predicted, measured, and the one by the other."""
    checkpoint = _save_model(hidden_size, folder / "base")
    model = ModelSize.from_checkpoint(checkpoint)
    architecture = checkpoint.architecture
    n_tokens = BATCH_TOKENS_BY_HIDDEN_SIZE[hidden_size]
    settings = {"run": {"name": "run", "storage": str(folder)}, "model": {"source": checkpoint.source.name}}
    config = Config.model_validate({**settings, "tasks": ["sort"], "pruning": {"ratio": RATIO, **FIXED_SETTINGS}})
    run = Run.of(config)

    records = ShardRecords(Calibration("", "", skip_first_token=False, batch_tokens=n_tokens), run, architecture)
    shards = [Shard("sort", str(i), 1, 1000, str(i)) for i in range(RECORDS)]
    for shard in shards:
        save_moments(records.path(shard), random_statistics(architecture, seed=int(shard.shard)))

    loaded = LlamaForCausalLM.from_pretrained(checkpoint.folder).eval()
    streamed = LayerwiseModel(checkpoint, torch.float32, torch.device("cpu"), memory_budget=1 << 40)
    sequences = torch.randint(VOCABULARY, (n_tokens // SEQUENCE, SEQUENCE)).tolist()
    planner = _planner(config, checkpoint, run)
    spec = model_specs(config)[1]
    pending = prepare_checkpoint(PlanChooser(planner, progress).plan_model(spec, RATIO), config.export, run)
    # What is the base's is in a file of its own in a run; here all of it is written.
    tensors = [tensor for file in pending.files.values() for tensor in file]
    written = folder / "expert.safetensors"
    merged = run.statistics("sort")

    computing = n_tokens * (forward_seconds(model, machine, SEQUENCE, n_tokens) + statistics_seconds(model, machine))
    stages: dict[str, tuple[float, Callable[[], Any]]] = {
        "single": (computing, lambda: record(loaded, sequences, batch_tokens=n_tokens)),
        "stream": (
            computing + reading_seconds(model, machine),
            lambda: [*streamed.record({"": sequences}, batch_tokens=n_tokens)],
        ),
        "merge": (
            merging_seconds(model, machine, RECORDS),
            lambda: merge_moments(TaskStatistics(records, shards, _without(merged))),
        ),
        "norms": (
            norms_seconds(model, machine),
            lambda: [_layer_norms(checkpoint, layer) for layer in range(LAYERS)],
        ),
        "plan": (planning_seconds(model, machine), lambda: planner.plan(spec, RATIO)),
        "writing": (
            export_seconds(model, machine, RATIO, repaired=True),
            lambda: write_tensors(pending.export, tensors, _without(written)),
        ),
    }
    compared = {}
    for stage, (predicted, work) in stages.items():
        compared[stage] = _compared(predicted, _best(work, rounds=1 if predicted > SLOW_SECONDS else 5))
    compared["bytes of a record"] = _compared(moments_bytes(architecture), records.path(shards[0]).stat().st_size)
    compared["bytes of an expert"] = _compared(pruned_bytes(model, RATIO), written.stat().st_size)
    return compared


def _save_model(hidden_size: int, folder: Path) -> Checkpoint:
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=hidden_size * 11 // 4,
        num_attention_heads=hidden_size // HEAD_DIM,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(str(folder))


def _planner(config: Config, checkpoint: Checkpoint, run: Run) -> Planner:
    """Return a planner of random statistics."""
    norms = {}
    for layer in range(LAYERS):
        for site, norms_of_site in _layer_norms(checkpoint, layer).items():
            norms[layer, site] = norms_of_site
    statistics = {"sort": random_statistics(checkpoint.architecture, seed=0)}
    return Planner(config, checkpoint, statistics, norms, {"sort": ""}, {}, run, held_out={})


def _compared(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


# --- on GPUs ---------------------------------------------------------------------------------------------------------


def predict_on_gpus(model: ModelSize, core: Machine, gpus: int) -> dict[str, Any]:
    """Return the seconds of each stage of the job, the longest one, and what they consist of."""
    gpu = replace(core, **GPU_RATES)
    nodes = -(-gpus // GPUS_PER_NODE)
    cores = nodes * CORES_PER_NODE

    shards = [Shard("", "", SHARD_SEQUENCES, SHARD_SEQUENCES * LONG_SEQUENCE, "")] * (TASKS * SHARDS_PER_TASK)
    workers = min(gpus, len(shards))
    groups = group_shards(shards, STREAM_TOKENS, workers)
    rounds = -(-len(groups) // workers)
    n_tokens = max(map(len, groups)) * SHARD_SEQUENCES * LONG_SEQUENCE
    computing = n_tokens * forward_seconds(model, gpu, LONG_SEQUENCE, BATCH_TOKENS)
    recording = n_tokens * statistics_seconds(model, gpu)
    # The first pass reads from shared storage, the others from the page cache.
    reads = [streamed_bytes(model) / rate for rate in (H100.read_bytes_per_s, *[GPU_COPY_RATE] * (rounds - 1))]

    written = MODELS * pruned_bytes(model, RATIO)
    writers = min(cores, MODELS * math.ceil(written / MODELS / FILE_BYTES))
    cutting = sum(export_seconds(model, core, RATIO, repaired=i > 0) for i in range(MODELS)) / writers
    n_layers = model.architecture.n_layers
    seconds = {
        "calibration": rounds * (computing + recording) + sum(reads),  # one CUDA stream copies and computes
        "merge": -(-TASKS // cores) * merging_seconds(model, core, SHARDS_PER_TASK),
        "norms": -(-n_layers // cores) * norms_seconds(model, core) / n_layers,
        "plans": MODELS * planning_seconds(model, core),
        "writing": max(cutting, written / nodes / H100.write_bytes_per_s),
    }
    parts = {
        "calibration: workers, passes of each": [workers, rounds],
        "calibration: forward": rounds * computing,
        "calibration: statistics": rounds * recording,
        "calibration: reading": sum(reads),
        "calibration, if it read meanwhile": sum(max(computing + recording, read) for read in reads),
        "writing: cores": cutting,
    }
    return {"longest": max(seconds, key=lambda stage: seconds[stage])} | seconds | parts


def main() -> None:
    """Print all predictions and measurements as JSON, numbers in three digits."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        machine = measure_machine(Path(folder))
    report: dict[str, Any] = {"machine": asdict(machine)}
    for hidden_size in BATCH_TOKENS_BY_HIDDEN_SIZE:
        with tempfile.TemporaryDirectory() as folder:
            report[f"hidden size {hidden_size}"] = compare(hidden_size, machine, Path(folder))

    model = ModelSize.from_config({**LLAMA_3_70B.to_dict(), "dtype": "bfloat16"})
    for gpus in (1, 8, 64):
        report[f"70B, GPUs: {gpus}"] = predict_on_gpus(model, machine, gpus)
    # Numbers go through their text, which json can parse with a rounding of ours.
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.3g}"))
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
