"""Hybrids: which layers give what, states that stay whole and are not shared, and what is refused of them."""

import pytest
import torch

from seap_ray.config import AllocationSection, PruningSection, TargetSection
from seap_ray.core.allocation import choose_shapes
from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.targets import StoredSizes, make_target
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError
from seap_ray.models.batching import make_batches
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.hidden_states import embed, head_logits
from seap_ray.models.loading import decoder_of
from tests.support.builders import HYBRIDS, MORE_CONFIGS, RAGGED, load, logits, random_ids, write_compacted
from tests.support.oracles import ratio_of

CPU = torch.device("cpu")
PARTS = {
    "qwen3_5_text": (["mixer+mlp"] * 3) + ["attention+mlp"],
    "qwen3_next": (["mixer+mlp"] * 3) + ["attention+mlp"],
    "qwen3_5_moe_text": (["mixer+mlp"] * 3) + ["attention+mlp"],
    "lfm2": ["mixer+mlp", "attention+mlp"] * 2,
    "granitemoehybrid": ["mixer+mlp", "attention+mlp"] * 2,
    "falcon_h1": ["attention+mixer+mlp"] * 4,
    "nemotron_h": ["mlp", "mixer", "mlp", "attention"],
}
"""What each layer of the tiny models is made of."""


def architecture_of(name: str) -> Architecture:
    return Architecture.of(MORE_CONFIGS[name]().to_dict())


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_have_the_parts_that_their_config_lists(name):
    architecture = architecture_of(name)
    parts = [
        "+".join(
            part
            for part, is_there in (
                ("attention", layer.has_attention),
                ("mixer", layer.has_mixer),
                ("mlp", layer.has_mlp),
            )
            if is_there
        )
        for layer in architecture.layers
    ]
    assert parts == PARTS[name]
    for number, layer in enumerate(architecture.layers):
        assert (
            bool(architecture.sites(number, "attn")) == layer.has_attention == ("attn" in architecture.modules(number))
        )
        assert bool(architecture.sites(number, "mlp")) == layer.has_mlp


