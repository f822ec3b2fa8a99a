from seap_ray.report.plots.choices import choices_section
from seap_ray.report.run_data import RunData
from tests.support.made_run import RATIOS, TASKS, edit


def test_a_run_whose_settings_left_nothing_open_has_no_choices(run):
    assert choices_section(RunData.of(run)) is None


def test_points_are_the_judged_plans_and_the_ring_is_around_the_one_that_was_taken(judged):
    data = RunData.of(judged)
    section = choices_section(data)
    assert [panel.title for panel in section.figure.panels] == [
        f"{choice}, {100 * ratio:g} % removed" for ratio in RATIOS for choice in ("repair", "allocation")
    ]
    repairs, widths = section.figure.panels[:2]
    (general,) = (plan for plan in data.plans[RATIOS[0]] if plan.kind == "general")
    by_settings = {(c["allocation"], c["attention_unit"]): c for c in general.judged if c["compensation"] == "none"}

    (dots,) = widths.dots
    assert dots.label == "general" and len(widths.rows) == 8
    assert list(dots.values) == sorted(candidate["divergence"] for candidate in by_settings.values())
    row = widths.rows.index("measured, attention whole")
    assert dots.values[row] == by_settings["measured", "none"]["divergence"]
    assert dots.errors[row] == 2 * by_settings["measured", "none"]["stderr"]
    assert widths.rows[dots.chosen] == "logistic, with groups"

    assert [dots.label for dots in repairs.dots] == ["general", *TASKS]
    assert {repairs.rows[dots.chosen] for dots in repairs.dots} == {"energy, uncompensated", "wifv, mean"}
    assert "chosen" in section.figure.legend


def test_a_choice_that_one_model_lacks_is_a_gap(judged):
    edit(judged.plan(RATIOS[0], "sort"), lambda plan: plan["judged"].pop(0))
    repairs, _ = choices_section(RunData.of(judged)).figure.panels[:2]
    (sort,) = (dots for dots in repairs.dots if dots.label == "sort")
    assert len(sort.values) == len(repairs.rows) and sort.values.count(None) > sum(
        dots.values.count(None) for dots in repairs.dots if dots.label == "prose"
    )


def test_the_table_has_every_figure_and_the_plan_that_was_taken_in_bold(judged):
    section = choices_section(RunData.of(judged))
    (table,) = section.tables
    _, rows = table.groups[0]
    general = [row for row in rows if row[0] == "general"]
    assert len(rows) == len(general) + 3 * len(TASKS)
    assert [row[1:5] for row in general if "<strong>" in row[5]] == [["energy", "none", "logistic", "group"]]
    assert "general has the allocation logistic, with groups, and the repair energy, uncompensated" in section.finding
