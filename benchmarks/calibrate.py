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

from benchmarks.measure import Row, alternate
from seap_ray.config import Config
from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.models.batching import Batch, Sequences, group_by_length, make_batches, pack_sequences
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Renderer, load_tokenizer
from seap_ray.models.forward import record
from seap_ray.models.records import save_moments
from seap_ray.tasks import BUILT_IN

SUITE, BATCH_TOKENS, SHARD, SEQUENCES = "calibrate", 4096, 64, 32
MODELS = {
    hidden_size: LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=11 * hidden_size // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        vocab_size=4096,
    )
    for hidden_size, n_layers in ((512, 8), (1024, 2))
}
"""Some 30 million parameters each, random: what the forward hides of the statistics depends on the width."""
SKILLS = ("arithmetic", "reverse", "sort", "logic", "facts", "prose")


def rows(config: Config) -> Iterator[Row]:
    checkout, threads = _checkout(config.benchmarks.official), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for model, dtype in product(MODELS.values(), (torch.float32, torch.bfloat16)):
            yield from _overhead(model, dtype, config.benchmarks.rounds)
        yield _padding()
        if checkout is not None:
            yield from _beside_official(checkout, config.benchmarks.rounds)
    finally:
        torch.set_num_threads(threads)


def _checkout(official: str | None) -> Path | None:
    """Raises ConfigError where the authors' code is asked for and is not there."""
    if official and not (Path(official) / "src" / "activations.py").is_file():
        raise ConfigError(f"benchmarks.official: {official} has no src/activations.py; it should be a checkout of SEAP")
    return Path(official).absolute() if official else None


def _overhead(config: LlamaConfig, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval()
    model.to(dtype)
    decoder, sequences = model.get_decoder(), _sequences(config.vocab_size)
    lengths = [len(sequence) for sequence in sequences]
    bucketed: list[list[Sequences]] = []
    for group in group_by_length(lengths, BATCH_TOKENS):
        bucketed.append([[sequences[i]] for i in group])

    @torch.inference_mode()
    def bare(of_batches: list[list[Sequences]]) -> None:
        for one in of_batches:
            batch = Batch.of(one, False, model.device)
            decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)

    found = alternate(
        {
            "bare": partial(bare, make_batches(decoder, sequences, BATCH_TOKENS)),
            "bucketed": partial(bare, bucketed),
            "ours": partial(record, model, sequences, batch_tokens=BATCH_TOKENS),
        },
        rounds,
        now=time.process_time,
    )
    name, per = f"hidden size {config.hidden_size}, {str(dtype).removeprefix('torch.')}", 1e6 / sum(lengths)
    yield Row.of(
        SUITE,
        f"statistics and forward, {name}",
        baseline=found.median("bare") * per,
        ours=found.median("ours") * per,
        unit="CPU ms per 1,000 tokens",
        ratios=found.ratios("ours", "bare"),
        limit=found.median("bare") * per,
        limit_name="bare batched forward",
        target="ratio <= 1.1",
        why="the sums pass over every activation in float64, and the faster the products of a model, and the narrower "
        "it is, the less the forward hides them; a fused kernel that converts as it adds would close it",
    )
    yield Row.of(
        SUITE,
        f"forward of packed rows over length buckets, {name}",
        baseline=found.median("bucketed") * per,
        ours=found.median("bare") * per,
        unit="CPU ms per 1,000 tokens",
        ratios=found.ratios("bare", "bucketed"),
    )


