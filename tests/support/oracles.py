"""Oracles: slow and plain computations that results are compared with."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from unittest import mock

import torch
from torch import nn

from seap_ray.core.moments import Moments
from tests.support.builders import MIXTURES, output_modules


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]


RAGGED = prompts([7, 1, 30, 3, 12, 12, 2, 25, 5, 18, 1, 9])


@torch.no_grad()
def two_pass(model: nn.Module, sequences: Sequence[Sequence[int]], skip_first: bool = False) -> dict:
    """(count, mean, m2) of all activations together, float64, from hooks of our own and batches of one.

    What goes into a layer and comes out is what transformers itself shows; the last output before the final norm.
    """
    seen: dict = {}
    last: list = []
    handles = [
        block.get_submodule(module).register_forward_hook(
            lambda _module, inputs, _output, key=(layer, site): seen.setdefault(key, []).append(
                inputs[0].flatten(0, -2).double()
            )
        )
        for layer, block in enumerate(model.get_decoder().layers)
        for site, module in output_modules(model).items()
    ]
    decoder = model.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    experts = [
        (layer, e, weight)
        for layer, block in enumerate(decoder.layers)
        if model.config.model_type in MIXTURES
        for e, weight in enumerate(block.mlp.experts.down_proj)
    ]
    of_expert = {weight.data_ptr(): (layer, f"mlp.{e}") for layer, e, weight in experts}
    for layer, e, weight in experts:
        seen[layer, f"mlp.{e}"] = [torch.empty(0, weight.shape[1], dtype=torch.float64)]
    linear = torch.nn.functional.linear

    def spying(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.data_ptr() in of_expert:
            seen[of_expert[weight.data_ptr()]].append(x.double())
        return linear(x, weight, bias)

    handles.append(norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0])))
    for sequence in sequences:
        with mock.patch.object(torch.nn.functional, "linear", spying):
            ids_BT = torch.tensor([sequence], device=model.device)
            shown = model(ids_BT, output_hidden_states=True).hidden_states
        states = [state[0].double() for state in (*shown[:-1], last.pop())]
        assert len(states) == len(decoder.layers) + 1
        for layer, (x_TD, y_TD) in enumerate(pairwise(states)):
            cosine_T = (x_TD * y_TD).sum(1) / (x_TD.square().sum(1) * y_TD.square().sum(1)).sqrt()
            seen.setdefault((layer, "block"), []).append(cosine_T[:, None])
    for handle in handles:
        handle.remove()
    reference = {}
    for key, parts in seen.items():
        x_ND = torch.cat([part.cpu()[int(skip_first) :] for part in parts])
        mean_D = x_ND.mean(0) if len(x_ND) else torch.zeros(x_ND.shape[1], dtype=torch.float64)
        reference[key] = (x_ND.shape[0], mean_D, (x_ND - mean_D).square().sum(0))
    return reference


def assert_close(moments: dict, reference: dict, tolerance: float = 1e-9) -> None:
    assert moments.keys() == reference.keys()
    for key, (count, mean_D, m2_D) in reference.items():
        assert moments[key].count == count
        # A mean may be near zero, so its error is relative to the column's root mean square.
        scale_D = (m2_D / max(count, 1) + mean_D.square()).sqrt()
        assert ((moments[key].mean_D - mean_D).abs() <= tolerance * scale_D).all()
        if count > 1:  # a column may be all zeros behind a ReLU
            assert ((moments[key].m2_D - m2_D).abs() <= tolerance * m2_D).all()


def as_tuples(moments: dict[tuple, Moments]) -> dict:
    return {key: (part.count, part.mean_D, part.m2_D) for key, part in moments.items()}
