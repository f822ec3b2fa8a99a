"""Quality: accuracy or perplexity of a checkpoint on every task's held-out rows. A quick check; lm-eval is the judge.

Every model is a Ray task; what was measured once for the same checkpoint and rows is read back. Letters: B sequences,
T positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seap_ray.calibrate import load_model
from seap_ray.checkpoint import Checkpoint
from seap_ray.config import Config
from seap_ray.corpus import Item, batches, is_local, load_tokenizer, local_files
from seap_ray.run import Run, fingerprint, read_json, write_json
from seap_ray.shards import draw, read_rows
from seap_ray.tasks import Task

SHORT = {"acc": "acc", "acc_norm": "acc_n", "exact_match": "em", "perplexity": "ppl"}
"""Column heads of the metrics."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric's value on one task with its standard error; for perplexity, that of the mean token loss."""

    metric: str
    value: float
    stderr: float
    n: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-likelihood of a continuation, its length in tokens, and whether greedy decoding would have written it."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool


def evaluation_items(config: Config, checkpoint: Checkpoint, run: Run) -> dict[str, list[Item]]:
    """Held-out rows of every task, drawn like the calibration's; kept in the run for the next job."""
    items = {}
    for task in config.tasks:
        path = run.qualities / f"{task.name}.items.json"
        made_of = _items_fingerprint(config, task)
        stored = read_json(path)
        if not stored or stored["fingerprint"] != made_of:
            stored = {"fingerprint": made_of, "items": _draw(config, task)}
            write_json(path, stored)
        items[task.name] = [Item(**item) for item in stored["items"]]
    return items


def _items_fingerprint(config: Config, task: Task) -> str:
    files = []
    if is_local(path := task.evaluation_path or task.path):
        split = task.evaluation_split
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(task, path, split)]
    return fingerprint(task.model_dump(), config.evaluation.samples, config.run.seed, files)


def _draw(config: Config, task: Task) -> list[dict[str, Any]]:
    seed = config.run.seed
    rows = read_rows(task, evaluation=True, seed=seed)
    drawn, _, _ = draw(task, rows, n=config.evaluation.samples, seed=seed, official=False)
    return drawn.select(["text", "question", "answer", "choices"]).to_pylist()


def check_evaluation(task: Task) -> None:
    """Raises DataError, before any work, when a task's evaluation file is missing."""
    path = task.evaluation_path or task.path
    if is_local(path):
        local_files(task, path, task.evaluation_split)


# --- one model -------------------------------------------------------------------------------------------------------


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: list[Item],
    *,
    batch_tokens: int,
) -> Quality:
    """Judge ``model`` on one task's rows by the task's metric."""
    if task.metric == "perplexity":
        return _perplexity(score(model, tokenizer, [("", item.text) for item in items], batch_tokens=batch_tokens))
    if task.metric == "exact_match":
        pairs = [(item.question, item.answer) for item in items]
        return _share(task.metric, [s.is_greedy for s in score(model, tokenizer, pairs, batch_tokens=batch_tokens)])
    pairs = [(item.question, choice) for item in items for choice in item.choices]
    scored = iter(score(model, tokenizer, pairs, batch_tokens=batch_tokens))
    return _share(task.metric, [_is_right(item, [next(scored) for _ in item.choices], task.metric) for item in items])


def _is_right(item: Item, scored: list[Scored], metric: str) -> bool:
    """Whether the likeliest choice is the right one; ``acc_norm`` divides by the choice's bytes, as lm-eval does."""
    values = [
        s.log_likelihood / (len(choice.encode()) if metric == "acc_norm" else 1)
        for s, choice in zip(scored, item.choices, strict=True)
    ]
    return item.choices[values.index(max(values))] == item.answer


def _share(metric: str, right: list[bool]) -> Quality:
    n = len(right)
    value = sum(right) / n
    return Quality(metric, value, (value * (1 - value) / max(n - 1, 1)) ** 0.5, n)


