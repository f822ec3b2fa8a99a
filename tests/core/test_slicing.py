"""Slicing against numpy's fancy indexing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seap_ray.core.slicing as slicing_module
from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.plan import Kept
from seap_ray.core.slicing import kept_indices, slice_tensor, sliced_shape
from tests.support.builders import random_kept

HIDDEN = 5


def architecture(dense, head_dim, family="llama"):
    return Architecture(
        family,
        (Layer(dense),),
        HIDDEN,
        head_dim,
        dense,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        max_position_embeddings=8,
    )


often = settings(max_examples=60, deadline=None)
MODULES = {
    "self_attn.q_proj": "heads",
    "self_attn.k_proj": "groups",
    "self_attn.v_proj": "groups",
    "self_attn.o_proj": "heads",
    "mlp.gate_proj": "channels",
    "mlp.up_proj": "channels",
    "mlp.down_proj": "channels",
}


def dense_tensors(dense, head_dim):
    """Every tensor of a decoder layer, biases included, filled with numbers that are all different."""
    widths = {
        "heads": dense.heads * head_dim,
        "groups": dense.groups * head_dim,
        "channels": dense.channels,
    }
    shapes = {("input_layernorm", "weight"): (HIDDEN,), ("self_attn.q_norm", "weight"): (head_dim,)}
    for module, unit in MODULES.items():
        out = module.endswith(("o_proj", "down_proj"))
        shapes[module, "weight"] = (HIDDEN, widths[unit]) if out else (widths[unit], HIDDEN)
        shapes[module, "bias"] = (HIDDEN,) if out else (widths[unit],)
    return {key: torch.arange(float(np.prod(shape))).reshape(shape) for key, shape in shapes.items()}


def sliced(*arguments):
    return torch.cat([*slice_tensor(*arguments)])


def by_numpy(module, kind, array, kept, head_dim):
    """Cut an array by fancy indexing, unit by unit."""
    if module not in MODULES:
        return array
    unit = MODULES[module]
    units = np.array(kept.channels[0] if unit == "channels" else getattr(kept, unit))
    if MODULES[module] != "channels":
        units = np.concatenate([np.arange(unit * head_dim, (unit + 1) * head_dim) for unit in units])
    if not module.endswith(("o_proj", "down_proj")):
        return array[units]
    return array[:, units] if kind == "weight" else array


@pytest.mark.parametrize("module", MODULES)
def test_pieces_have_some_rows_each_and_are_the_tensor_together(module, monkeypatch):
    dense, kept = Shape(4, 1, 6), Kept((0, 3), (0, 3), ((1, 4, 5),))
    tensor = dense_tensors(dense, 2)[module, "weight"]
    monkeypatch.setattr(slicing_module, "PIECE_BYTES", 2 * tensor[0].nbytes)
    pieces = [*slice_tensor(architecture(dense, 2), 0, module, "weight", tensor, kept)]
    assert len(pieces) > 1 and max(map(len, pieces)) == 2
    np.testing.assert_array_equal(torch.cat(pieces), by_numpy(module, "weight", tensor.numpy(), kept, 2))


@pytest.mark.parametrize(
    ("dense", "kept"),
    [
        (Shape(4, 1, 6), Kept((0, 3), (0, 3), ((1, 4, 5),))),
        (Shape(3, 2, 6), Kept((0, 2), (0, 1, 4, 5), ((0,),))),
        (Shape(2, 4, 6), Kept((0, 1), (1, 3, 4, 6), ((0, 1, 2, 3, 4, 5),))),
    ],
    ids=["multi-head", "grouped, groups cut", "grouped, heads cut"],
)
def test_slicing_equals_fancy_indexing(dense, kept):
    for (module, kind), tensor in dense_tensors(dense, 3).items():
        result = sliced(architecture(dense, 3), 0, module, kind, tensor, kept)
        assert result.is_contiguous()
        np.testing.assert_array_equal(result, by_numpy(module, kind, tensor.numpy(), kept, 3))


@st.composite
def cuts(draw):
    dense = Shape(*(draw(st.integers(1, high)) for high in (4, 4, 12)))
    shape = Shape(*(draw(st.integers(1, n)) for n in (dense.groups, dense.heads_per_group, dense.channels)))
    return dense, random_kept(dense, shape, random.Random(draw(st.integers(0, 10**6)))), draw(st.integers(1, 4))


@given(cuts())
@often
def test_slicing_equals_fancy_indexing_and_its_shape_is_known_before(cut):
    dense, kept, head_dim = cut
    for (module, kind), tensor in dense_tensors(dense, head_dim).items():
        result = sliced(architecture(dense, head_dim), 0, module, kind, tensor, kept)
        np.testing.assert_array_equal(result, by_numpy(module, kind, tensor.numpy(), kept, head_dim))
        assert sliced_shape(architecture(dense, head_dim), module, kind, tensor.shape, kept) == tuple(result.shape)


@given(cuts())
@often
def test_fused_rows_are_cut_as_what_was_fused_is(cut):
    """Phi-3 stacks queries, keys and values, and gates and ups; NeoX has a head's query, key and value together."""
    dense, kept, head_dim = cut
    shape, parts = architecture(dense, head_dim), dense_tensors(dense, head_dim)

    def both(*modules):
        whole = torch.cat([parts[module, "weight"] + 1000 * i for i, module in enumerate(modules)])
        small = [sliced(shape, 0, m, "weight", parts[m, "weight"] + 1000 * i, kept) for i, m in enumerate(modules)]
        return whole, torch.cat(small)

    phi = architecture(dense, head_dim, "phi3")
    for fused, modules in {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        whole, small = both(*modules)
        assert torch.equal(sliced(phi, 0, fused, "weight", whole, kept), small)
        assert sliced_shape(phi, fused, "weight", whole.shape, kept) == tuple(small.shape)
    neox = architecture(dense, head_dim, "gpt_neox")
    q_proj = parts["self_attn.q_proj", "weight"]
    by_head = [q_proj.reshape(dense.heads, head_dim, HIDDEN) + 1000 * i for i in range(3)]
    whole = torch.cat(by_head, 1)
    small = whole[list(kept.heads)].reshape(-1, HIDDEN)
    cut = sliced(neox, 0, "attention.query_key_value", "weight", whole.reshape(-1, HIDDEN), kept)
    assert torch.equal(cut, small)


@given(cuts())
@often
def test_keeping_everything_changes_nothing(cut):
    dense, _, head_dim = cut
    whole = Kept(tuple(range(dense.groups)), tuple(range(dense.heads)), (tuple(range(dense.channels)),))
    for (module, kind), tensor in dense_tensors(dense, head_dim).items():
        assert torch.equal(sliced(architecture(dense, head_dim), 0, module, kind, tensor, whole), tensor)


def test_kept_indices_are_the_columns_of_the_kept_units():
    kept = Kept((1,), (2, 5), ((0, 7),))
    assert kept_indices(kept, "heads", 3).tolist() == [6, 7, 8, 15, 16, 17]
    assert kept_indices(kept, "groups", 2).tolist() == [2, 3]
    assert kept_indices(kept, "channels", 3).tolist() == [0, 7]
