"""The paper's tables as data, against what the paper itself says of them; ours beside them."""

import pytest

from seap_ray.config import Baseline, Config, load_config
from seap_ray.errors import ConfigError
from seap_ray.report.rows import ModelRow, QualityCell, SpeedCell
from seap_ray.report.study_rows import PaperRow
from seap_ray.studies import paper

AVERAGES = {
    "Llama-2-7B": [66.97, 60.95, 64.68, 64.38, 62.07, 65.46, 64.75, 45.23, 55.06, 53.04, 46.82, 55.73, 54.71],
    "Llama-2-13B": [69.46, 65.57, 67.96, 67.33, 66.76, 68.12, 68.75, 49.94, 59.40, 59.34, 51.78, 60.24, 60.89],
}
"""Last columns of Tables 1 and 4."""


@pytest.mark.parametrize("size", AVERAGES)
def test_every_row_has_the_average_that_the_paper_prints(size):
    rows = paper.tables()["accuracy"][size]
    assert [sum(row[2:]) / 7 for row in rows] == pytest.approx(AVERAGES[size], abs=0.0051)


def test_the_logistic_rows_of_table_3_are_averages_of_table_4():
    by_name = {(name, ratio): sum(values) / 7 for name, ratio, *values in paper.tables()["accuracy"]["Llama-2-13B"]}
    rows = [row for row in paper.tables()["allocation"] if row[0].endswith("LB")]
    assert len(rows) == 6
    for name, ratio, average in rows:
        assert by_name[paper.ALIAS[name], ratio] == pytest.approx(average, abs=0.0051)


def test_speed_ups_are_those_that_the_paper_prints():
    rows = paper.tables()["speed"]["Llama-2-7B"]
    assert [round(tokens / rows[0][2], 2) for _, _, tokens in rows[1:]] == [1.22, 1.17, 1.50, 1.48]


def test_every_row_has_settings_and_every_setting_a_row():
    names = {row[0] for table in paper.tables()["accuracy"].values() for row in table} - {"Dense"}
    others = {row[0] for row in paper.tables()["allocation"]}
    others |= {row[0] for table in paper.tables()["speed"].values() for row in table} - {"Dense"}
    assert names | {paper.ALIAS.get(name, name) for name in others} == paper.BY_NAME.keys()


def test_a_row_has_a_column_for_every_task_of_the_paper():
    assert list(PaperRow.COLUMNS[4:11]) == paper.tables()["tasks"]


def test_methods_are_baselines_without_a_bias_calibrated_as_the_paper_says():
    config = load_config(["config=ray_config.yaml", "study=paper"])
    made = {name: Baseline.model_validate(own) for name, own in paper.methods(config)}
    assert all(own.compensation == "none" and (own.k, own.x0) == (1, 0.3) for own in made.values())
    assert made["WandA-sp_s_W"].tasks == made["FLAP_AL"].tasks == ("wikitext2",)
    assert made["SEAP_s_F"].per_task and len(made["SEAP_s_F"].tasks) == 7
    assert made["SEAP-gen_s_W"].pooling == "score_average" and made["SEAP-gen_s_W"].tasks is None


def test_without_wikitext_the_papers_baselines_have_nothing_to_be_calibrated_on():
    config = Config.model_validate({"tasks": ["piqa"]})
    with pytest.raises(ConfigError, match="^tasks: study=paper calibrates .* on wikitext2, which is not among them$"):
        list(paper.methods(config))


def model(method, ratio, value, speed=None):
    quality = {task: QualityCell("acc", value, 0.01, n=9) for task in paper.tables()["tasks"]}
    sizes = {"realised_ratio": ratio, "parameters": 10, "bytes": 20, "kv_bytes_per_token": 4}
    return ModelRow(method, method, "baseline", ratio=ratio, **sizes, quality=quality, speed=speed)


def test_ours_stand_beside_the_papers_with_the_difference():
    rates = SpeedCell(700.0, 80.0, 1.5, 2.0)
    models = [model("dense", None, 0.7), model("SEAP_s_F", 0.2, 0.6), model("SEAP-gen_s_F", 0.5, 0.5, rates)]
    rows = paper.compare(load_config(["config=ray_config.yaml"]), models)
    by = {
        (row["table"], row["method"], row["whose"]): row
        for row in (dict(zip(PaperRow.columns(), r.to_json(), strict=True)) for r in rows)
    }
    ours, theirs, gap = (by["accuracy, Llama-2-7B", "SEAP (s_F)", whose] for whose in ("ours", "paper", "difference"))

    assert ours["piqa"] == pytest.approx(60) and theirs["piqa"] == 78.07 and gap["piqa"] == pytest.approx(60 - 78.07)
    assert ours["stderr"] == pytest.approx(100 * 0.01 / 7**0.5) and theirs["average"] == pytest.approx(65.46, abs=0.005)
    assert by["allocation, Llama-2-13B", "SEAP-gen LB", "paper"]["average"] == 60.89
    assert by["allocation, Llama-2-13B", "SEAP-gen LB", "ours"]["average"] == pytest.approx(50)
    assert by["allocation, Llama-2-13B", "SEAP-gen LB", "difference"]["average"] is None  # ours is no 13B here
    assert by["speed, Llama-2-7B", "SEAP-gen", "difference"]["speed-up"] == pytest.approx(2 - 47.10 / 31.88)
    assert len(rows) == 3 * 5  # dense and two methods of Table 1, one row each of Tables 2 and 3


def test_a_model_of_13_billion_is_held_against_the_papers_own():
    config = load_config(["config=ray_config.yaml", "model.source=meta-llama/Llama-2-13b-hf"])
    rows = paper.compare(config, [model("dense", None, 0.7), model("SEAP-gen_s_F", 0.5, 0.5)])
    assert rows[1].table == "accuracy, Llama-2-13B" and rows[1].winogrande == 72.14
    assert rows[-1].to_json()[:4] == ["allocation, Llama-2-13B", "SEAP-gen LB", 0.5, "difference"]
    assert rows[-1].average == pytest.approx(50 - 60.89)


def test_an_average_needs_every_task_and_the_perplexity_stands_beside_it():
    whole = model("dense", None, 0.7)
    whole.quality["wikitext2"] = QualityCell("window_perplexity", 12.5, 0.1, n=9)
    row = dict(zip(PaperRow.columns(), paper.compare(Config(), [whole])[0].to_json(), strict=True))

    assert row["average"] == pytest.approx(70) and row["wikitext2 perplexity"] == 12.5
    del whole.quality["piqa"]
    row = dict(zip(PaperRow.columns(), paper.compare(Config(), [whole])[0].to_json(), strict=True))

    assert row["average"] is None and row["piqa"] is None and row["boolq"] == pytest.approx(70)
