"""python -m benchmarks.cost

A cost model of the pipeline: seconds of each stage from the model's dimensions, the job, and what a machine does in a
second. Its predictions beside measurements of the real functions, in one thread here, at three sizes of Llama in
float32 with random weights; then the same formulas for Llamas 3 of 8B and 70B on GPUs, with the assumptions that stand
below. ``benchmarks.raylets`` has its prediction of calibration beside the job's own pipeline on a cluster.
Bytes and FLOP are by the formulas of ``seap_ray.pipeline.needs``, which the doctor prints.

Seconds measured are of the CPU, all threads together: wall time of an idle machine, whatever else runs on this one.
Starting processes, and Ray, are not counted.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.machine import ARRAY_BYTES, HEAD_DIM, SEQUENCE, Machine, measure_machine, usual_seconds, without
from benchmarks.merge import random_statistics
from benchmarks.plan import FIXED_SETTINGS
from benchmarks.shapes import LLAMA_3_8B, LLAMA_3_70B
from seap_ray.config import Config
from seap_ray.core.moments import Covariance
from seap_ray.core.reconstruction import least_squares
from seap_ray.judges.scoring import Continuation, score
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.cut_costs import PASSES_BY_SITE, measure_cut_costs
from seap_ray.models.export import write_tensors
from seap_ray.models.forward import OpenedLayers, record
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.records import save_moments
from seap_ray.pipeline.calibrate import group_shards
from seap_ray.pipeline.checkpoint_writer import prepare_checkpoint
from seap_ray.pipeline.merge import RECORDS_HELD, TaskStatistics, merge_moments
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.needs import (
    H100,
    ModelSize,
    covariance_files_bytes,
    moments_bytes,
    token_flops,
)
from seap_ray.pipeline.plan_choice import PlanChooser, passes_of_choice
from seap_ray.pipeline.planner import Planner, _layer_norms
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import progress
from seap_ray.storage.run import Run

# What is measured: layers, head size, vocabulary, tokens of a sequence, records to merge, ratio of the cut.
LAYERS = 4
VOCABULARY = 1000
RECORDS = 32
RATIO = 0.5
BATCH_TOKENS_BY_HIDDEN_SIZE = {1280: 3584, 2048: 2048, 3072: 1536}
"""So many that a batch's float64 arrays are in fresh pages, as those of large models are."""
SLOW_SECONDS = 3
"""A stage that takes longer is measured once."""
QUESTIONS = 16
"""Multiple-choice questions that are judged, of ``CONTEXT`` tokens before each of ``CHOICES`` of ``CHOICE`` tokens."""
CONTEXT = 96
CHOICES = 4
CHOICE = 8
RIDGE = 0.01

# The job on GPUs. Once the model was read, it is in the nodes' page caches.
TASKS = 9
SHARDS_PER_TASK = 2
SHARD_SEQUENCES = 64
LONG_SEQUENCE = 2048
MODELS = 10
"""An expert for each task and the general one, with least squares."""
JUDGED_REPAIRS = 13
"""Least squares of plans that are judged for the general model: one repair, four cut models, eight allocations."""
HELD_OUT_TOKENS = 1024
ROWS_PER_TASK = 200
"""Questions that the dense model and every cut one are judged on."""
STREAM_TOKENS = 262144
BATCH_TOKENS = 4096
FILE_BYTES = 5e9
GPUS_PER_NODE = 8
CORES_PER_NODE = 16
"""A core does what the one here does."""
GPU_MEMORY_RATE = 0.7 * 3.35e12
"""Bytes that an H100 reads and writes in a second: 70 % of its memory's."""
GPU_MEMORY = 0.85 * 80e9
"""Bytes of an H100 for weights."""
GPU_COPY_RATE = 8e9
"""Bytes from mapped pages to a GPU in a second."""
GPU_RATES: dict[str, Any] = {
    "flops": H100.flop_per_s,
    "attention": H100.flop_per_s,
    "passes": (GPU_MEMORY_RATE,) * len(ARRAY_BYTES),
    "faults": math.inf,
}
Parts = dict[str, float]
"""Seconds of a stage, part by part."""


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


