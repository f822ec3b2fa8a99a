import random
from itertools import combinations, product

import numpy as np
import pytest
from sklearn.decomposition import PCA

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.report import model_plots as anatomy
from seap_ray.report.artifacts import Cut, Evidence
from seap_ray.report.model_plots import Overlap, principal, standardised, unit_scores, with_own_kind
from seap_ray.storage.files import write_json
from seap_ray.storage.run import Run
from tests.support.builders import CONFIGS
from tests.support.made_run import ARCHITECTURE, RATIOS, TASKS, edit, make_planner, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def random_cut(rng, places):
    kept = {}
    for layer, unit, width in places:
        kept[f"layers.{layer}.{unit}"] = np.array(sorted(rng.sample(range(width), rng.randint(1, width))))
    return Cut({"name": f"{rng.random()}"}, kept)


# --- overlap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_intersection_over_union_of_sets(seed):
    rng = random.Random(seed)
    places = [(layer, unit, width) for layer in range(3) for unit, width in (("heads", 6), ("channels", 20))]
    cuts = [random_cut(rng, places) for _ in range(4)]
    sets = [{(layer, unit, int(i)) for layer, unit, _ in places for i in cut.indices(layer, unit)} for cut in cuts]
    found = Overlap.of(cuts, places)
    for a, b in product(range(4), repeat=2):
        assert found.jaccard_MM[a, b] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]), abs=1e-12)
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    assert found.mean == pytest.approx(sum(pairs) / len(pairs))


def test_chance_is_the_mean_intersection_of_all_choices_of_units():
    places = [(0, "heads", 4), (0, "channels", 5)]
    sizes = (2, 3), (1, 4)
    choices = [
        [
            set(h) | {10 + c for c in channels}
            for h, channels in product(combinations(range(4), n), combinations(range(5), m))
        ]
        for n, m in sizes
    ]
    both = np.mean([len(a & b) for a, b in product(*choices)])
    cuts = [Cut({"name": ""}, {"layers.0.heads": np.arange(n), "layers.0.channels": np.arange(m)}) for n, m in sizes]
    assert Overlap.of(cuts, places).chance_MM[0, 1] == pytest.approx(both / (2 + 3 + 1 + 4 - both))


def test_layers_that_are_gone_in_all_models_have_no_overlap():
    empty = {"layers.0.heads": np.array([], int)}
    found = Overlap.of([Cut({"name": "a"}, empty), Cut({"name": "b"}, empty)], [(0, "heads", 4)])
    assert np.isnan(found.jaccard_MM).all()


def test_the_overlap_picture_is_of_the_plans_on_disk(run):
    part = anatomy.overlap(Evidence.of(run))
    cuts = Evidence.of(run).cuts[0.4]
    sets = {
        cut.name: {(key, int(i)) for key, kept in cut.kept.items() if "groups" not in key for i in kept} for cut in cuts
    }
    panel = part.picture.panels[1]
    assert panel.rows[-1] == "general" and set(panel.rows) == {*TASKS, "general"}
    for (i, a), (j, b) in product(enumerate(panel.rows), repeat=2):
        assert panel.values[i][j] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))


# --- sparsity --------------------------------------------------------------------------------------------------------


def test_what_the_layers_are_asked_for_averages_to_the_ratio_and_what_they_give_is_the_plans(run):
    evidence = Evidence.of(run)
    part = anatomy.sparsity(evidence)
    assert [panel.title for panel in part.picture.panels] == [
        f"{site}, {100 * ratio:g} % removed" for ratio in RATIOS for site in ("attention", "MLP")
    ]
    for ratio, panel in zip(RATIOS, part.picture.panels[1::2], strict=True):
        by_label = {series.label: series.y for series in panel.series}
        assert np.mean(by_label["asked of the layer"]) == pytest.approx(100 * ratio)
        (general,) = (cut for cut in evidence.cuts[ratio] if cut.kind == "general")
        kept = [len(general.indices(layer, "channels")) for layer in range(ARCHITECTURE.n_layers)]
        assert by_label["general"] == pytest.approx([100 * (1 - n / ARCHITECTURE.dense.channels) for n in kept])