def _sequences(vocabulary: int) -> Sequences:
    """Sequences whose lengths are spread like those of short questions: median 60 tokens, a tail to some hundreds."""
    random, generator = Random(0), torch.Generator().manual_seed(0)
    lengths = [min(1024, max(8, int(random.lognormvariate(4.1, 0.6)))) for _ in range(SEQUENCES)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def _padding() -> Row:
    """Of the demo's corpora, in shards as a job makes them by default: the skill with the most."""
    tokenizer = load_tokenizer(Checkpoint.open("demo").folder)
    shares = []
    for skill in SKILLS:
        lengths = [len(ids) for ids in tokenizer(_texts(skill, SHARD))["input_ids"]]
        in_buckets: list[list[list[int]]] = []
        for group in group_by_length(lengths, BATCH_TOKENS):
            in_buckets.append([[i] for i in group])
        shares.append((_share(lengths, pack_sequences(lengths, BATCH_TOKENS)), _share(lengths, in_buckets)))
    ours, bucketed = (max(share) for share in zip(*shares, strict=True))
    return Row.of(
        SUITE,
        "padding, the most of six corpora",
        baseline=100 * bucketed,
        ours=100 * ours,
        unit="% of computed tokens",
        ratios=[ours / bucketed],
        limit=0,
        limit_name="none",
        target="ours <= 2",
    )


def _share(lengths: list[int], of_batches: list[list[list[int]]]) -> float:
    widths = ((len(rows), max(sum(lengths[i] for i in row) for row in rows)) for rows in of_batches)
    return 1 - sum(lengths) / sum(n_rows * width for n_rows, width in widths)


def _texts(skill: str, n: int) -> list[str]:
    render = Renderer(BUILT_IN[skill])
    return [render.item(dict(row)).text for row in skills.rows(skill, n, split="train", seed=0)[:n]]


# --- the authors' code -----------------------------------------------------------------------------------------------


def _beside_official(checkout: Path, rounds: int) -> Iterator[Row]:
    """Their loop and ours from texts to a file of statistics, on the demo's model and on a larger one."""
    demo = Checkpoint.open("demo").folder
    with tempfile.TemporaryDirectory() as temporary:
        larger = Path(temporary) / "larger"
        load_tokenizer(demo).save_pretrained(larger)
        torch.manual_seed(0)
        LlamaForCausalLM(MODELS[512]).save_pretrained(larger)
        yield _official_row("demo's model", checkout, demo, Path(temporary), rounds)
        yield _official_row("8 layers of 512, random", checkout, larger, Path(temporary), rounds)


def _official_row(name: str, checkout: Path, source: Path, folder: Path, rounds: int) -> Row:
    texts = [text for skill in SKILLS for text in _texts(skill, 8)]
    (folder / "texts.json").write_text(json.dumps(texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), load_tokenizer(source)

    def ours() -> None:
        recorded = record(model, tokenizer(texts)["input_ids"], batch_tokens=BATCH_TOKENS)
        save_moments(folder / "ours.safetensors", recorded)

    arguments = [str(checkout), str(source), str(folder / "texts.json"), str(folder / "theirs")]
    with _process([sys.executable, str(Path(__file__).with_name("official.py")), *arguments]) as (official, cpu_s):
        found = alternate({"official": official, "ours": ours}, rounds, now=lambda: time.process_time() + cpu_s())
    n_tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    return Row.of(
        SUITE,
        f"calibration over the SEAP authors' code, {name}",
        baseline=n_tokens / found.median("official"),
        ours=n_tokens / found.median("ours"),
        unit="tokens per CPU second",
        ratios=found.speedups("ours", "official"),
        target="ratio >= 5",
        why="both wait for the products of the model; theirs are of one text at a time, and of the head",
    )


@contextmanager
def _process(command: list[str]) -> Iterator[tuple[Callable[[], object], Callable[[], float]]]:
    """A call of a process that answers every line with a line, and the seconds of CPU that it has had."""
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as process:
        assert process.stdin and process.stdout
        of, ask, answers = psutil.Process(process.pid), process.stdin, process.stdout

        def call() -> None:
            print(file=ask, flush=True)
            if not answers.readline():
                raise ConfigError(f"benchmarks.official: {' '.join(command)} has ended; run it to see why")

        yield call, lambda: sum(of.cpu_times()[:2])
        ask.close()