def computing_seconds(model: ModelSize, machine: Machine, batch: int) -> float:
    """Return the seconds of a token on its way through the model, with its moments."""
    return forward_seconds(model, machine, SEQUENCE, batch) + statistics_seconds(model, machine)


def covariance_seconds(model: ModelSize, machine: Machine, *, products: float = 0.58) -> float:
    """Return the seconds of a token: ``Covariance.of`` both sites, beside ``statistics_seconds``.

    ``products`` of all pairs of columns, 2 FLOP each: on a CPU one in float32, of which panels of one half are computed
    (``core.moments.PANEL``), on a GPU two in bfloat16. In bytes of a column: read (b), made float64 (8), less the mean
    (16), made float32 (12).
    """
    architecture = model.architecture
    deviations = sum(architecture.widths) * machine.in_blocks(model.item_bytes, 36)
    pairs = sum(width**2 for width in architecture.widths)
    return architecture.n_layers * (deviations + products * 2 * pairs / machine.flops)


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


def repair_seconds(model: ModelSize, machine: Machine, ratio: float) -> float:
    """Return the seconds of ``least_squares`` at both sites of all layers of one model, in float32.

    Of D columns S stay and P go, O outputs each. In FLOP: what is lost 2 O P S, the factor S^3 / 3, two triangular
    solves O S^2 each. In bytes: the kept rows of a covariance, float64, picked, divided, made float32 and picked from
    (60 S D), the normal matrix copied (8 S^2), the covariance divided once more to judge the result (16 D^2, half of
    them in new pages), the solution made float64 and added (40 O S, 16 of them new).
    """
    outputs = model.architecture.hidden_size
    seconds = 0.0
    for width in model.architecture.widths:
        kept = (1 - ratio) * width
        seconds += 2 * outputs * (width - kept) * kept / machine.flops
        seconds += kept**3 / 3 / machine.factored + 2 * outputs * kept**2 / machine.solved
        moved = 60 * kept * width + 8 * kept**2 + 16 * width**2 + 40 * outputs * kept
        seconds += moved / machine.passes[-1] + (8 * width**2 + 16 * outputs * kept) / machine.faults
    return model.architecture.n_layers * seconds


def head_seconds(model: ModelSize, machine: Machine, vocabulary: int, *, gradients: bool = False) -> float:
    """Return the seconds of a token's logits and their logarithms: 2 H V FLOP, twice with gradients, and 24 V bytes."""
    flops = 2 * model.architecture.hidden_size * vocabulary * (2 if gradients else 1)
    return flops / machine.flops + machine.over(vocabulary * SEQUENCE, 24, itemsize=4) / SEQUENCE


def costs_seconds(model: ModelSize, machine: Machine, sequence: int, batch: int, vocabulary: int) -> float:
    """Return the seconds of a held-out token in ``measure_cut_costs``: the passes of a cut model, and two heads."""
    heads = head_seconds(model, machine, vocabulary) + head_seconds(model, machine, vocabulary, gradients=True)
    return PASSES_BY_SITE * forward_seconds(model, machine, sequence, batch) + heads


