"""Heal: what a short training of an expert on its task's own calibration texts gains, and how long it takes.

``python -m benchmarks.heal run.name=demo pruning.ratio=0.5`` reads a run that is done, its experts and shards. Each
expert is trained by peft's LoRA on every linear module to give the dense model's next-token distributions, merged, and
judged on the task's evaluation rows.
``steps=``, ``rank=``, ``rate=`` and ``batch=`` may be set as well.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from seap_ray.config import Config, load_config
from seap_ray.errors import ConfigError
from seap_ray.judges.quality import measure
from seap_ray.judges.scoring import score
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.models.loading import load_model
from seap_ray.pipeline.evaluate import eval_task
from seap_ray.pipeline.shards import Manifest
from seap_ray.storage.files import stage
from seap_ray.storage.run import Run
from seap_ray.tasks import Task


@dataclass(frozen=True, slots=True)
class Healing:
    """Settings of the training."""

    steps: int = 200
    batch: int = 16
    """Sequences of a step."""
    rate: float = 1e-3
    """Learning rate, which falls linearly to 0."""
    rank: int = 16
    """Of the two factors that are added to each matrix."""


def main(arguments: Sequence[str]) -> None:
    """Print a line for each task: its metric, and the loss of the right answers, before and after."""
    parts = [argument.partition("=") for argument in arguments]
    own = {key: value for key, _, value in parts}
    # Each of them has the type of its default.
    settings = {name: type(getattr(Healing(), name))(own[name]) for name in Healing.__slots__ if name in own}
    healing = Healing(**settings)
    config = load_config([argument for argument in arguments if argument.partition("=")[0] not in settings])

    run = Run.of(config)
    ratio = config.pruning.ratio[0]
    print(f"{healing}, ratio {ratio}")
    print("of the dense model, the expert, the healed expert: the task's metric, and nats a token of the right answers")
    for task in config.tasks:
        print(line(config, run, ratio, task, healing), flush=True)


def line(config: Config, run: Run, ratio: float, task: Task, healing: Healing) -> str:
    """Heal the expert of one task, and say what it was and is."""
    base = Checkpoint.open(config.model.source, config.model.revision)
    encoding = Encoding.of(config, task, load_tokenizer(base.folder))
    items = eval_task(config, run, task, by_lm_eval=False).items

    answers = [encoding.continuation(item, item.answer) for item in items]

    def judged(model: Any) -> tuple[float, float]:
        """Return the task's own metric, and nats a token of the right answers."""
        batch_tokens = config.evaluation.batch_tokens
        scored = score(model, answers, batch_tokens=batch_tokens)
        nats = -sum(answer.log_likelihood for answer in scored) / sum(answer.n_tokens for answer in scored)
        return measure(model, encoding, task, items, batch_tokens=batch_tokens).value, nats

    dense = load_model(config, base, base.folder)
    model = load_model(config, base, stage(run.expert(ratio, task.name)))
    results = [judged(dense), judged(model)]

    started = time.perf_counter()
    healed = heal(model, dense, sequences(run, task), healing, seed=config.run.seed)
    seconds = time.perf_counter() - started
    results.append(judged(healed))

    values = " ".join(f"{value:7.3f}" for value, _ in results)
    nats = " ".join(f"{nats:8.4f}" for _, nats in results)
    return f"{task.name:12} {task.metric:>12} {values}  {nats}  {seconds:5.0f} s"


def sequences(run: Run, task: Task) -> list[list[int]]:
    """Return the token ids of a task's calibration texts."""
    manifest = Manifest.read(run.shards(task.name))
    if manifest is None:
        raise ConfigError(f"run.name={run.root.name}: no shards of {task.name}; run jobs/prune.py first")
    return [list(sequence) for shard in manifest.shards for sequence in shard.sequences(run)]


def heal(model: Any, dense: Any, texts: list[list[int]], healing: Healing, *, seed: int) -> Any:
    """Train a model by LoRA to predict what the dense one does on token sequences; return it merged."""
    torch.manual_seed(seed)
    rank = healing.rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=healing.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, healing.steps)

    adapted.train()
    for batch in batches(texts, healing, seed):
        # The dense model's own distribution, token by token, and not the text: few texts say little else.
        with torch.no_grad():
            target_BTV = dense(**batch, use_cache=False).logits.log_softmax(-1)
        given_BTV = adapted(**batch, use_cache=False).logits.log_softmax(-1)
        divergence_BT = (target_BTV.exp() * (target_BTV - given_BTV)).sum(-1)
        divergence_BT[batch["attention_mask"].bool()].mean().backward()

        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return adapted.merge_and_unload().eval()


def batches(texts: list[list[int]], healing: Healing, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches of texts that are drawn at random, each a model's keyword arguments."""
    drawn = random.Random(seed)
    for _ in range(healing.steps):
        chosen = drawn.sample(texts, min(healing.batch, len(texts)))
        longest = max(map(len, chosen))
        # Padded on the right, where the mask hides it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in chosen])
        n_tokens = torch.tensor([len(text) for text in chosen])
        mask = (torch.arange(longest) < n_tokens[:, None]).long()
        yield {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    main(sys.argv[1:])