@pytest.mark.parametrize("kind", ["uniform", "logistic", "global", "standardised"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_budget_is_met_by_the_layers_that_can_give_and_no_part_appears_or_goes(name, kind):
    architecture = architecture_of(name)
    pruning = PruningSection(align=8, allocation=AllocationSection(kind=kind))
    generator = torch.Generator().manual_seed(1)
    scores_L = []
    for layer in architecture.layers:
        rows = (max(layer.n_experts, 1), layer.shape.channels) if layer.n_experts else (layer.shape.channels,)
        scores_L.append((torch.rand(layer.shape.heads, generator=generator), torch.rand(rows, generator=generator)))
    ratio = 0.15
    shapes = choose_shapes(architecture, pruning, ratio=ratio, adds_biases=True, scores_L=scores_L)
    tile = max(c.tile_cost for c in WidthConstraints.of(architecture, pruning, adds_biases=True))
    reached = ratio_of(shapes, architecture, adds_biases=True)
    assert abs(reached - ratio) * architecture.decoder_parameters <= tile
    for layer, shape in zip(architecture.layers, shapes, strict=True):
        assert (shape.groups > 0, shape.channels > 0) == (layer.has_attention, layer.has_mlp)
        # Engines pool the cache of attention with states: key-value heads stay.
        assert shape.groups == layer.shape.groups
    assert len({shape.channels for shape in shapes if shape.channels}) > 1 or kind == "uniform"


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_run_one_by_one_on_rows_of_one_sequence_give_the_models_own_logits(dense, name):
    model = load(dense(name, torch.float64))
    decoder = decoder_of(model)
    with torch.no_grad():
        for rows in make_batches(decoder, RAGGED, 40):
            assert all(len(row) == 1 for row in rows)
            batch = embed(decoder, rows, False, CPU)
            hidden_BTD = batch.hidden_BTD
            for number, layer in enumerate(decoder.layers):
                hidden_BTD = batch.run(layer, number, hidden_BTD, CPU)
            given = head_logits(model, batch.batch, hidden_BTD, torch.arange(hidden_BTD.shape[1]))
            for row, (sequence,) in enumerate(rows):
                alone = model(torch.tensor([sequence])).logits[0]
                assert (given[row, : len(sequence)] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", HYBRIDS)
def test_padding_before_a_prompt_does_not_reach_its_states(dense, name):
    model = load(dense(name))
    ids = random_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    together = torch.cat([padded, random_ids(1, 13, seed=1)])
    is_token = torch.ones_like(together)
    is_token[0, :4] = 0
    positions = (is_token.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = model(together, attention_mask=is_token, position_ids=positions).logits[0, 4:]
    assert (given - logits(model, ids)[0]).abs().max() < 1e-3


@pytest.mark.parametrize(("name", "dropped"), [("qwen3_5_text", (0,)), ("lfm2", (1,)), ("nemotron_h", (0, 1))])
def test_dropped_layers_leave_the_others_what_they_are(dense, tmp_path, name, dropped):
    base = Checkpoint.open(str(dense(name)))
    kept = tuple(Kept.whole(base.architecture, layer) for layer in range(4) if layer not in dropped)
    plan = Plan("depth", 0.25, COMPENSATIONS["none"], kept, {}, dropped)
    skipping = load(base.folder)
    for layer in reversed(dropped):
        del decoder_of(skipping).layers[layer]
    kinds = [kind for layer, kind in enumerate(skipping.config.layer_types) if layer not in dropped]
    skipping.config.layer_types = kinds
    skipping.config.num_hidden_layers = len(kinds)
    for stock in (False, True):
        folder = write_compacted(CheckpointExport(base, plan, stock=stock), tmp_path / str(stock))
        check_folder(folder)
        # Without a cache, which goes by the numbers that the layers of the whole model have.
        with torch.no_grad():
            expected = skipping(random_ids(), use_cache=False).logits
            assert torch.equal(load(folder)(random_ids(), use_cache=False).logits, expected)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
def test_key_value_heads_are_equally_many_beside_states(name):
    architecture = architecture_of(name)
    assert widest_unit(architecture) == "head"
    with pytest.raises(ConfigError, match="no engine serves beside the states that some layers .* choose head or none"):
        WidthConstraints.of(architecture, PruningSection(attention_unit="group"), adds_biases=False)


def test_what_counts_states_or_likens_layers_is_refused():
    architecture = architecture_of("lfm2")
    stored = StoredSizes(architecture.decoder_parameters, 2 * architecture.decoder_parameters, 2)
    memory = TargetSection(memory={"total": 10**10})
    with pytest.raises(ConfigError, match="mixers hold states beside the key-value cache, which are not counted"):
        make_target(memory, architecture, stored)
    official = PruningSection(budget="official", allocation=AllocationSection(kind="uniform"))
    with pytest.raises(ConfigError, match="layers of a lfm2 model have parts that stay whole; use exact"):
        choose_shapes(architecture, official, ratio=0.1, adds_biases=False, scores_L=())


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("granitemoehybrid", {"num_local_experts": 8}, "not supported whose num_local_experts is 8"),
        ("granitemoehybrid", {"layer_types": None}, "no layer_types, which say what layers are made of"),
        ("granitemoehybrid", {"mamba_d_state": None}, "no mamba_d_state"),
        ("nemotron_h", {"layers_block_type": ["moe"] * 4}, "layers of kind moe are not supported"),
        ("nemotron_h", {"num_hidden_layers": 5}, "kinds for 4 layers, and num_hidden_layers is 5"),
    ],
    ids=str,
)
def test_configs_that_say_too_little_or_another_thing_are_refused(name, keys, message):
    content = {key: value for key, value in (MORE_CONFIGS[name]().to_dict() | keys).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Architecture.of(content)


def test_kinds_of_layers_are_read_in_older_words():
    content = MORE_CONFIGS["nemotron_h"]().to_dict()
    del content["layers_block_type"]
    written_out = Architecture.of(content | {"hybrid_override_pattern": "-M-*", "num_hidden_layers": 4})
    assert written_out == architecture_of("nemotron_h")
    content = MORE_CONFIGS["granitemoehybrid"]().to_dict() | {"layer_types": ["mamba", "attention"] * 2}
    assert Architecture.of(content) == architecture_of("granitemoehybrid")
