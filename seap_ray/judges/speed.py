"""Speed: a model's config in; tokens per second of prefill and of decoding out.

Speed depends on shapes, not on values, so the weights are random ones and no checkpoint is read. Letters: B sequences,
T prompt tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from seap_ray.config import SpeedSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Seconds = tuple[float, float]
"""Seconds of prefill and of decoding."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of the whole batch, and their ratio to the dense model's."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_speedup: float
    decode_speedup: float


def measure_speeds(
    configs: Mapping[str, dict[str, Any]], settings: SpeedSection, *, dense: str, dtype: torch.dtype, device: str
) -> dict[str, Speed]:
    """Measure the speed of several models.

    All models take turns, round by round, so that what slows the machine down slows all of them. The figures are
    medians over rounds of the tokens per second, and of the ratio to the dense model of the same round.

    Args:
        configs: Contents of config.json, by name of the model.
        settings: Rounds, batch size and numbers of tokens.
        dense: Name of the model that the ratios are to.
        dtype: Type of the weights.
        device: ``cpu`` or ``cuda``.
    """
    rounds: list[dict[str, Seconds]] = []
    for _ in range(settings.rounds):
        seconds = {}
        for name, config in configs.items():
            # A model is built anew each time, so that no more than one takes memory.
            seconds[name] = _time(_random_model(config, dtype, device), settings)
        rounds.append(seconds)

    return {name: _speed(settings, rounds, name, dense) for name in configs}


def _speed(settings: SpeedSection, rounds: Sequence[dict[str, Seconds]], name: str, dense: str) -> Speed:
    """Return the medians over rounds of one model."""
    prefill, decode = zip(*(seconds[name] for seconds in rounds), strict=True)
    dense_prefill, dense_decode = zip(*(seconds[dense] for seconds in rounds), strict=True)

    # A speed-up is the median of ratios within a round, not the ratio of two medians.
    return Speed(
        prefill_tokens_per_s=settings.batch_size * settings.prompt_tokens / median(prefill),
        decode_tokens_per_s=settings.batch_size * settings.new_tokens / median(decode),
        prefill_speedup=median(map(truediv, dense_prefill, prefill)),
        decode_speedup=median(map(truediv, dense_decode, decode)),
    )


def _random_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    import seap_ray.models.hf  # noqa: F401  makes the compacted families known

    # With auto_map transformers would ask for remote code, although the families are known here.
    loaded = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})

    # Weights are drawn on the device itself, without a copy in the host's memory.
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(loaded, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def _time(model: "PreTrainedModel", settings: SpeedSection) -> Seconds:
    """Return the seconds of one prefill, and of decoding greedily after it; a short prompt warms up."""
    shape = settings.batch_size, settings.prompt_tokens
    ids_BT = torch.randint(model.config.vocab_size, shape, device=model.device)

    _generate(model, ids_BT[:, :8], 2)
    return _generate(model, ids_BT, settings.new_tokens)


def _generate(model: "PreTrainedModel", ids_BT: torch.Tensor, n_tokens: int) -> Seconds:
    # Only the last position's logits are needed, as a server computes them.
    started = _now()
    out = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    prefilled = _now()

    for _ in range(n_tokens):
        ids_BT = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids_BT, past_key_values=out.past_key_values, use_cache=True)
    return prefilled - started, _now() - prefilled


def _now() -> float:
    """Return a clock's reading in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
