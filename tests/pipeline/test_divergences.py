"""Divergences: what is measured of cut models in a run, on which tokens, when it is measured again, and resumed."""

import json
import runpy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seap_ray.config import Config, load_config
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Plan
from seap_ray.core.sensitivity import NOISE, Rise
from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.cut_costs import measure_cut_costs
from seap_ray.models.divergence import measure_divergence
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import OpenedLayers
from seap_ray.models.records import PooledCovariance
from seap_ray.pipeline import divergences
from seap_ray.pipeline.divergences import HeldOutShard, PooledTrial, Trial, held_out_shard, measure_all
from seap_ray.pipeline.job import calibrate_run, on_cluster
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.plan_choice import PlanChooser
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import progress
from seap_ray.storage.paths import storage_path
from seap_ray.storage.run import Run
from seap_ray.studies.runner import StudyRunner
from tests.support import ROOT
from tests.support.builders import prompts, random_plan, random_statistics

SEQUENCES = {"sort": prompts([9, 3, 14, 5], seed=1), "facts": prompts([6, 11, 2, 7], seed=2), "words": [[5], [7], [9]]}
"""Token ids by task; those of the last one predict nothing."""

# --- which tokens ----------------------------------------------------------------------------------------------------


def shard_of(run: Run, task: str = "sort", digest: str = "bytes") -> Shard:
    """Write a shard of ``SEQUENCES``."""
    rows = SEQUENCES[task]
    shard = Shard(task, "00001", len(rows), sum(map(len, rows)), digest)
    Path(str(shard.path(run))).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"ids": rows}), str(shard.path(run)))
    return shard


@pytest.mark.parametrize(("n_tokens", "n_sequences"), [(1, 1), (9, 1), (10, 2), (12, 2), (13, 3), (27, 4), (999, 4)])
def test_sequences_are_read_up_to_the_one_that_reaches_the_number_of_tokens(tmp_path, n_tokens, n_sequences):
    run = Run(tmp_path)
    trial = Trial((), shard_of(run), n_tokens, False, "key")
    assert trial.sequences(run) == SEQUENCES["sort"][:n_sequences]


def test_the_last_shard_is_held_out_and_its_record_left_out_where_there_is_another(tmp_path):
    calibration = Calibration("model", "torch.float32", False, 64, covariance=True)
    records = ShardRecords(calibration, Run(tmp_path), None)  # type: ignore[arg-type]
    shards = [Shard("sort", f"{i:05}", 3, 30, f"bytes {i}") for i in range(3)]
    assert held_out_shard(records, shards) == HeldOutShard(shards[2], records.path(shards[2]), tuple(shards[:2]))
    assert held_out_shard(records, shards[:1]) == HeldOutShard(shards[0], None)


# --- what figures depend on ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(dense: Any) -> Checkpoint:
    return Checkpoint.open(str(dense("llama_gqa")))


def export_of(checkpoint: Checkpoint, seed: int = 1, compensation: str = "none", **provenance: Any) -> CheckpointExport:
    """A random cut; where columns are compensated, with random moments."""
    plan = replace(random_plan(checkpoint.architecture, seed, compensation), provenance=provenance)
    statistics = random_statistics(checkpoint.architecture, 3) if compensation == "mean" else None
    return CheckpointExport(checkpoint, plan, statistics)


def trial_of(exports: Sequence[CheckpointExport], shard: Shard, *, by_site: bool = False, **sections: Any) -> Trial:
    return Trial.of(Config.model_validate(sections), exports, shard, by_site=by_site)


