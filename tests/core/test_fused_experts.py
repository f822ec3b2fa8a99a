"""Tensors of all MoE experts of a layer, taken apart and put together."""

import pytest
import torch

from seap_ray.core.families import FAMILIES
from seap_ray.core.fused_experts import fused_shape, joined, single_experts, single_shapes

E, C, H = 3, 5, 4


def module_tensors(kind: str) -> dict[str, torch.Tensor]:
    """Return a gate and a way up of every expert, all numbers different, by their names."""
    shape = (C, H) if kind == "weight" else (C,)
    names = [f"model.layers.7.mlp.experts.{e}.{m}_proj.{kind}" for e in range(E) for m in ("gate", "up")]
    n = torch.Size(shape).numel()
    return {name: torch.arange(i * n, (i + 1) * n).reshape(shape) for i, name in enumerate(names)}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_fused_tensor_holds_what_its_family_says_and_is_put_together_the_same(family, kind):
    name = "mlp.experts.gate_up_proj" + ("_bias" if kind == "bias" else "")
    if name not in FAMILIES[family].fused_experts:
        assert (family, kind) == ("qwen3_moe", "bias")
        return
    tensors = module_tensors(kind)
    pairs = list(zip(list(tensors.values())[::2], list(tensors.values())[1::2], strict=True))
    if family == "gpt_oss":
        # Written element by element: row c of the gate is column 2 c, row c of the way up column 2 c + 1.
        whole = torch.empty(E, H, 2 * C, dtype=torch.int64) if kind == "weight" else torch.empty(E, 2 * C).long()
        for expert, pair in enumerate(pairs):
            for module, tensor in enumerate(pair):
                for row in range(C):
                    whole[expert, ..., 2 * row + module] = tensor[row]
    else:
        whole = torch.stack([torch.cat(pair) for pair in pairs])

    fused = FAMILIES[family].fused_experts[name]
    single = single_experts(FAMILIES[family], f"model.layers.7.{name}", whole.shape)
    assert list(single) == list(tensors)
    for part, (shape, place) in single.items():
        assert torch.equal(place.take(whole[place.expert]), tensors[part]) and shape == tensors[part].shape
    assert torch.equal(torch.stack([joined(fused, pair) for pair in pairs]), whole)
    assert fused_shape(fused, E, pairs[0][0].shape) == whole.shape


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.7.mlp.experts.gate_up_proj", (E, H, 2 * C + 1)),
        ("model.layers.7.mlp.experts.gate_up_proj", (H, 2 * C)),
        ("model.layers.7.mlp.router.weight", (E, H)),
        ("model.embed_tokens.weight", (10, H)),
    ],
)
def test_other_tensors_and_other_shapes_stay_as_they_are(name, shape):
    assert single_experts(FAMILIES["gpt_oss"], name, shape) == {}
    assert single_shapes(FAMILIES["gpt_oss"], {name: shape}) == {name: shape}
