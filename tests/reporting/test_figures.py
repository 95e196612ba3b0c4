"""Figures for print: drawn from the charts of the page, the same for the same numbers."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from safeneuron.reporting.charts import attack_chart, charts_of, curve_chart, layers_chart, training_chart
from safeneuron.reporting.details import StrongNeuron
from safeneuron.reporting.figures import as_pictures, draw_chart, draw_figures
from tests.helpers.sample_results import sample_results, sample_state, typed

SVG = "{http://www.w3.org/2000/svg}"


def test_every_chart_but_those_of_one_panel_at_a_time_is_drawn() -> None:
    neurons = {"T0": [StrongNeuron(3, 7, 100, 1.5, 2.5, 3)]}
    charts = charts_of(typed(sample_results()), neurons)
    assert set(charts) == {"attack", "curve", "layers", "neurons", "training"}
    drawn = draw_figures(charts)
    assert set(drawn) == set(as_pictures(charts)) == set(charts) - {"neurons"}
    assert drawn == draw_figures(charts)
    for text in drawn.values():
        assert ElementTree.fromstring(text).tag == f"{SVG}svg"


def test_bars_stand_where_the_chart_puts_them() -> None:
    chart = attack_chart(typed(sample_results()))
    (axes,) = draw_chart(chart).axes
    bars = [patch for patch in axes.patches if patch.get_hatch() is None]
    assert sorted(bar.get_height() for bar in bars) == sorted(bar.parts[0].value for bar in chart.panels[0].bars)
    whiskers = {tuple(line.get_ydata()) for line in axes.lines}
    assert whiskers == {(bar.low, bar.high) for bar in chart.panels[0].bars}
    assert [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()] == list(chart.panels[0].groups)


def test_lines_go_through_the_points_of_the_chart() -> None:
    results = typed(sample_results())
    for chart in (curve_chart(results.states), training_chart(results.states)):
        for axes, panel in zip(draw_chart(chart).axes, chart.panels, strict=True):
            for line, series in zip(axes.lines, panel.series, strict=True):
                assert list(zip(*line.get_data(), strict=True)) == [(mark.x, mark.y) for mark in series.points]


@pytest.mark.parametrize(("states", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_of_the_layers_stand_in_rows(states: int, shape: tuple[int, int]) -> None:
    results = typed(sample_results(*(sample_state(f"T{index}", 30) for index in range(states))))
    figure = draw_chart(layers_chart(results.states))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == states
    assert len(figure.axes) == shape[0] * shape[1]
