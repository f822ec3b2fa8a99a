"""Quantised checkpoints, loaded by transformers through compressed-tensors and compared with rounding in memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seap_ray.config import Config, QuantizationSection
from seap_ray.core.architecture import Shape
from seap_ray.core.plan import Plan
from seap_ray.core.rounding import ErrorFeedback, IntegerGrid, gptq
from seap_ray.errors import ConfigError
from seap_ray.models import quantization
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import record
from seap_ray.models.loading import decoder_of, load_model
from seap_ray.models.quantization import QuantizedExport, require_compressed_tensors
from tests.support.builders import load, logits, prompts, random_ids, random_plan, uniform_plan, write_compacted
from tests.support.oracles import tensors_of

pytest.importorskip("compressed_tensors")

SEQUENCES = prompts([40] * 12, seed=1)
GROUP = 16
"""Columns that share a scale: three groups of a hidden state of 48."""


class Covariances(dict):  # type: ignore[type-arg]
    """What a model's activations were measured to be, each with one ridge."""

    def ridge_of(self, _key: Any) -> float:
        return 0.01


def quantised(folder: Path, scheme: str, plan: Plan | None = None, rounding: str = "gptq") -> QuantizedExport:
    """A cut model and how it is quantised, by its own activations."""
    base = Checkpoint.open(str(folder))
    n_layers = base.architecture.n_layers
    recorded = record(load(folder), SEQUENCES, batch_tokens=200, covariances=range(n_layers), inputs=True)
    covariances = Covariances(recorded)
    settings = QuantizationSection(scheme=scheme, group=GROUP if scheme.startswith("w4") else "auto", rounding=rounding)  # type: ignore[arg-type]
    by = {"covariances": covariances, "inputs": covariances} if rounding == "gptq" else {}
    plan = plan or plan_for(base, scheme)
    return QuantizedExport(base, plan, covariances, settings=settings, **by)  # type: ignore[arg-type]


def plan_for(base: Checkpoint, scheme: str, compensation: str = "least_squares") -> Plan:
    """Other widths in every layer, or with groups, which they must be multiples of, fewer channels in all."""
    architecture = base.architecture
    dense = architecture.dense
    if scheme.startswith("w4"):
        return uniform_plan(architecture, Shape(dense.groups, dense.heads_per_group, 4 * GROUP), compensation)
    return random_plan(architecture, 1, compensation)


def plain(export: QuantizedExport) -> CheckpointExport:
    """The same model before it is quantised."""
    return CheckpointExport(export.base, export.plan, export.statistics, stock=export.stock)