def test_another_key_for_all_that_changes_the_figures_and_the_same_for_what_does_not(checkpoint):
    shard = Shard("sort", "00001", 4, 31, "bytes")
    statistics = {"tasks": {"sort": 1.0}, "statistics": {"sort": "hash"}}
    export = export_of(checkpoint, compensation="mean", **statistics)
    trial = trial_of([export], shard)

    def planned(**changes: Any) -> CheckpointExport:
        return replace(export, plan=replace(export.plan, **changes))

    def fitted(record: str | None) -> CheckpointExport:
        """The same with covariances, without those of a record."""
        held_out = (storage_path(Path(record)) if record else None,)
        pooled = PooledCovariance((storage_path(Path("sort.safetensors")),), (1.0,), held_out=held_out)
        return replace(planned(compensation=COMPENSATIONS["least_squares"]), statistics=pooled)

    others = [
        trial_of([export], replace(shard, digest="other bytes")),
        trial_of([export], shard, by_site=True),
        trial_of([export], shard, pruning={"held_out_tokens": 5}),
        trial_of([export], shard, model={"dtype": "bfloat16"}),
        trial_of([export], shard, calibration={"batch_tokens": 64}),
        trial_of([export], shard, calibration={"skip_first_token": True}),
        trial_of([export, export_of(checkpoint)], shard),
        trial_of([export_of(checkpoint, 2, "mean", **statistics)], shard),
        trial_of([planned(compensation=COMPENSATIONS["none"])], shard),
        trial_of([planned(provenance={**statistics, "statistics": {"sort": "other"}})], shard),
        trial_of([planned(provenance={**statistics, "ridge": 0.1})], shard),
        trial_of([planned(dropped=(4,))], shard),
        trial_of([fitted("a/00001-abc.safetensors")], shard),
        trial_of([fitted("a/00001-def.safetensors")], shard),
        trial_of([fitted(None)], shard),
    ]
    keys = [trial.key, *(other.key for other in others)]
    assert len(set(keys)) == len(keys)

    run_section = {"name": "other", "storage": "elsewhere"}
    assert trial_of([export], shard, run=run_section, calibration={"num_cpus": 3, "workers": 2}).key == trial.key
    assert trial_of([planned(name="other", requested=0.1, judged=({},))], shard).key == trial.key
    moved = trial_of([fitted("b/00001-abc.safetensors")], shard)
    assert moved.key == others[-3].key, "a run that is moved is not measured again"


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure without Ray; the list gets the key of every trial that is measured."""
    keys: list[str] = []

    def measure_missing(config: Config, run: Run, trials: Sequence[Trial]) -> Iterator[int]:
        for trial in trials:
            divergences._measure(config, run, trial)
            keys.append(trial.key)
            yield len(trial.exports)

    monkeypatch.setattr(divergences, "_measure_missing", measure_missing)
    return keys


def pooled_of(
    config: Config, run: Run, exports: Sequence[CheckpointExport], weights: dict[str, float], *, by_site: bool = False
) -> PooledTrial:
    trials = [Trial.of(config, exports, shard_of(run, task, task), by_site=by_site) for task in weights]
    return PooledTrial(tuple(trials), tuple(weights.values()))


@pytest.mark.parametrize("by_site", [False, True])
def test_figures_are_those_of_the_tasks_own_tokens_by_their_weights(checkpoint, tmp_path, measured_here, by_site):
    config = Config.model_validate({"calibration": {"batch_tokens": 20}})
    run = Run(tmp_path)
    exports = [export_of(checkpoint, 1), export_of(checkpoint, 2, "mean")]
    pooled = pooled_of(config, run, exports, {"sort": 3.0, "facts": 1.0}, by_site=by_site)

    (measured,) = measure_all(config, run, [pooled], progress)

    layers = OpenedLayers.open(config, checkpoint)
    for i, export in enumerate(exports):
        by_task = []
        for task in ("sort", "facts"):
            batches = layers.embed(SEQUENCES[task])
            (alone,) = measure_divergence(layers.model, layers.forwards(), batches, [export])
            by_task.append(alone)
            if by_site:
                costs = measure_cut_costs(layers.model, layers.forwards(), layers.backwards(), batches, export).costs()
                stored = json.loads(pooled.trials[len(by_task) - 1].artifact(run).path.read_text())["models"][i]
                assert stored["costs"] == [[*key, cost.mean, cost.stderr] for key, cost in costs.items()]
                assert set(measured[i].costs) == set(costs)
        assert measured[i].divergence.mean == pytest.approx(0.75 * by_task[0].rise.mean + 0.25 * by_task[1].rise.mean)
        assert measured[i].loss.mean == pytest.approx(0.75 * by_task[0].loss.mean + 0.25 * by_task[1].loss.mean)
        assert measured[i].divergence.mean > 0 and bool(measured[i].costs) == by_site


def test_a_task_whose_tokens_predict_nothing_does_not_count(checkpoint, tmp_path, measured_here):
    config = Config()
    run = Run(tmp_path)
    exports = [export_of(checkpoint)]
    alone, both, nothing = (
        pooled_of(config, run, exports, weights)
        for weights in ({"sort": 1.0}, {"words": 5.0, "sort": 2.0}, {"words": 1.0})
    )
    ((expected,), (measured,)) = measure_all(config, run, [alone, both], progress)
    assert measured == expected
    with pytest.raises(DataError, match=r"^pruning\.allocation: the held-out texts .* set allocation, score"):
        measure_all(config, run, [nothing], progress)


def test_costs_of_tasks_are_averaged_by_weight_where_both_have_them():
    sequences = {"sequences": [[1.0], [1.0]]}
    first = {
        "divergence": [1.0, 0.0],
        "loss": [0.0, 0.0],
        **sequences,
        "costs": [[0, "mlp", 1.0, 0.4], [1, "attn", 2.0, 0.0]],
    }
    second = {
        "divergence": [3.0, 0.0],
        "loss": [8.0, 0.3],
        **sequences,
        "costs": [[0, "mlp", 5.0, 0.0], [1, "attn", 2.0, 0.0]],
    }
    measured = divergences._pooled([first, None, second], [3.0, 9.0, 1.0])
    assert measured.divergence == Rise(1.5, 0.0)
    assert (measured.loss.mean, measured.loss.stderr) == (2.0, pytest.approx(0.075))
    assert measured.costs[0, "mlp"].mean == 2.0 and measured.costs[0, "mlp"].stderr == pytest.approx(0.3)
    assert measured.costs[1, "attn"] == Rise(2.0, 0.0)


# --- once ------------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_read_and_what_is_missing_or_damaged_is_measured(checkpoint, tmp_path, measured_here):
    config = Config()
    run = Run(tmp_path)
    first, second = (pooled_of(config, run, [export_of(checkpoint, i)], {"sort": 1.0, "facts": 1.0}) for i in (1, 2))
    keys = [trial.key for pooled in (first, second) for trial in pooled.trials]

    before = measure_all(config, run, [first, first], progress)
    assert measured_here == keys[:2] and before[0] == before[1], "what is asked for twice is measured once"
    after = measure_all(config, run, [second, first], progress)
    assert measured_here == keys and after[1] == before[0] != after[0]
    assert measure_all(config, run, [first, second], progress) == after[::-1] and measured_here == keys

    path = Path(str(first.trials[1].artifact(run).path))
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole.replace(keys[1].encode(), b"other"), b""):
        path.write_bytes(damaged)
        assert measure_all(config, run, [first], progress) == before[:1] and path.read_bytes() == whole
    assert measured_here == keys + keys[1:2] * 3


# --- in a job --------------------------------------------------------------------------------------------------------

OPEN = [
    "model.dtype=float32",
    "tasks=[arithmetic, logic]",
    "corpus.samples=24",
    "corpus.shard_sequences=8",
    "calibration.workers=1",
    "evaluation.samples=0",
    "pruning.ratio=0.4",
    "pruning.score=auto",
    "pruning.compensation=auto",
    "pruning.attention_unit=auto",
    "pruning.allocation.kind=auto",
    "pruning.held_out_tokens=64",
    "pruning.baselines={}",
]
main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]


def arguments(storage: Path, *more: str) -> list[str]:
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", "run.name=run", *OPEN, *more]


def files(storage: Path, folder: str, pattern: str = "*/*.json") -> dict[str, bytes]:
    """Bytes of a run's files."""
    root = storage / "run" / folder
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(pattern))}