def judging_seconds(model: ModelSize, machine: Machine, batch: int, vocabulary: int) -> float:
    """Return the seconds of a question: its context once, its choices without their last tokens, and their logits."""
    read = CONTEXT + CHOICES * (CHOICE - 1)
    predicting = 1 + CHOICES * (CHOICE - 1)  # all first tokens are predicted at one place
    forward = forward_seconds(model, machine, CONTEXT + CHOICE, batch)
    return read * forward + predicting * head_seconds(model, machine, vocabulary)


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
    checkpoint = save_model(hidden_size, folder / "base")
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
    opened = OpenedLayers(
        loaded.requires_grad_(False), lambda numbers: (loaded.model.layers[i] for i in numbers), config.calibration
    )
    questions = _questions()
    modules = checkpoint.architecture.modules(0).values()
    covariances = {
        module: _covariance(checkpoint.tensors[architecture.tensor(0, module)].shape[1]) for module in modules
    }
    planner = _planner(config, checkpoint, run)
    spec = model_specs(config)[1]
    pending = prepare_checkpoint(PlanChooser(planner, progress).plan_model(spec, RATIO), config.export, run)
    # What is the base's is in a file of its own in a run; here all of it is written.
    tensors = [tensor for file in pending.files.values() for tensor in file]
    written = folder / "expert.safetensors"
    merged = run.statistics("sort")

    computing = n_tokens * computing_seconds(model, machine, n_tokens)
    stages: dict[str, tuple[float, Callable[[], Any]]] = {
        "single": (computing, lambda: record(loaded, sequences, batch_tokens=n_tokens)),
        "stream": (
            computing + reading_seconds(model, machine),
            lambda: [*streamed.record({"": sequences}, batch_tokens=n_tokens)],
        ),
        "covariances": (
            computing + n_tokens * covariance_seconds(model, machine) / LAYERS,
            lambda: record(loaded, sequences, batch_tokens=n_tokens, covariances=(0,)),
        ),
        "repair": (repair_seconds(model, machine, RATIO) / LAYERS, lambda: _repair(covariances, checkpoint)),
        "costs": (
            SEQUENCE * costs_seconds(model, machine, SEQUENCE, SEQUENCE, VOCABULARY),
            lambda: measure_cut_costs(
                opened.model, opened.forwards(), opened.backwards(), opened.embed(sequences[:1]), pending.export
            ),
        ),
        "judging": (
            QUESTIONS * judging_seconds(model, machine, n_tokens, VOCABULARY),
            lambda: score(loaded, questions, batch_tokens=n_tokens),
        ),
        "merge": (
            merging_seconds(model, machine, RECORDS),
            lambda: merge_moments(TaskStatistics(records, shards, without(merged))),
        ),
        "norms": (
            norms_seconds(model, machine),
            lambda: [_layer_norms(checkpoint, layer) for layer in range(LAYERS)],
        ),
        "plan": (planning_seconds(model, machine), lambda: planner.plan(spec, RATIO)),
        "writing": (
            export_seconds(model, machine, RATIO, repaired=True),
            lambda: write_tensors(pending.export, tensors, without(written)),
        ),
    }
    compared = {}
    for stage, (predicted, work) in stages.items():
        compared[stage] = _compared(predicted, usual_seconds(work, rounds=1 if predicted > SLOW_SECONDS else 5))
    compared["bytes of a record"] = _compared(moments_bytes(architecture), records.path(shards[0]).stat().st_size)
    compared["bytes of an expert"] = _compared(pruned_bytes(model, RATIO), written.stat().st_size)
    return compared


def save_model(hidden_size: int, folder: Path) -> Checkpoint:
    """Write a Llama with random weights, and open it."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=hidden_size * 11 // 4,
        num_attention_heads=hidden_size // HEAD_DIM,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(str(folder))


def _repair(covariances: Mapping[str, Covariance], checkpoint: Checkpoint) -> None:
    """Repair the first layer's output modules in bfloat16, for the columns of even numbers."""
    for module, covariance in covariances.items():
        weight_OD = checkpoint.read(checkpoint.architecture.tensor(0, module)).bfloat16()
        least_squares(covariance, weight_OD, torch.arange(0, weight_OD.shape[1], 2), ridge=RIDGE)


def _covariance(width: int) -> Covariance:
    """Return a covariance that never was: columns with a variance of one and a little in common."""
    x_ND = torch.randn(64, width)
    comoment_DD = torch.addmm(torch.eye(width), x_ND.T, x_ND, alpha=1 / width).double()
    return Covariance(1, torch.zeros(width, dtype=torch.float64), comoment_DD.diagonal().clone(), comoment_DD)


