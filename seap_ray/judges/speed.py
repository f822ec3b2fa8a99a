"""Speed: a model's config in, tokens per second of prefill and of decoding out.

Speed depends on shapes, not on values, so the weights are random ones and no checkpoint is read. Letters: B sequences,
T prompt tokens.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seap_ray.config import SpeedSection


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of the whole batch, and how many times the dense model's they are."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_speedup: float
    decode_speedup: float


def measure_speeds(
    configs: Mapping[str, dict[str, Any]], settings: SpeedSection, *, dense: str, dtype: torch.dtype, device: str
) -> dict[str, Speed]:
    """Speed of every model of ``configs`` (the contents of config.json), by name.

    All models take turns, round by round, so that what slows the machine down slows all of them; medians over rounds of
    the tokens per second, and of the ratio to the ``dense`` one of the same round.
    """
    rounds = [
        {name: _once(_empty(config, dtype, device), settings) for name, config in configs.items()}
        for _ in range(settings.rounds)
    ]

    def of(name: str) -> Speed:
        prefill, decode = zip(*(seconds[name] for seconds in rounds), strict=True)
        base = [seconds[dense] for seconds in rounds]
        return Speed(
            settings.batch_size * settings.prompt_tokens / median(prefill),
            settings.batch_size * settings.new_tokens / median(decode),
            median(b[0] / own for b, own in zip(base, prefill, strict=True)),
            median(b[1] / own for b, own in zip(base, decode, strict=True)),
        )

    return {name: of(name) for name in configs}


def _empty(config: dict[str, Any], dtype: torch.dtype, device: str) -> PreTrainedModel:
    import seap_ray.models.hf  # noqa: F401  makes the compacted families known

    loaded = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(loaded, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def _once(model: PreTrainedModel, settings: SpeedSection) -> tuple[float, float]:
    """Seconds of one prefill, and of decoding greedily after it; a short prompt warms up."""
    shape = settings.batch_size, settings.prompt_tokens
    ids_BT = torch.randint(model.config.vocab_size, shape, device=model.device)
    _generate(model, ids_BT[:, :8], 2)
    return _generate(model, ids_BT, settings.new_tokens)


def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, n: int) -> tuple[float, float]:
    started = _now()
    out = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    prefilled = _now()
    for _ in range(n):
        ids_BT = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids_BT, past_key_values=out.past_key_values, use_cache=True)
    return prefilled - started, _now() - prefilled


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