@pytest.fixture(scope="module")
def finished(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a finished run in which everything was left open."""
    storage = tmp_path_factory.mktemp("finished")
    assert main(arguments(storage)) == 0
    return storage


@pytest.mark.ray
def test_a_job_that_leaves_all_open_judges_and_says_what_it_took(finished):
    plans = {name: json.loads(content) for name, content in files(finished, "plans").items()}
    general = plans["0.40/general.json"]
    assert {row["compensation"] for row in general["judged"]} == {"least_squares", "mean", "none"}
    assert {row["allocation"] for row in general["judged"]} == {"measured", "uniform", "logistic", "global"}
    for plan in plans.values():
        assert plan["planned_ratio"] == pytest.approx(0.4, abs=0.01)
        assert "auto" not in (plan["score"], plan["compensation"], plan["attention_unit"], plan["allocation"]["kind"])
        repairs = [row for row in plan["judged"] if row["allocation"] == "uniform"][:4]
        best = min(repairs, key=lambda row: row["divergence"])
        assert (plan["score"], plan["compensation"]) == (best["score"], best["compensation"])
        assert plan["layers"] == general["layers"], "one engine holds all"

    allocations = general["judged"][4:]
    best = min(allocations, key=lambda row: row["divergence"])
    taken = general["allocation"]["kind"], general["attention_unit"]
    (row,) = [row for row in allocations if (row["allocation"], row["attention_unit"]) == taken]
    # Differences have no more noise than both figures together.
    assert row["divergence"] - best["divergence"] <= NOISE * (row["stderr"] + best["stderr"])
    assert {name.partition("/")[0] for name in files(finished, "divergences")} == {"arithmetic", "logic"}


@pytest.mark.ray
def test_the_same_command_and_another_ratio_measure_nothing_again(finished, capsys):
    folder = finished / "run" / "divergences"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert main(arguments(finished)) == 0
    output = capsys.readouterr()
    assert "judging" not in output.out + output.err
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")} == before


@pytest.mark.ray
def test_another_number_of_workers_gives_the_same_figures_byte_for_byte(finished, tmp_path):
    assert main(arguments(tmp_path, "calibration.workers=2")) == 0
    assert files(tmp_path, "divergences") == files(finished, "divergences")
    assert files(tmp_path, "plans") == files(finished, "plans")
    assert files(tmp_path, "plans", "*/*.safetensors") == files(finished, "plans", "*/*.safetensors")


@pytest.mark.ray
def test_a_job_that_was_cut_short_while_it_judged_goes_on_with_what_it_had(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("experts", "plans"):
        shutil.rmtree(tmp_path / "run" / name)
    # Files are whole or not there, and later ones depend on earlier ones: so a killed job leaves them.
    in_order = sorted((tmp_path / "run" / "divergences").glob("*/*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in in_order[3:]:
        path.unlink()

    had = {path: path.stat().st_mtime_ns for path in in_order[:3]}
    assert len(in_order) > 3
    assert main(arguments(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in had} == had
    assert files(tmp_path, "divergences") == files(finished, "divergences")
    assert files(tmp_path, "plans") == files(finished, "plans")


@pytest.mark.ray
def test_a_part_of_a_tasks_shards_is_judged_on_its_own_last_shard(finished):
    judged: dict[str, tuple[Plan, Trial]] = {}

    def work(config: Config, checkpoint: Checkpoint, run: Run) -> None:
        runner = StudyRunner(calibrate_run(config, checkpoint, run))
        shards = runner.manifest("logic").shards
        assert len(shards) == 3
        planner = runner.planner_with_parts({"two": shards[:2], "one": shards[1:2]})
        records = ShardRecords.of(config, checkpoint, run)
        assert planner.held_out["two"] == HeldOutShard(shards[1], records.path(shards[1]), tuple(shards[:1]))
        assert planner.held_out["one"] == HeldOutShard(shards[1], None)
        assert planner.held_out["logic"] == HeldOutShard(shards[2], records.path(shards[2]), tuple(shards[:2]))

        chooser = PlanChooser(planner, progress)
        for name in ("one", "two"):
            open_settings = config.plan_settings(config.pruning.general)
            settings = open_settings.model_copy(update={"allocation": "uniform", "attention_unit": "none"})
            spec = ModelSpec(name, "baseline", name, {name: 1.0}, settings, task="logic")
            (trial,) = chooser._repair_trials(spec, 0.4)[0].trials
            judged[name] = chooser.plan_model(spec, 0.4).export.plan, trial
            assert trial.shard == shards[1] and trial.artifact(run).is_made()

    on_cluster(load_config(arguments(finished)), work, check_evaluation_rows=False)
    for plan, _ in judged.values():
        assert len(plan.judged) == 4 and all(row["divergence"] > 0 for row in plan.judged)
    assert judged["one"][1].key != judged["two"][1].key
