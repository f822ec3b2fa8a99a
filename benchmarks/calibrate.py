"""Calibrate: statistics beside the bare forward, what packing leaves to padding, and the SEAP authors' own loop.

Seconds are of the CPU in one thread, which is what a worker has by default: other work on the machine costs less of
them than of the clock on the wall.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from subprocess import DEVNULL, PIPE
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Rounds, Row, alternate
from seap_ray.config import Config
from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.models.batching import Batch, group_by_length, make_batches, pack_sequences
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Renderer, load_tokenizer
from seap_ray.models.forward import record
from seap_ray.models.records import save_moments
from seap_ray.models.sequences import Sequences
from seap_ray.storage.paths import LocalPath
from seap_ray.tasks import BUILT_IN

SUITE = "calibrate"
BATCH_TOKENS = 4096
SHARD_ITEMS = 64
"""Texts of a shard, as a job makes them by default."""
N_SEQUENCES = 32
OFFICIAL_TEXTS = 8
"""Texts of each skill that the authors' code and ours record."""
VOCABULARY = 4096


def _model(
    hidden_size: int, intermediate_size: int, n_heads: int, n_key_value_heads: int, n_layers: int
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_key_value_heads,
        vocab_size=VOCABULARY,
    )


SHAPES = {
    "4 layers of SmolLM2-135M": _model(576, 1536, 9, 3, 4),
    "a layer of Llama-3.2-1B": _model(2048, 8192, 32, 8, 1),
    "a layer of Llama-2-7B": _model(4096, 11008, 32, 32, 1),
}
"""Models with random weights: what the forward hides of the statistics depends on the widths."""
SMALL = _model(512, 1408, 8, 4, 8)
"""A model of 25 million parameters, which the authors' code is given, too."""
TARGETS = {"moments": 1.15, "covariances": 1.25}
"""The most that recording may cost, over the bare forward."""
SKILLS = ("arithmetic", "reverse", "sort", "logic", "facts", "prose")


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: models in two dtypes, padding, and the authors' code where it is given."""
    checkout = _checkout(config.benchmarks.official)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    try:
        for (shape, model), dtype in product(SHAPES.items(), (torch.float32, torch.bfloat16)):
            name = f"{shape}, {str(dtype).removeprefix('torch.')}"
            yield from _overhead_rows(name, model, dtype, config.benchmarks.rounds)
        yield _padding_row()
        if checkout is not None:
            yield from _official_rows(checkout, config.benchmarks.rounds)
    finally:
        torch.set_num_threads(threads)


def _checkout(official: str | None) -> Path | None:
    """Return the folder of the authors' code. Raises ConfigError where it is named and not there."""
    if official and not (Path(official) / "src" / "activations.py").is_file():
        raise ConfigError(f"benchmarks.official: {official} has no src/activations.py; it should be a checkout of SEAP")
    return Path(official).absolute() if official else None


def _overhead_rows(name: str, config: LlamaConfig, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Yield what statistics add to the forward, and what packed rows save against buckets of one length."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval()
    model.to(dtype)
    decoder = model.get_decoder()
    sequences = random_sequences(config.vocab_size)
    lengths = [len(sequence) for sequence in sequences]
    # Rows of one sequence each, of similar lengths: what packing is compared with.
    bucketed: list[list[Sequences]] = []
    for group in group_by_length(lengths, BATCH_TOKENS):
        bucketed.append([[sequences[i]] for i in group])

    @torch.inference_mode()
    def forward(batches: list[list[Sequences]]) -> None:
        """Run the decoder over batches without recording."""
        for batch_rows in batches:
            batch = Batch.of(batch_rows, False, model.device)
            decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)

    # "bare" computes the batches that are recorded, so that they differ by the statistics alone.
    recorded = partial(record, model, sequences, batch_tokens=BATCH_TOKENS)
    timings = alternate(
        {
            "bare": partial(forward, make_batches(decoder, sequences, BATCH_TOKENS)),
            "bucketed": partial(forward, bucketed),
            "moments": recorded,
            "covariances": partial(recorded, covariances=range(config.num_hidden_layers)),
        },
        rounds,
        now=time.process_time,
    )
    yield from _timing_rows(name, timings, sum(lengths), _product_share(model))


def _product_share(model: LlamaForCausalLM) -> float:
    """Return the multiplications of covariances, each pair of columns once, over those of the decoder layers."""
    layers = model.get_decoder().layers
    n_covariances = sum(
        module.in_features**2 / 2 for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
    )
    return n_covariances / sum(parameter.numel() for parameter in layers.parameters())


def _timing_rows(name: str, timings: Rounds, n_tokens: int, product_share: float) -> Iterator[Row]:
    # Seconds of all tokens, as milliseconds of a thousand.
    ms_per_thousand = 1e6 / n_tokens
    bare_ms = timings.median("bare") * ms_per_thousand
    reasons = {
        "moments": "the sums pass over every activation in float64, and the faster the products of a model, and the "
        "narrower it is, the less the forward hides them; a fused kernel that converts as it adds would close it",
        "covariances": f"products of each pair of columns, once, are {product_share:.2f} of the forward's, and float32 "
        "for every dtype; fewer tokens for covariances than for moments would close it",
    }
    for statistics, bound in TARGETS.items():
        yield Row.of(
            SUITE,
            f"{statistics} and forward, {name}",
            baseline=bare_ms,
            ours=timings.median(statistics) * ms_per_thousand,
            unit="CPU ms per 1,000 tokens",
            ratios=timings.ratios(statistics, "bare"),
            limit=bare_ms,
            limit_name="bare batched forward",
            target=f"ratio <= {bound}",
            why=reasons[statistics],
        )

    yield Row.of(
        SUITE,
        f"forward of packed rows over length buckets, {name}",
        baseline=timings.median("bucketed") * ms_per_thousand,
        ours=bare_ms,
        unit="CPU ms per 1,000 tokens",
        ratios=timings.ratios("bare", "bucketed"),
    )