def moments_of(export: QuantizedExport, layer: int, name: str, *, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is minimised for a module, and the means of its kept inputs."""
    family = export.base.architecture.family
    kept = export.plan.kept[layer]
    if name in family.rows:
        site = "mlp_in" if "channels" in family.rows[name].units else "attn_in"
        covariance = export.inputs[layer, site]  # type: ignore[index]
        columns = [*range(len(covariance.mean_D))]
    elif name == family.o_proj:
        head_dim = export.base.architecture.head_dim
        covariance = export.covariances[layer, "attn"]  # type: ignore[index]
        columns = [head * head_dim + i for head in kept.heads for i in range(head_dim)]
    else:
        covariance = export.covariances[layer, "mlp"]  # type: ignore[index]
        columns = [*kept.channels[0]]

    mean_S = covariance.mean_D[columns]
    covariance_SS = covariance.covariance_DD[columns][:, columns].double()
    return covariance_SS if has_bias else covariance_SS + torch.outer(mean_S, mean_S), mean_S


def rounded_in_memory(model: Any, export: QuantizedExport) -> Any:
    """A cut model whose weights are rounded here, each by the moments of its kept inputs."""
    family = export.base.architecture.family
    scheme = export.settings.scheme or ""
    for layer, block in enumerate(decoder_of(model).layers):
        for name in [*family.rows, *family.columns]:
            linear = block.get_submodule(name)
            weight_OD = linear.weight.data
            grid = IntegerGrid.of(
                weight_OD,
                bits=int(scheme[1]),
                columns=export.columns,
                is_symmetric=scheme != "w4a16_asym",
                scale_dtype=weight_OD.dtype,
            )
            if export.settings.rounding == "nearest":
                linear.weight.data = grid.values(grid.codes(weight_OD)).to(weight_OD)
                continue

            moments_SS, mean_S = moments_of(export, layer, name, has_bias=linear.bias is not None)
            codes_OD = gptq(weight_OD, grid, ErrorFeedback.of(moments_SS))
            linear.weight.data = grid.values(codes_OD).to(weight_OD)
            if linear.bias is not None:
                error_OD = weight_OD.double() - grid.values(codes_OD, torch.float64)
                linear.bias.data = (linear.bias.data.double() + error_OD @ mean_S).to(weight_OD)
    return model


WEIGHTS_ONLY = [
    *[("llama_gqa", scheme, "gptq") for scheme in ("w4a16", "w4a16_asym", "w8a16")],
    ("llama_gqa", "w4a16", "nearest"),
    *[(name, "w8a16", "gptq") for name in ("llama_biased", "phi3", "gemma3", "opt", "gpt_neox")],
    ("qwen2", "w4a16", "gptq"),
]


@pytest.mark.parametrize(("name", "scheme", "rounding"), WEIGHTS_ONLY)
def test_a_quantised_model_computes_what_its_rounded_weights_compute(
    dense: Any, tmp_path: Path, name: str, scheme: str, rounding: str
) -> None:
    export = quantised(dense(name), scheme, rounding=rounding)
    expected = rounded_in_memory(load(write_compacted(plain(export), tmp_path / "plain")), export)

    loaded = load(write_compacted(export, tmp_path / "quantised"))

    ids = random_ids()
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)


def test_activations_of_eight_bits_change_little_and_the_weights_are_the_same(dense: Any, tmp_path: Path) -> None:
    export = quantised(dense("llama_gqa"), "w8a8")
    expected = rounded_in_memory(load(write_compacted(plain(export), tmp_path / "plain")), export)

    loaded = load(write_compacted(export, tmp_path / "quantised"))

    ids = random_ids()
    found = logits(loaded, ids)
    wanted = logits(expected, ids)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compensation", ["least_squares", "none"])
def test_gptq_is_nearer_to_the_model_before_than_rounding_to_nearest(
    dense: Any, tmp_path: Path, compensation: str
) -> None:
    base = Checkpoint.open(str(dense("llama_gqa")))
    plan = plan_for(base, "w4a16", compensation)
    ids = torch.tensor(SEQUENCES[:4])
    distances = {}
    for rounding in ("gptq", "nearest"):
        export = quantised(dense("llama_gqa"), "w4a16", plan, rounding)
        before = logits(load(write_compacted(plain(export), tmp_path / f"plain{rounding}")), ids)
        after = logits(load(write_compacted(export, tmp_path / rounding)), ids)
        distances[rounding] = float((after - before).square().mean())
    assert distances["gptq"] < 0.8 * distances["nearest"]


def test_a_dense_model_can_be_quantised_and_nothing_else(dense: Any, tmp_path: Path) -> None:
    base = Checkpoint.open(str(dense("llama_gqa")))
    plan = uniform_plan(base.architecture, base.architecture.dense)
    export = quantised(dense("llama_gqa"), "w4a16", plan)
    folder = write_compacted(export, tmp_path / "quantised")

    expected = rounded_in_memory(load(dense("llama_gqa")), export)
    torch.testing.assert_close(logits(load(folder), random_ids()), logits(expected, random_ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_loaded_model_may_be_run_in_parts(dense: Any, tmp_path: Path, scheme: str) -> None:
    export = quantised(dense("llama_gqa"), scheme)
    folder = write_compacted(export, tmp_path / "quantised")

    model = load_model(Config(), export.base, folder)

    ids = random_ids()
    with torch.no_grad():
        hidden_BTD = decoder_of(model)(ids).last_hidden_state
        found = model.get_output_embeddings()(hidden_BTD)
    assert torch.equal(found, logits(load(folder), ids))


def test_layers_behind_one_that_is_dropped_are_rounded_by_their_own_inputs(dense: Any) -> None:
    base = Checkpoint.open(str(dense("llama_gqa")))
    plan = uniform_plan(base.architecture, base.architecture.dense)
    without = replace(plan, kept=(plan.kept[0], *plan.kept[2:]), dropped=(1,))

    whole = quantised(dense("llama_gqa"), "w4a16", plan)
    shorter = quantised(dense("llama_gqa"), "w4a16", without)

    for module in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        expected = whole.rounded(2, module)
        for kind, tensor in shorter.rounded(1, module).items():
            assert torch.equal(tensor, expected[kind])


def test_all_that_is_no_weight_of_a_linear_module_is_the_bases_and_shared_among_models(
    dense: Any, tmp_path: Path
) -> None:
    export = quantised(dense("llama_gqa"), "w4a16")
    dense_tensors = tensors_of(dense("llama_gqa"))
    files = export.files(10**9)
    folder = write_compacted(export, tmp_path / "quantised")

    tensors = tensors_of(folder)
    modules = [*export.base.architecture.family.rows, *export.base.architecture.family.columns]
    for name, tensor in dense_tensors.items():
        if not any(module in name for module in modules):
            assert torch.equal(tensors[name], tensor), name
    shared = [outputs for file, outputs in files.items() if file.startswith("model-base-")]
    assert {output.name for output in shared[0]} == {
        name for name in dense_tensors if not any(module in name for module in modules)
    }


@pytest.mark.parametrize("max_bytes", [10**9, 4000])
def test_files_are_as_large_as_planned_and_the_same_bytes_again(dense: Any, tmp_path: Path, max_bytes: int) -> None:
    export = quantised(dense("qwen2"), "w4a16_asym")
    first = write_compacted(export, tmp_path / "first", max_bytes)
    second = write_compacted(export, tmp_path / "second", max_bytes)

    # Parts of a weight may be in two files: it is rounded twice, and the same.
    names = [file.name for file in sorted(first.glob("*.safetensors"))]
    assert len(names) > (1 if max_bytes < 10**9 else 0)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    sizes = {output.name: output.n_bytes for output in export.outputs()}
    assert sizes == {name: tensor.nbytes for name, tensor in tensors_of(first).items()}


def test_four_bits_take_a_quarter_of_two_bytes(dense: Any) -> None:
    export = quantised(dense("llama_gqa", torch.bfloat16), "w4a16")
    in_layers = [output for output in export.outputs() if "layers" in output.name and "norm" not in output.name]
    before = sum(output.n_bytes for output in plain(export).outputs() if output.name.endswith("proj.weight"))
    packed = sum(output.n_bytes for output in in_layers if output.name.endswith("packed"))
    scales = sum(output.n_bytes for output in in_layers if output.name.endswith("scale"))
    assert packed == before / 4
    assert scales == before / GROUP


@pytest.mark.parametrize(
    ("scheme", "weights", "file_format", "activations"),
    [
        ("w4a16", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True}, "pack-quantized", None),
        ("w4a16_asym", {"num_bits": 4, "strategy": "group", "symmetric": False}, "pack-quantized", None),
        ("w8a16", {"num_bits": 8, "strategy": "channel", "group_size": None}, "pack-quantized", None),
        ("w8a8", {"num_bits": 8, "strategy": "channel"}, "int-quantized", {"dynamic": True, "strategy": "token"}),
    ],
)
def test_the_config_says_what_the_weights_are(
    dense: Any, scheme: str, weights: dict[str, Any], file_format: str, activations: dict[str, Any] | None
) -> None:
    export = quantised(dense("llama_gqa"), scheme)
    config = json.loads(json.dumps(export.config()))["quantization_config"]

    assert config["quant_method"] == "compressed-tensors"
    assert (config["format"], config["quantization_status"], config["ignore"]) == (
        file_format,
        "compressed",
        ["lm_head"],
    )
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert weights.items() <= group["weights"].items()
    assert (
        group["input_activations"] is None
        if activations is None
        else activations.items() <= group["input_activations"].items()
    )
    # All else is what it is without.
    assert {key: value for key, value in export.config().items() if key != "quantization_config"} == plain(
        export
    ).config()


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compressed_tensors()
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="export.quantization: needs the package compressed-tensors"):
        require_compressed_tensors()
