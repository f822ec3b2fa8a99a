"""Benchmarks: turns, rows, files and the page; of the suites, the small parts that are not about time."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import calibrate, route, suites
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import served
from benchmarks.gpu.decoding import CAUSAL, cut_config
from benchmarks.gpu.device import SIZES, TINY, Ceilings, build_model
from benchmarks.gpu.engine import Engine, difference
from benchmarks.load import Load
from benchmarks.measure import Rounds, Row, alternate, is_met, load_rows, machine, save_rows
from benchmarks.merge import peak_memory
from seap_ray.config import Config
from seap_ray.errors import ConfigError

ROW = Row.of(
    "compact",
    "writing",
    baseline=100.0,
    ours=50.0,
    unit="MB/s",
    command="python jobs/bench.py compact",
    ratios=[0.4, 0.5, 0.7],
    limit=100.0,
    limit_name="copy",
    target="ratio >= 0.6",
    why="hashing takes as long",
)


def config(folder, **settings):
    return Config.model_validate({"benchmarks": {"folder": str(folder), **settings}})


def test_contestants_take_turns_and_none_always_follows_the_same():
    called = []
    clock = iter(range(1000))
    timings = alternate(
        {name: lambda name=name: called.append(name) for name in "abc"},
        3,
        before=lambda: called.append("-"),
        now=lambda: next(clock),
    )
    assert "".join(called) == "-a-b-c" + "-a-b-c" + "-a-c-b" + "-c-a-b"
    assert timings.seconds == {name: [1, 1, 1] for name in "abc"}


def test_ratios_are_of_the_same_round():
    timings = Rounds({"base": [1.0, 10.0, 2.0], "ours": [2.0, 5.0, 4.0]})
    assert timings.ratios("ours", "base") == [2.0, 0.5, 2.0] and timings.median("ours") == 4.0
    assert timings.speedups("ours", "base") == [0.5, 2.0, 0.5]


@pytest.mark.parametrize(
    ("target", "met"),
    [("ratio <= 1.1", True), ("ratio >= 1.1", False), ("ours <= 2", False), ("ours >= 2", True), ("ours <= 3", True)],
)
def test_a_target_is_about_the_ratio_or_about_ours(target, met):
    assert is_met(target, ratio=1.0, ours=3.0) == met


def test_a_row_has_the_median_ratio_and_says_why_only_where_its_target_is_missed():
    assert (ROW.ratio, ROW.spread, ROW.met, ROW.why) == (0.5, (0.4, 0.7), False, "hashing takes as long")
    met = Row.of("s", "n", ours=1.0, unit="s", target="ours <= 2", why="never")
    assert (met.met, met.why, met.ratio, met.baseline) == (True, "", None, None)
    assert Row.of("s", "n", ours=1.0, unit="s").met is None


def test_rows_come_back_from_their_file_with_the_machine(tmp_path):
    path = save_rows(tmp_path, "compact", [ROW, replace(ROW, spread=None, ratio=None)])
    read_machine, rows = load_rows(path)
    assert rows == [ROW, replace(ROW, spread=None, ratio=None)]
    assert read_machine == machine() and read_machine["cores"] >= 1 and read_machine["cpu"]
    assert read_machine["torch"] == torch.__version__


def test_the_page_has_a_table_of_every_suite_and_keeps_what_people_wrote(tmp_path):
    folder = tmp_path / "benchmarks"
    page = tmp_path / "benchmarks.md"
    with pytest.raises(ConfigError, match="nothing is measured"):
        suites.write_page(config(folder))
    save_rows(folder, "compact", [ROW])
    assert suites.write_page(config(folder)) == page
    page.write_text("# Ours\n\n" + page.read_text().partition("\n\n")[2] + "\nTried.\n")
    save_rows(folder, "merge", [replace(ROW, suite="merge", name="adding", met=True, why="")])
    suites.write_page(config(folder))
    text = page.read_text()
    assert text.startswith("# Ours\n") and text.endswith("\nTried.\n")
    assert "| writing | 100 | 50 | MB/s | 0.5 (0.4 to 0.7) | 100 (copy) | ratio >= 0.6 | no |" in text
    assert "- Not met: writing: 0.5 where 0.6 was the target; hashing takes as long" in text
    assert text.count("## ") == 2 and text.index("## compact") < text.index("## merge") and machine()["cpu"] in text
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines"):
        suites.write_page(config(folder))


def test_an_unknown_suite_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="speed: no such suite; there are calibrate, "):
        suites.run_suites(config(tmp_path), ["calibrate", "speed"], [])


def test_a_suite_is_measured_printed_and_written_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "SUITES", {"compact": lambda _config: [replace(ROW, command="")]})
    keys = ["config=c.yaml", "benchmarks.rounds=2", "benchmarks.official=/my/folder", "benchmarks.folder=elsewhere"]
    suites.run_suites(config(tmp_path), ["compact"], keys)
    (row,) = json.loads((tmp_path / "compact.json").read_text())["rows"]
    assert row["command"] == "python jobs/bench.py compact benchmarks.rounds=2 benchmarks.official=FOLDER"
    assert "0.5 (0.4 to 0.7)" in capsys.readouterr().out


def test_all_suites_of_the_default_are_there():
    assert set(suites.DEFAULT) <= set(suites.SUITES)


def test_padding_on_the_demos_corpora_is_within_its_target():
    assert calibrate._padding_row().met


def test_the_authors_code_is_looked_for_before_it_is_run(tmp_path):
    with pytest.raises(ConfigError, match="should be a checkout of SEAP"):
        next(iter(calibrate.rows(config(tmp_path, official=str(tmp_path)))))


def test_peak_memory_sees_what_is_gone_again():
    with peak_memory() as peak:
        for _ in range(20):
            bytearray(b"1" * (64 << 20))
    assert 32 << 20 < peak[0] < 1 << 30


def test_what_routing_costs_is_set_against_what_the_expert_saves():
    first = Rounds({"expert": [0.040, 0.050], "ours": [0.044, 0.054], "auto": [0.045, 0.055]})
    named, auto, router, error, endpoint = route._first_rows(first)
    assert (named.baseline, named.ours, auto.ours) == pytest.approx((45, 49, 50)) and router.met
    assert (router.ours, error.ours, endpoint.ours) == pytest.approx((1, 0, 5))
    whole = Rounds({"dense": [0.96, 0.96], "expert": [0.48, 0.48], "auto": [0.60, 0.60]})
    speed, earned = route._reply_rows(first, whole)
    assert speed.ratio == pytest.approx(1.6) and (speed.baseline, speed.limit) == pytest.approx((50, 100))
    assert earned.ours == pytest.approx(0.5), "10 ms saved a token"


def test_a_load_counts_its_prompts_or_its_replies():
    prefill = Load(8, 256, 1)
    decoding = Load(16, 16, 24)
    assert (prefill.tokens, prefill.name) == (2048, "prefill of 8 x 256 tokens")
    assert (decoding.tokens, decoding.name) == (384, "16 x 24 tokens at 16")


def test_suites_that_need_vllm_say_so_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("seap_ray.vllm_plugin.plugin.entry_points", lambda **_: [])
    with pytest.raises(ConfigError, match="vLLM plugin of seap_ray is not installed"):
        suites.run_suites(config(tmp_path), ["startup", "serve"], [])
    assert not any(tmp_path.iterdir())


# --- scripts for a GPU, over tiny shapes -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures in earnest where there is a GPU")
def test_parts_for_a_gpu_run_without_one(tmp_path):
    parts = ["ceilings", "calibration", "contrast", "statistics", "stream", "covariance", "linears"]
    gpu.main(tmp_path / "gpu.json", parts)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["error"] for name, part in report["parts"].items()} == dict.fromkeys(parts, "")
    _, rows = load_rows(tmp_path / "gpu.json")
    assert any(row.name.startswith("stream and single the same bytes") and row.met for row in rows)


def test_a_part_for_a_gpu_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(SystemExit, match="speed: no such part; there are ceilings, calibration"):
        gpu.choose_parts(["stream", "speed"])
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert {*gpu.PARTS} - {*gpu.choose_parts([])} == {"served", "starts"}, "without vLLM"


@pytest.mark.parametrize("model_config", [TINY, cut_config(TINY, 0.5, "logistic")], ids=["dense", "cut"])
def test_the_engine_that_is_measured_gives_the_logits_of_transformers(model_config):
    torch.manual_seed(0)
    model = build_model(model_config, attn_implementation=CAUSAL).float()
    assert difference(model, Engine(model, is_compiled=False)) < 1e-5


def test_decoding_by_vllm_is_what_a_reply_takes_longer_than_its_first_token(monkeypatch):
    clock = [0.0]

    def answer(model_config, load, _vocabulary):
        clock[0] += 1 + (load.reply - 1) * (0.1 if model_config.model_type == "llama" else 0.05)

    monkeypatch.setattr(served, "engine", nullcontext)
    monkeypatch.setattr(served, "answer", answer)
    monkeypatch.setattr(served, "alternate", partial(alternate, now=lambda: clock[0]))
    rows = {row.name: row for row in served.served_rows(Ceilings(1e9, 1e9))}
    name = f"decoding 1 at {SIZES.context}, {next(iter(SIZES.models))}, 50% logistic, vLLM"
    assert (rows[name].baseline, rows[name].ours, rows[name].ratio) == pytest.approx((10, 20, 2)) and rows[name].met
    prefills = [row for name, row in rows.items() if name.startswith("prefill")]
    assert len(prefills) == 2 * len(SIZES.models) * len(SIZES.prompts) and {row.ratio for row in prefills} == {1}
