import pytest

from seap_ray.report.plots.speed import speed_section


def test_the_ideal_speed_is_one_over_what_is_left(studied):
    prefill, decode = speed_section(studied).figure.panels
    ideal = prefill.series[0]
    assert ideal.label == "ideal" and (ideal.x[0], ideal.y[0]) == (0, 1)
    assert ideal.y[-1] == pytest.approx(1 / (1 - ideal.x[-1] / 100))
    models = [m for m in studied.studies["ratio"].models if m.name == "uniform"]
    uniform = next(series for series in decode.series if series.label == "uniform")
    assert uniform.y == [m.speed.decode_speedup for m in models]
