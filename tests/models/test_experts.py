"""Whole MoE experts that go: what is left computes what the dense model does without them, by its family's class."""

import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.scores import reap
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, check_stock
from seap_ray.models.forward import record
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import decoder_of
from seap_ray.models.recorder import added
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    MORE_CONFIGS,
    RAGGED,
    load,
    logits,
    mixture_in,
    random_ids,
    random_plan,
    save_dense,
    write_compacted,
)
from tests.support.oracles import tensors_of

N_EXPERTS = 8
GONE = (1, 2, 4, 7)
"""Two of each half, which are the groups of families that have such."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a function that makes a mixture with eight MoE experts in a layer."""

    def make(name: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(name)
        # Whatever a family calls their number; transformers' configs know the others by none of these names.
        save_dense(folder, name, torch.float32, settings=dict.fromkeys(n_experts_keys(name), N_EXPERTS))
        return Checkpoint.open(str(folder))

    return make


def n_experts_keys(name: str) -> list[str]:
    """Return the keys of a family's config that are the number of MoE experts."""
    known = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return [key for key in known if key in (CONFIGS | MORE_CONFIGS)[name]().to_dict()]


def without(architecture: Architecture, gone: tuple[int, ...] = GONE) -> Plan:
    """Return a plan by which the same MoE experts of every layer go, in each layer others by one place."""
    kept: list[Kept] = []
    for number, layer in enumerate(architecture.layers):
        whole = Kept.whole(architecture, number)
        # An even shift inside of each half, so that equally many of both go.
        half = N_EXPERTS // 2
        shifted = {expert // half * half + (expert + number) % half for expert in gone}
        experts = tuple(expert for expert in range(N_EXPERTS) if expert not in shifted)
        kept.append(whole.with_experts(experts) if layer.n_experts else whole)
    return Plan("expert", 0.5, COMPENSATIONS["none"], tuple(kept), {})


def logits_with_closed_routers(model: nn.Module, plan: Plan) -> torch.Tensor:
    """Run the dense model with the router's logits of the MoE experts that go at minus infinity."""
    closed: dict[int, list[int]] = {}
    for block, kept in zip(decoder_of(model).layers, plan.kept, strict=True):
        if kept.experts:
            gone = [expert for expert in range(N_EXPERTS) if expert not in kept.experts]
            for key, tensor in mixture_in(block).state_dict(keep_vars=True).items():
                if "e_score_correction_bias" in key:
                    tensor.data[..., gone] = -torch.inf
                elif key in ("gate.weight", "router.weight"):
                    closed[tensor.data_ptr()] = gone
    linear = functional.linear

    def closing(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return a router's logits with those of the MoE experts that go at minus infinity."""
        y = linear(x, weight, bias)
        return y.index_fill(-1, torch.tensor(closed.get(weight.data_ptr(), []), dtype=torch.int64), -torch.inf)

    assert len(closed) == sum(bool(kept.experts) for kept in plan.kept)
    with mock.patch.object(functional, "linear", closing):
        return logits(model, random_ids())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_without_experts_is_the_dense_one_whose_router_never_chooses_them(mixture, tmp_path, name):
    base = mixture(name)
    plan = without(base.architecture)
    check_stock(plan, base.architecture)
    dense = load(base.folder)
    before = logits(dense, random_ids())
    expected = logits_with_closed_routers(dense, plan)
    assert (expected - before).abs().max() > 1e-2

    # That our own format computes the same needs no proof by every family.
    formats = (True, False) if name in ("qwen3_moe", "deepseek_v3", "ernie4_5_moe") else (True,)
    for stock in formats:
        folder = write_compacted(CheckpointExport(base, plan, stock=stock), tmp_path / str(stock))
        check_folder(folder)
        model = load(folder)
        assert type(model).__module__.startswith("transformers.models.") == stock
        assert (logits(model, random_ids()) - expected).abs().max() < 1e-4 * expected.abs().max()

    after = Checkpoint.open(str(tmp_path / "True")).architecture
    assert {layer.n_experts for layer in after.layers} - {0} == {4}
    assert after.experts_per_token == base.architecture.experts_per_token
    assert after.decoder_parameters == round(
        (1 - plan.planned(base.architecture)) * base.architecture.decoder_parameters
    )
    assert not any(file.suffix == ".py" for file in (tmp_path / "True").iterdir())


def test_reap_is_the_mean_contribution_of_an_expert_to_the_tokens_that_it_serves(mixture):
    base = mixture("qwen3_moe")
    model = load(base.folder)
    # Two parts that are merged, as shards are.
    parts = [record(model, RAGGED[:5], batch_tokens=40), record(model, RAGGED[5:], batch_tokens=40)]
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: seen.setdefault(layer, []).append(inputs)
        )
    for sequence in RAGGED:
        logits(model, torch.tensor([sequence]))

    for layer, block in enumerate(model.model.layers):
        moments = added(*parts)[layer, "experts"]
        assert moments.count == sum(map(len, RAGGED))
        gains: dict[int, list[float]] = {expert: [] for expert in range(N_EXPERTS)}
        for x_TD, chosen_TK, gates_TK in [*seen[layer]]:
            for x_D, chosen_K, gates_K in zip(x_TD, chosen_TK.tolist(), gates_TK.tolist(), strict=True):
                for expert, gate in zip(chosen_K, gates_K, strict=True):
                    only_E = torch.tensor([[expert]])
                    output_D = block.mlp.experts.forward(x_D[None], only_E, torch.ones(1, 1)).detach()
                    gains[expert].append(gate * float(output_D.norm()))
        expected = [sum(gain) / len(gain) if gain else 0.0 for gain in gains.values()]
        assert reap(moments).tolist() == pytest.approx(expected, rel=1e-5)
        shares = [len(gain) / moments.count for gain in gains.values()]
        assert moments.mean_D[N_EXPERTS:].tolist() == pytest.approx(shares, rel=1e-12)


def test_the_experts_that_stay_keep_their_bits_and_are_numbered_anew(mixture, tmp_path):
    base = mixture("qwen3_moe")
    plan = without(base.architecture)
    folder = write_compacted(CheckpointExport(base, plan, stock=True), tmp_path)
    written, given = tensors_of(folder), tensors_of(base.folder)
    for layer, kept in enumerate(plan.kept):
        prefix = f"model.layers.{layer}.mlp."
        assert torch.equal(written[f"{prefix}gate.weight"], given[f"{prefix}gate.weight"][list(kept.experts)])
        for new, old in enumerate(kept.experts):
            for module in ("gate_proj", "up_proj", "down_proj"):
                name = f"{prefix}experts.{{}}.{module}.weight"
                assert torch.equal(written[name.format(new)], given[name.format(old)])
    assert not any(".experts.4." in name for name in written)
    others = {name for name in given if ".mlp." not in name}
    assert all(torch.equal(written[name], given[name]) for name in others)


def test_experts_that_are_stored_as_one_tensor_stay_so_and_are_cut_as_others(mixture, tmp_path):
    base = mixture("qwen3_5_moe_text")
    fused = tmp_path / "fused"
    shutil.copytree(base.folder, fused)
    tensors = tensors_of(fused)
    for layer in range(4):
        names = [f"model.layers.{layer}.mlp.experts.{e}.{{}}_proj.weight" for e in range(N_EXPERTS)]
        parts = {m: [tensors.pop(name.format(m)) for name in names] for m in ("gate", "up", "down")}
        gate_ups = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_ups)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts["down"])
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    opened = Checkpoint.open(str(fused))
    assert opened.tensors.keys() == base.tensors.keys() and opened.parameters == base.parameters

    for number, plan in enumerate((without(base.architecture), random_plan(base.architecture, 5))):
        folder = write_compacted(CheckpointExport(opened, plan), tmp_path / f"fused_{number}")
        check_folder(folder)
        assert tensors_of(folder).keys() == tensors.keys()
        single = write_compacted(CheckpointExport(base, plan), tmp_path / f"single_{number}")
        assert torch.equal(logits(load(folder), random_ids()), logits(load(single), random_ids()))


def test_a_model_without_experts_is_cut_again(mixture, tmp_path):
    base = mixture("mixtral")
    once = Checkpoint.open(str(write_compacted(CheckpointExport(base, without(base.architecture)), tmp_path / "once")))
    kept = tuple(Kept.whole(once.architecture, layer).with_experts((0, 3)) for layer in range(4))
    again = Plan("expert", 0.5, COMPENSATIONS["none"], kept, {})
    folder = write_compacted(CheckpointExport(once, again, stock=True), tmp_path / "again")
    first = without(base.architecture)
    chosen = [(k.experts[0], k.experts[3]) for k in first.kept]
    direct = tuple(Kept.whole(base.architecture, layer).with_experts(experts) for layer, experts in enumerate(chosen))
    expected = CheckpointExport(base, Plan("expert", 0.5, COMPENSATIONS["none"], direct, {}), stock=True)
    assert torch.equal(
        logits(load(folder), random_ids()), logits(load(write_compacted(expected, tmp_path / "direct")), random_ids())
    )
