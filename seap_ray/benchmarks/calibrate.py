"""Calibrate: statistics beside the bare forward, what packing leaves to padding, and the SEAP authors' own loop.

Seconds are of the CPU in one thread, which is what a worker has by default: other work on the machine costs less of
them than of the clock on the wall.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from itertools import chain, product
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seap_ray.benchmarks.measure import Row, alternate
from seap_ray.checkpoint import Checkpoint
from seap_ray.config import Config
from seap_ray.corpus import Renderer, batches, load_tokenizer, packed
from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.recorder import Batch, Sequences, record, rows_of
from seap_ray.records import save_moments
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for model, dtype in product(MODELS.values(), (torch.float32, torch.bfloat16)):
            yield from _overhead(model, dtype, config.benchmarks.rounds)
        yield _padding()
        if folder := config.benchmarks.official:
            yield from _beside_official(config, Path(folder), config.benchmarks.rounds)
    finally:
        torch.set_num_threads(threads)


def _overhead(config: LlamaConfig, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval()
    model.to(dtype)
    decoder, sequences = model.get_decoder(), _sequences(config.vocab_size)
    lengths = [len(sequence) for sequence in sequences]
    bucketed: list[list[Sequences]] = [[[sequences[i]] for i in group] for group in batches(lengths, BATCH_TOKENS)]

    @torch.inference_mode()
    def bare(of_batches: list[list[Sequences]]) -> None:
        for one in of_batches:
            batch = Batch.of(one, False, model.device)
            decoder(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)

    found = alternate(
        {
            "bare": partial(bare, rows_of(decoder, sequences, BATCH_TOKENS)),
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
        in_buckets = [[[i] for i in group] for group in batches(lengths, BATCH_TOKENS)]
        shares.append((_share(lengths, packed(lengths, BATCH_TOKENS)), _share(lengths, in_buckets)))
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


def _beside_official(config: Config, folder: Path, rounds: int) -> Iterator[Row]:
    """Their loop and ours from texts to a file of statistics, on the demo's model and on a larger one."""
    load, manager_of, calibrate = _official(folder)
    demo = Checkpoint.open("demo").folder
    gc.freeze()  # theirs collects garbage after every text: what is here already shall cost it nothing
    with tempfile.TemporaryDirectory() as temporary:
        larger, out = Path(temporary) / "model", Path(temporary) / "out"
        load_tokenizer(demo).save_pretrained(larger)
        torch.manual_seed(0)
        LlamaForCausalLM(MODELS[512]).save_pretrained(larger)
        for name, source in (("demo's model", demo), ("8 layers of 512, random", larger)):
            texts = [*chain(*(_texts(skill, 8) for skill in SKILLS))]
            theirs, tokenizer = load(str(source), "cpu")
            manager = manager_of()
            manager.register_activation_hooks(theirs)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

            def ours(model: Any = model, tokenizer: Any = tokenizer, texts: list[str] = texts) -> None:
                recorded = record(model, tokenizer(texts)["input_ids"], batch_tokens=BATCH_TOKENS)
                save_moments(out / "ours.safetensors", recorded)

            def official(of: Any = theirs, tokenizer: Any = tokenizer, by: Any = manager, on: Any = texts) -> None:
                with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    calibrate(of, tokenizer, by, on, ["all"] * len(on), output_root=str(out))

            n_tokens = sum(map(len, tokenizer(texts)["input_ids"]))
            found = alternate({"official": official, "ours": ours}, rounds, now=time.process_time)
            yield Row.of(
                SUITE,
                f"calibration over the SEAP authors' code, {name}",
                baseline=n_tokens / found.median("official"),
                ours=n_tokens / found.median("ours"),
                unit="tokens per CPU second",
                ratios=found.speedups("ours", "official"),
                target="ratio >= 5",
                why="their loop runs one text at a time, with the head, and sums on the CPU; where the products of the "
                "model are most of the time, both wait for them",
            )


def _official(folder: Path) -> tuple[Callable[..., Any], ...]:
    """Their functions: load a model, make hooks, run the texts. Raises ConfigError where they are not."""
    if not (folder / "src" / "activations.py").is_file():
        raise ConfigError(f"benchmarks.official: {folder} has no src/activations.py; it should be a checkout of SEAP")
    if find_spec("seaborn") is None:  # which they import for pictures
        sys.modules["seaborn"] = ModuleType("seaborn")
    sys.path.insert(0, str(folder))
    activations, models = import_module("src.activations"), import_module("src.model_utils")
    return models.load_model_and_tokenizer, activations.ActivationHookManager, activations.save_activations