def random_sequences(vocabulary: int) -> Sequences:
    """Return sequences whose lengths are spread like those of short questions: median 60 tokens, a tail to hundreds."""
    random = Random(0)
    generator = torch.Generator().manual_seed(0)
    # exp(4.1) is 60, the median.
    lengths = [min(1024, max(8, int(random.lognormvariate(4.1, 0.6)))) for _ in range(N_SEQUENCES)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def _padding_row() -> Row:
    """Return the share of padding in shards of the demo's corpora, of the skill that has most."""
    tokenizer = load_tokenizer(Checkpoint.open("demo").folder)
    packed: list[float] = []
    bucketed: list[float] = []

    for skill in SKILLS:
        lengths = [len(ids) for ids in tokenizer(_texts(skill, SHARD_ITEMS))["input_ids"]]
        buckets: list[list[list[int]]] = []
        for group in group_by_length(lengths, BATCH_TOKENS):
            buckets.append([[i] for i in group])
        # A job packs; buckets of one sequence a row are what it is compared with.
        packed.append(_padding_share(lengths, pack_sequences(lengths, BATCH_TOKENS)))
        bucketed.append(_padding_share(lengths, buckets))

    # The worst skill counts for both.
    return Row.of(
        SUITE,
        "padding, the most of six corpora",
        baseline=100 * max(bucketed),
        ours=100 * max(packed),
        unit="% of computed tokens",
        ratios=[max(packed) / max(bucketed)],
        limit=0,
        limit_name="none",
        target="ours <= 2",
    )


def _padding_share(lengths: list[int], batches: list[list[list[int]]]) -> float:
    """Return the share of computed tokens that are padding, for batches of rows of indices into ``lengths``."""
    n_computed = 0
    for batch_rows in batches:
        row_lengths: list[int] = []
        for row in batch_rows:
            row_lengths.append(sum(lengths[i] for i in row))
        n_computed += len(batch_rows) * max(row_lengths)
    return 1 - sum(lengths) / n_computed


def _texts(skill: str, n: int) -> list[str]:
    render = Renderer(BUILT_IN[skill])
    return [render.item(dict(row)).text for row in skills.rows(skill, n, split="train", seed=0)[:n]]


# --- the authors' code -----------------------------------------------------------------------------------------------


def _official_rows(checkout: Path, rounds: int) -> Iterator[Row]:
    """Yield their loop and ours, from texts to a file of statistics, on the demo's model and on a larger one."""
    demo = Checkpoint.open("demo").folder
    with tempfile.TemporaryDirectory() as temporary:
        # The demo is so small that it says little of a real model.
        larger = Path(temporary) / "larger"
        load_tokenizer(demo).save_pretrained(larger)
        torch.manual_seed(0)
        LlamaForCausalLM(SMALL).save_pretrained(larger)
        yield _official_row("demo's model", checkout, demo, Path(temporary), rounds)
        yield _official_row("8 layers of 512, random", checkout, larger, Path(temporary), rounds)


def _official_row(name: str, checkout: Path, source: Path, folder: Path, rounds: int) -> Row:
    texts: list[str] = []
    for skill in SKILLS:
        texts += _texts(skill, OFFICIAL_TEXTS)
    (folder / "texts.json").write_text(json.dumps(texts))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(source)

    def ours() -> None:
        """Tokenize, record and write."""
        recorded = record(model, tokenizer(texts)["input_ids"], batch_tokens=BATCH_TOKENS)
        save_moments(LocalPath(folder / "ours.safetensors"), recorded)

    script = Path(__file__).with_name("official.py")
    arguments = [str(checkout), str(source), str(folder / "texts.json"), str(folder / "theirs")]
    with _answering_process([sys.executable, str(script), *arguments]) as (official, cpu_seconds):
        # Either contestant's CPU time moves this clock; the other process waits meanwhile.
        timings = alternate(
            {"official": official, "ours": ours}, rounds, now=lambda: time.process_time() + cpu_seconds()
        )

    # Tokens are counted without padding, for both.
    n_tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    return Row.of(
        SUITE,
        f"calibration over the SEAP authors' code, {name}",
        baseline=n_tokens / timings.median("official"),
        ours=n_tokens / timings.median("ours"),
        unit="tokens per CPU second",
        ratios=timings.speedups("ours", "official"),
        target="ratio >= 5",
        why="both wait for the products of the model; theirs are of one text at a time, and of the head",
    )


@contextmanager
def _answering_process(command: list[str]) -> Iterator[tuple[Callable[[], object], Callable[[], float]]]:
    """Start a process that answers every line with a line; yield a call of it, and the seconds of CPU it has had."""
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as process:
        assert process.stdin and process.stdout
        requests = process.stdin
        answers = process.stdout
        usage = psutil.Process(process.pid)

        def call() -> None:
            """Send a line and wait for the answer."""
            print(file=requests, flush=True)
            if not answers.readline():
                raise ConfigError(f"benchmarks.official: {' '.join(command)} has ended; run it to see why")

        yield call, lambda: sum(usage.cpu_times()[:2])
        requests.close()
