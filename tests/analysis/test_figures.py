"""The figures of an analysis: they show the numbers they are given, and no words stand on words or on bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from safeneuron.analysis.figures import (
    depth_figure,
    figure_files,
    methods_figure,
    redundancy_figure,
    rounds_figure,
    scale_figure,
    stability_figure,
    states_figure,
    topics_figure,
)
from safeneuron.analysis.stability import SetSimilarity
from safeneuron.reporting.figures import STYLE
from tests.helpers import hand_made

STATES = ("T0", "dpo-T1", "T1", "ablate-T1", "refresh-T1")
FIGURES: dict[str, Callable[[], Figure]] = {
    "topics": lambda: topics_figure(hand_made.topics()),
    "depth of one set": lambda: depth_figure(hand_made.depth("T0")),
    "depth": lambda: depth_figure(hand_made.depth(*STATES)),
    "depth of nine runs": lambda: depth_figure(hand_made.depth(*(f"runs/qwen-2.5-{n}b" for n in range(9)))),
    "stability of few prompts": lambda: stability_figure(hand_made.stability(10, 20, 24)),
    "stability of many prompts": lambda: stability_figure(hand_made.stability(10, 20, 40, 80, 160, 320, 500)),
    "states": lambda: states_figure(hand_made.states(hand_made.changed("T0"), hand_made.changed("T1"))),
    "states not compared": lambda: states_figure(hand_made.states(*(hand_made.changed(n, n == "T1") for n in STATES))),
    "redundancy": lambda: redundancy_figure(hand_made.redundancies()),
    "methods": lambda: methods_figure(*hand_made.methods()),
    "scale": lambda: scale_figure(hand_made.scale("plain DPO", "freeze", "freeze + ablate")),
    "scale of one run": lambda: scale_figure([point for point in hand_made.scale("freeze") if point.pairs == 40]),
    "rounds": lambda: rounds_figure(hand_made.rounds()),
}


def made(draw: Callable[[], Figure]) -> Figure:
    """The figure as ``figure_files`` makes it, laid out."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure).draw()
    return figure


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes: Axes) -> list[Sequence[float]]:
    """The y values of all lines with more than two points."""
    return [list(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata()) > 2]