def _perplexity(scored: list[Scored]) -> Quality:
    n_tokens = sum(s.n_tokens for s in scored)
    mean = -sum(s.log_likelihood for s in scored) / n_tokens
    deviations = torch.tensor([-s.log_likelihood - mean * s.n_tokens for s in scored], dtype=torch.float64)
    return Quality(
        "perplexity", float(torch.tensor(mean).exp()), float(deviations.square().sum().sqrt() / n_tokens), n_tokens
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    *,
    batch_tokens: int,
) -> list[Scored]:
    """Score each (context, continuation); the text is the two with a space between, tokenised as one."""
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    encoded = [_encode(tokenizer, context, continuation, limit) for context, continuation in pairs]
    scored: list[Scored | None] = [None] * len(encoded)
    for group in batches([len(ids) for ids, _ in encoded], batch_tokens):
        for i, result in zip(group, _score_batch(model, [encoded[i] for i in group]), strict=True):
            scored[i] = result
    return [s for s in scored if s is not None]


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, limit: int) -> tuple[list[int], int]:
    """Token ids, the last ``limit`` of them, and where the continuation starts (never at 0: something must precede)."""
    ids = tokenizer(f"{context} {continuation}" if context else continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    if not start:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, start = [first, *ids], 1
    if len(ids) > limit and start < len(ids) - limit + 1:
        start = len(ids) - limit + 1
    dropped = max(0, len(ids) - limit)
    return ids[dropped:], start - dropped


@torch.inference_mode()
def _score_batch(model: PreTrainedModel, group: list[tuple[list[int], int]]) -> list[Scored]:
    longest = max(len(ids) for ids, _ in group)
    ids_BT = torch.zeros(len(group), longest, dtype=torch.int64)
    mask_BT = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (ids, _) in enumerate(group):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = True
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    hidden_BTD = model.get_decoder()(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return [_scored(model, hidden_BTD[row], ids_BT[row], len(ids), start) for row, (ids, start) in enumerate(group)]


def _scored(model: PreTrainedModel, hidden_TD: torch.Tensor, ids_T: torch.Tensor, length: int, start: int) -> Scored:
    logits_NV = model.get_output_embeddings()(hidden_TD[start - 1 : length - 1]).float()
    target_N = ids_T[start:length]
    chosen_N = log_softmax(logits_NV, -1).gather(1, target_N[:, None])
    return Scored(float(chosen_N.double().sum()), length - start, bool((logits_NV.argmax(-1) == target_N).all()))


# --- all models ------------------------------------------------------------------------------------------------------


def measure_all(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    folders: list[Path],
    progress: Callable[[Iterable[int], int, str], Iterable[int]],
) -> list[dict[str, Quality]]:
    """Quality of the checkpoints in ``folders`` on every task, in order."""
    items = evaluation_items(config, checkpoint, run)
    caches = [run.qualities / f"{_fingerprint(config, folder, items)[:16]}.json" for folder in folders]
    todo = [(folder, cache) for folder, cache in zip(folders, caches, strict=True) if read_json(cache) is None]
    if todo:
        for _ in progress(_measure_todo(config, items, todo), len(todo), "evaluating"):
            pass
    return [{task: Quality(**values) for task, values in read_json(cache).items()} for cache in caches]


def _fingerprint(config: Config, folder: Path, items: dict[str, list[Item]]) -> str:
    manifest = read_json(folder / "seap.json")
    model = manifest["fingerprint"] if manifest else Checkpoint.open(str(folder)).fingerprint
    rows = {task: [asdict(item) for item in rows] for task, rows in items.items()}
    return fingerprint(model, rows, {task.name: task.metric for task in config.tasks}, config.model.dtype)


def _measure_todo(config: Config, items: dict[str, list[Item]], todo: list[tuple[Path, Path]]) -> Iterator[int]:
    calibration = config.calibration
    measure_one = ray.remote(num_cpus=calibration.num_cpus, num_gpus=calibration.num_gpus)(_measure_model)
    shared = ray.put(items)
    pending = [measure_one.remote(config, folder, shared, cache) for folder, cache in todo]
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        ray.get(done)
        yield 1


def _measure_model(config: Config, folder: Path, items: dict[str, list[Item]], cache: Path) -> None:
    import seap_ray.hf  # noqa: F401  lets AutoModelForCausalLM load what we wrote

    base = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    model = load_model(config, base, folder)
    qualities = {
        task.name: asdict(
            measure(model, tokenizer, task, items[task.name], batch_tokens=config.evaluation.batch_tokens)
        )
        for task in config.tasks
    }
    write_json(cache, qualities)