def test_an_allocation_that_follows_the_scores_asks_for_nothing_beforehand(run, tmp_path):
    other = make_run(tmp_path / "demo")
    for path in other.root.glob("plans/*/*.json"):
        edit(path, lambda plan: plan["allocation"].update(kind="global"))
    part = anatomy.sparsity(Evidence.of(other))
    assert {series.label for panel in part.picture.panels for series in panel.series} == {"experts", "general"}


def test_shares_are_of_a_layers_own_units_and_of_each_expert_of_a_mixture():
    config = {**CONFIGS["mixtral"]().to_dict(), "model_type": "seap_mixtral"}
    narrow = {"1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}}
    architecture = Architecture.of({**config, "per_layer_config": narrow})
    cut = Cut({"layers": [{"heads": 4, "channels": 20}] * 4}, {})
    assert cut.share_cut("heads", architecture) == [0.5, 0, 0.5, 0.5]
    assert cut.share_cut("channels", architecture) == [0.75, 0.5, 0.75, 0.75]


def test_what_the_models_were_cut_from_is_told_by_it_or_by_what_was_cut_from_a_dense_one(tmp_path):
    run, narrow = make_run(tmp_path / "demo"), {"0": {"intermediate_size": 40}}
    compacted = {**CONFIGS["llama_gqa"]().to_dict(), "model_type": "seap_llama", "per_layer_config": narrow}

    def known(model_type, gone):
        write_json(run.root / "model" / "config.json", {**compacted, "model_type": model_type})
        folder = run.root / "experts" / "sort"
        write_json(folder / "config.json", compacted)
        write_json(folder / "seap.json", {"source": {"model_type": model_type}})
        edit(run.results, lambda results: results["models"][1].update(folder=str(folder)))
        if gone:
            (run.root / "model" / "config.json").unlink()
        return Evidence.of(run).architecture

    assert known("seap_llama", gone=False).layers[0].shape.channels == 40
    assert known("llama", gone=True) == ARCHITECTURE
    assert known("seap_llama", gone=True) is None


# --- activations -----------------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_scikit_learn():
    x_PD = standardised(np.random.default_rng(0).normal(size=(12, 30)) * np.arange(1, 31))
    at_P2, explained = principal(x_PD)
    pca = PCA(2, svd_solver="full").fit(x_PD)
    assert np.abs(at_P2) == pytest.approx(np.abs(pca.transform(x_PD)))
    assert explained == pytest.approx(pca.explained_variance_ratio_)
    assert (at_P2[np.abs(at_P2).argmax(0), [0, 1]] > 0).all()
    assert principal(-x_PD)[0] == pytest.approx(at_P2), "the picture does not depend on a component's free sign"


def test_a_channel_that_never_changes_says_nothing():
    x_PD = standardised(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert x_PD.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_neighbours_count_only_for_tasks_with_several_shards():
    x_PD = np.array([[0.0], [0.1], [1.0], [1.05], [1.1], [9.0]])
    labels = ["a", "a", "b", "a", "b", "c"]
    assert with_own_kind(x_PD, labels) == pytest.approx(2 / 5)
    assert with_own_kind(x_PD[:2], ["a", "b"]) is None


def test_shards_of_tasks_that_activate_otherwise_lie_apart(run):
    part = anatomy.clusters(Evidence.of(run))
    assert [panel.title for panel in part.picture.panels] == ["layer 0", "layer 2", "layer 3"]
    assert "100 % in layer 0, 100 % in layer 2, 100 % in layer 3" in part.shows
    for panel in part.picture.panels:
        assert [(series.label, len(series.x)) for series in panel.series] == [(task, 3) for task in TASKS]


def test_a_task_with_one_shard_is_one_point(run, tmp_path):
    other = make_run(tmp_path / "demo")
    for path in sorted(other.records("sort").iterdir())[1:]:
        path.unlink()
    part = anatomy.clusters(Evidence.of(other))
    assert {series.label: len(series.x) for series in part.picture.panels[0].series}["sort"] == 1


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama_gqa", "mixtral"])
def test_scores_are_those_that_the_plans_were_made_from(tmp_path, model):
    evidence = Evidence.of(make_run(tmp_path / "demo", model=model))
    config = Config.model_validate(evidence.config)
    planner = make_planner(config, Run(tmp_path / "other"), model)
    architecture = planner.checkpoint.architecture
    for spec in (spec for spec in model_specs(config) if spec.kind != "baseline"):
        (cut,) = (cut for cut in evidence.cuts[0.4] if cut.name == spec.name)
        found = unit_scores(evidence, architecture, cut)
        for layer, (heads, channels) in enumerate(planner._column_scores(spec)):
            assert found["heads"][layer] == pytest.approx(heads.numpy())
            assert found["channels"][layer] == pytest.approx(channels.numpy().flatten())
            kept, width = cut.indices(layer, "channels"), architecture.dense.channels
            of_experts = found["channels"][layer].reshape(-1, width)
            for expert, score_C in enumerate(of_experts):
                best = np.argsort(score_C, kind="stable")[width - len(kept) // len(of_experts) :]
                assert set(kept[kept // width == expert]) == set(best + expert * width)
    part = anatomy.scores(evidence)
    assert [panel.title for panel in part.picture.panels][:2] == ["general: channels", "arithmetic: channels"]


def test_the_papers_sum_of_scores_is_known_too(run):
    evidence = Evidence.of(run)
    (cut,) = (cut for cut in evidence.cuts[0.4] if cut.name == "general")
    summed = unit_scores(evidence, ARCHITECTURE, Cut({**cut.about, "pooling": "score_average"}, cut.kept))
    alone = {
        task: unit_scores(evidence, ARCHITECTURE, Cut({**cut.about, "tasks": {task: 1.0}}, cut.kept)) for task in TASKS
    }
    for layer in range(ARCHITECTURE.n_layers):
        expected = sum(weight * alone[task]["heads"][layer] for task, weight in cut.about["tasks"].items())
        assert summed["heads"][layer] == pytest.approx(expected)


def test_the_bands_are_the_quantiles_of_the_scores(run):
    evidence = Evidence.of(run)
    panel = anatomy.scores(evidence).picture.panels[0]
    (cut,) = (cut for cut in evidence.cuts[0.4] if cut.name == "general")
    channels = unit_scores(evidence, ARCHITECTURE, cut)["channels"]
    median, lowest = panel.series
    assert panel.title == "general: channels"
    for layer, score_C in enumerate(channels):
        ordered = np.sort(score_C)
        assert median.y[layer] == pytest.approx((ordered[39] + ordered[40]) / 2)
        (low, high), (below, above) = median.bands
        assert low[layer] <= below[layer] <= median.y[layer] <= above[layer] <= high[layer]
    for layer, value in zip(lowest.x, lowest.y, strict=True):
        assert value == pytest.approx(np.sort(channels[layer])[-len(cut.indices(layer, "channels"))])


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("plans/*/*", ["clusters"]),
        ("records/*/*", ["sparsity", "overlap", "scores"]),
        ("statistics/weight_norms.safetensors", ["sparsity", "overlap", "clusters"]),
        ("statistics/sort.safetensors", ["sparsity", "overlap", "clusters", "scores"]),
        ("model/config.json", []),
    ],
)
def test_a_picture_needs_its_files_and_no_others(tmp_path, gone, parts):
    run = make_run(tmp_path / "demo")
    for path in run.root.glob(gone):
        path.unlink()
    evidence = Evidence.of(run)
    makers = (anatomy.sparsity, anatomy.overlap, anatomy.clusters, anatomy.scores)
    assert [part.key for make in makers if (part := make(evidence))] == parts