def words(figure: Figure) -> list[tuple[str, Bbox]]:
    """All words that are drawn, and where; ticks beyond the ends of an axis exist, but are not drawn."""
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {tick.label1 for axis in axes for tick in axis.get_major_ticks()}
    hidden = ticks - {tick.label1 for axis in axes for tick in axis._update_ticks()}
    return [
        (text.get_text(), text.get_window_extent().padded(-1))
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and text not in hidden
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_no_words_stand_on_words_or_on_bars_and_none_is_cut_off(name: str) -> None:
    figure = made(FIGURES[name])
    for (one, first), (other, second) in itertools.combinations(words(figure), 2):
        assert not first.overlaps(second), f"{one!r} runs into {other!r}"
    for text, box in words(figure):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
    for axes in figure.axes:
        if legend := axes.get_legend():
            box = legend.get_window_extent()
            assert not any(box.overlaps(bar.get_window_extent()) for bar in axes.patches), "the legend covers a bar"


@pytest.mark.parametrize("name", ["redundancy", "rounds"])
def test_the_same_numbers_give_the_same_files(name: str) -> None:
    files = figure_files({name: FIGURES[name]})
    assert set(files) == {f"{name}.svg", f"{name}.png"}
    assert files == figure_files({name: FIGURES[name]})


def test_bars_of_topics_stand_on_one_another() -> None:
    record = hand_made.topics()
    left, middle, _ = made(lambda: topics_figure(record)).axes
    tops = [bar.get_y() + bar.get_height() for bar in left.patches[-hand_made.LAYERS :]]
    roles = record.layers
    assert tops == [sum(counts) for counts in zip(roles.core, roles.shared, roles.specific, strict=True)]
    assert lines(middle)[0] == [overlap.jaccard for overlap in record.overlaps]


def test_lines_of_depth_are_the_densities() -> None:
    record = hand_made.depth("T0", "T1")
    left, right = made(lambda: depth_figure(record)).axes
    assert lines(left) == [placed.density for placed in record.sets]
    assert [bar.get_height() for bar in right.patches] == [0.5, 0.3, 0.2] * 2
    assert [label.get_text() for label in left.get_yticklabels()][1] == "0.5 %"


def test_a_translation_stands_beside_the_other_ways_to_measure() -> None:
    record = hand_made.stability(10, 20, 24)
    *_, right = made(lambda: stability_figure(record)).axes
    bars = dict(zip((label.get_text() for label in right.get_yticklabels()), right.patches, strict=True))
    assert bars["pooling mean"].get_width() == 0.31
    assert bars["prompts of de"].get_width() == 0.12
    assert bars["the same requests"].get_width() == 0.2
    unknown = replace(record.also[0], wording=SetSimilarity(math.nan, math.nan))
    *_, right = made(lambda: stability_figure(replace(record, also=[unknown]))).axes
    assert len(right.patches) == 5


def test_redundancy_shows_shares_and_below_them_what_they_come_to() -> None:
    record = hand_made.redundancies()
    shown = panels(made(lambda: redundancy_figure(record)))
    dpo = record.states[1]
    together = [dpo.intact.refused, *(found.together.refused for found in dpo.sets)]
    assert lines(shown["refused, sets pruned together"])[0] == together
    index, halve = shown["sets that break it alone (index)"], shown["sets to halve it"]
    assert [label.get_text() for label in index.get_yticklabels()] == ["T0", "dpo-T1", "ablate-T1", "refresh-T1"]
    assert "refuses too rarely" in [text.get_text() for text in index.texts]

    def at(axes: Axes, row: int) -> list[tuple[str, list[float]]]:
        """The marks and bars in a row."""
        return [
            (str(line.get_marker()), list(line.get_xdata())) for line in axes.get_lines() if line.get_ydata()[0] == row
        ]

    assert at(index, 1) == [("None", [0, 1]), ("s", [1])]
    assert at(halve, 0) == []
    beyond = 1.15 * 4
    assert at(halve, 2) == [("None", [3, beyond]), (">", [beyond])], (
        "more than the four that were tried: an arrow alone"
    )
    assert at(halve, 3) == [("None", [2, beyond]), (">", [beyond]), ("^", [3])]
    assert halve.get_xlim()[1] == beyond


def test_a_training_has_a_colour_and_an_attack_a_line() -> None:
    records = hand_made.scale("plain DPO", "freeze")
    (axes,) = made(lambda: scale_figure(records)).axes
    drawn = [line for line in axes.get_lines() if len(line.get_ydata()) == 5]
    assert [list(line.get_ydata()) for line in drawn[:1]] == [[point.rate for point in records[:5]]]
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn]
    assert len(set(looks)) == 6
    assert len({tint for tint, _ in looks}) == 2
    assert len({style for _, style in looks}) == 3


def test_rounds_are_drawn_where_an_attack_was_run() -> None:
    records = hand_made.rounds()
    left, right = made(lambda: rounds_figure(records)).axes
    assert lines(left) == [[state.rates[name] for state in records] for name in ("ORI", "FULL static", "FULL adaptive")]
    assert [bar.get_height() for bar in right.patches] == [0, 430, 860, 1290]


def test_weights_that_were_not_compared_are_said_to_be() -> None:
    record = hand_made.states(hand_made.changed("T1"), hand_made.changed("T2", moved=False))
    figure = made(lambda: states_figure(record))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["weights were\nnot compared"]
    assert lines(figure.axes[1])[1] == [layer.outside for layer in record.states[0].moved]


def test_no_line_leaves_its_panel_in_a_later_row() -> None:
    low = hand_made.changed("T2")
    low = replace(low, cka_unsafe=[math.nan, *[0.3] * (hand_made.LAYERS - 1)])
    figure = made(lambda: states_figure(hand_made.states(hand_made.changed("T1"), low)))
    likeness = figure.axes[2]
    assert likeness.get_ylim()[0] <= 0.3
    assert likeness.get_ylim()[1] == 1.02