def _questions() -> list[Continuation]:
    """Return random questions, each with its choices, as ``score`` takes them."""
    questions: list[Continuation] = []
    for context in torch.randint(VOCABULARY, (QUESTIONS, CONTEXT)).tolist():
        questions += [(context + choice, CONTEXT) for choice in torch.randint(VOCABULARY, (CHOICES, CHOICE)).tolist()]
    return questions


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


@dataclass(frozen=True)
class GpuJob:
    """A job on GPUs: the model, what a core here does, and how many GPUs there are."""

    model: ModelSize
    vocabulary: int
    core: Machine
    gpus: int

    @property
    def gpu(self) -> Machine:
        """What a GPU does; files, and what else a core does for it, as here."""
        return replace(self.core, **GPU_RATES)

    @property
    def nodes(self) -> int:
        """Nodes, each with storage of its own rate."""
        return -(-self.gpus // GPUS_PER_NODE)

    @property
    def cores(self) -> int:
        """Cores of all nodes."""
        return self.nodes * CORES_PER_NODE

    @property
    def gpus_of_a_model(self) -> int:
        """GPUs that hold the dense model."""
        return math.ceil(self.model.n_bytes / GPU_MEMORY)

    @property
    def reads(self) -> float:
        """Bytes that all nodes read from storage in a second."""
        return self.nodes * H100.read_bytes_per_s

    @property
    def writes(self) -> float:
        """Bytes that all nodes write to storage in a second."""
        return self.nodes * H100.write_bytes_per_s

    @property
    def covariances(self) -> int:
        """Bytes of the covariances of a shard, or of a task."""
        return covariance_files_bytes(self.model.architecture)

    def calibration(self) -> Parts:
        """Every shard's tokens through the dense model, layer by layer from the disk, and its covariances written."""
        n_shards = TASKS * SHARDS_PER_TASK
        shards = [Shard("", "", SHARD_SEQUENCES, SHARD_SEQUENCES * LONG_SEQUENCE, "")] * n_shards
        workers = min(self.gpus, n_shards)
        groups = group_shards(shards, STREAM_TOKENS, workers)
        rounds = -(-len(groups) // workers)
        n_tokens = rounds * max(map(len, groups)) * SHARD_SEQUENCES * LONG_SEQUENCE
        # The first pass reads from shared storage, the others from the page cache.
        rates = (H100.read_bytes_per_s, *[GPU_COPY_RATE] * (rounds - 1))
        recording = statistics_seconds(self.model, self.gpu) + covariance_seconds(self.model, self.gpu, products=2)
        return {
            "forward": n_tokens * forward_seconds(self.model, self.gpu, LONG_SEQUENCE, BATCH_TOKENS),
            "statistics": n_tokens * recording,
            "reading the model": sum(streamed_bytes(self.model) / rate for rate in rates),
            "writing records": n_shards * self.covariances / self.writes,
        }

    def merge(self) -> Parts:
        """Every task's records added."""
        moments = -(-TASKS // self.cores) * merging_seconds(self.model, self.core, SHARDS_PER_TASK)
        return {
            "moments": moments,
            "reading records": TASKS * SHARDS_PER_TASK * self.covariances / self.reads,
            "writing statistics": TASKS * self.covariances / self.writes,
        }

    def norms(self) -> Parts:
        """Norms of all weights, a task a layer."""
        n_layers = self.model.architecture.n_layers
        return {"cores": -(-n_layers // self.cores) * norms_seconds(self.model, self.core) / n_layers}

    def choice(self) -> Parts:
        """Plans judged on each task's held-out tokens, a task a worker; a model that does not fit is read each time."""
        general, expert, *_ = model_specs(_default_job())
        passes = sum(passes_of_choice(_default_job(), spec) for spec in (general, expert))
        # Forward and backward of a cut model take the time of several passes, and walk over the layers once each.
        walks = math.ceil(passes * 2 / PASSES_BY_SITE) if self.gpus_of_a_model > 1 else 1
        rounds = -(-TASKS // min(self.gpus, TASKS))
        token = forward_seconds(self.model, self.gpu, LONG_SEQUENCE, HELD_OUT_TOKENS)
        token += head_seconds(self.model, self.gpu, self.vocabulary)
        reading = self.model.n_bytes * (1 / H100.read_bytes_per_s + (walks - 1) / GPU_COPY_RATE)
        return {"passes": rounds * HELD_OUT_TOKENS * passes * token, "reading the model": rounds * reading}

    def repair(self) -> Parts:
        """Least squares of the models that are judged and written, a task a layer."""
        n_layers = self.model.architecture.n_layers
        rounds = -(-n_layers // self.cores)
        cores = (JUDGED_REPAIRS + MODELS) * rounds * repair_seconds(self.model, self.core, RATIO) / n_layers
        # An expert's own, and for the general model all of them, once for its choice and once for what is written.
        return {"cores": cores, "reading statistics": 3 * TASKS * self.covariances / self.reads}

    def writing(self) -> Parts:
        """Rows and columns of all models picked, hashed and written."""
        written = MODELS * pruned_bytes(self.model, RATIO)
        writers = min(self.cores, MODELS * math.ceil(written / MODELS / FILE_BYTES))
        cutting = MODELS * export_seconds(self.model, self.core, RATIO, repaired=False) / writers
        return {"cores": cutting, "storage, meanwhile": max(0.0, written / self.writes - cutting)}

    def judging(self) -> Parts | None:
        """All models on the questions of all tasks; None where the dense model fits no worker."""
        workers = self.gpus // self.gpus_of_a_model
        if not workers:
            return None
        n_models = MODELS + 1
        batch = judging_seconds(self.model, self.gpu, BATCH_TOKENS, self.vocabulary)
        return {
            "questions": n_models * TASKS * ROWS_PER_TASK * batch / workers,
            "reading the models": -(-n_models // workers) * self.model.n_bytes / H100.read_bytes_per_s,
        }

    def predict(self) -> dict[str, Any]:
        """Return the seconds of every stage, and the part of each that takes longest."""
        predicted: dict[str, Any] = {}
        for stage in ("calibration", "merge", "norms", "choice", "repair", "writing", "judging"):
            parts = getattr(self, stage)()
            if parts:
                predicted[stage] = {"seconds": sum(parts.values()), "limited by": max(parts, key=parts.__getitem__)}
                predicted[stage] |= parts
        return predicted


def _default_job() -> Config:
    """Return a job of this page with the default settings of pruning."""
    tasks = [{"name": f"task{i}", "path": "unread.jsonl"} for i in range(TASKS)]
    return Config.model_validate({"tasks": tasks, "pruning": {"ratio": RATIO, "baselines": {}}})


def main() -> None:
    """Print all predictions and measurements as JSON, numbers in three digits."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    report: dict[str, Any] = {}
    for hidden_size in BATCH_TOKENS_BY_HIDDEN_SIZE:
        with tempfile.TemporaryDirectory() as folder:
            # Anew for each size: what else a processor's other cores do changes its rates from minute to minute.
            machine = measure_machine(Path(folder))
            report[f"hidden size {hidden_size}"] = compare(hidden_size, machine, Path(folder))
    report["machine"] = asdict(machine)

    for name, shape in (("8B", LLAMA_3_8B), ("70B", LLAMA_3_70B)):
        model = ModelSize.from_config({**shape.to_dict(), "dtype": "bfloat16"})
        for gpus in (1, 8, 64):
            report[f"{name}, GPUs: {gpus}"] = GpuJob(model, shape.vocab_size, machine, gpus).predict()
    # Numbers go through their text, which json can parse with a rounding of ours.
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.3g}"))
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
