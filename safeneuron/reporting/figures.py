"""The figures of the report for print: each chart drawn with matplotlib, as SVG text or PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from safeneuron.reporting.panels import Axis, Chart, ChartPanel
from safeneuron.reporting.style import (
    COLOURS,
    INK,
    MARKERS,
    STYLE,
    WIDTH,
    as_percent,
    as_text,
    colour,
    opacity,
    stroke,
)

PIXELS = 80
"""Pixels of a panel's height in the page that are an inch in print."""
HATCH = "/////"


def draw_figures(charts: Mapping[str, Chart]) -> dict[str, str]:
    """SVG text of every chart by its name; those that show one panel at a time live in the page alone."""
    drawn = {}
    for name, chart in charts.items():
        if not chart.choose:
            with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
                drawn[name] = as_text(draw_chart(chart), name)
    return drawn


def as_pictures(charts: Mapping[str, Chart]) -> dict[str, bytes]:
    """The same figures as PNG of 300 dots an inch on white, where a paper or a slide takes no SVG.

    Args:
        charts: The charts of a report (``charts_of``).

    Returns:
        The bytes of each file by the name of its chart.
    """
    drawn = {}
    for name, chart in charts.items():
        if not chart.choose:
            buffer = io.BytesIO()
            with matplotlib.rc_context(STYLE):
                draw_chart(chart).savefig(buffer, format="png", dpi=300, metadata={"Software": None})
            drawn[name] = buffer.getvalue()
    return drawn


def draw_chart(chart: Chart) -> Figure:
    """A chart as a figure: its panels in rows, under one legend."""
    panels = chart.panels
    columns = 1 if chart.stacked else min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    heights = [panel.height for panel in panels[::columns]]
    figure = Figure(figsize=(WIDTH, 0.7 + sum(heights) / PIXELS), layout="constrained")
    # Panels that all have the same axes say what those are once, at the edge of the figure.
    alike = len(panels) > 1 and len({(panel.x, panel.y) for panel in panels}) == 1
    across: Literal["col"] | bool = "col" if chart.stacked else alike
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=across, sharey=alike).flatten()
    for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        (draw_bars if panel.kind == "bars" else draw_plot)(axes, panel)
        title = panel.title or (panel.y.title if columns > 1 else None)
        if title:
            axes.set_title(title)
        if not alike and title != panel.y.title:
            axes.set_ylabel(panel.y.title)
        last = place + columns >= len(panels)
        if panel.x and not alike and (last or not chart.stacked):
            axes.set_xlabel(panel.x.title)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if alike:
        figure.supylabel(panels[0].y.title, fontsize=8.5)
        figure.supxlabel(panels[0].x.title if panels[0].x else "", fontsize=8.5)
    handles = legend_entries(panels)
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 7), columnspacing=1.4)
    return figure


def draw_bars(axes: Axes, panel: ChartPanel) -> None:
    """Bars side by side in their groups, the parts of each on top of one another."""
    count = len(panel.series)
    width = (0.94 if panel.sparse else 0.82) / count
    for bar in panel.bars:
        x, base = bar.group + (bar.series - (count - 1) / 2) * width, 0.0
        for part in bar.parts:
            tint = colour(bar.series if part.colour is None else part.colour)
            if part.hatched:
                axes.bar(
                    x, part.value, width * 0.88, base, facecolor="none", edgecolor=tint, hatch=HATCH, linewidth=0.6
                )
            else:
                axes.bar(x, part.value, width * 0.88, base, color=tint, alpha=opacity(bar.series))
            base += part.value
        if bar.low is not None and bar.high is not None:
            axes.plot([x, x], [bar.low, bar.high], color=INK, linewidth=0.9, solid_capstyle="butt")
    if panel.sparse:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.7, len(panel.groups) - 0.3)
    else:
        axes.set_xticks(range(len(panel.groups)), [group.replace(" ", "\n") for group in panel.groups])
        axes.tick_params(axis="x", length=0)
    scale_upwards(axes, panel)


def draw_plot(axes: Axes, panel: ChartPanel) -> None:
    """Lines with the band of their intervals, or points with their intervals as lines."""
    for place, series in enumerate(panel.series):
        number = place if series.colour is None else series.colour
        x, y = [mark.x for mark in series.points], [mark.y for mark in series.points]
        tint = colour(number)
        # Marks as thin as the line would only blur it.
        size = 0.9 * panel.radius if panel.radius > 2 else 0.0
        bands = [(mark.x, mark.low, mark.high) for mark in series.points if mark.low is not None]
        if panel.lines:
            if bands:
                at, low, high = zip(*bands, strict=True)
                axes.fill_between(at, low, high, color=tint, alpha=0.15, linewidth=0)
            axes.plot(x, y, stroke(number), color=tint, marker="o", markersize=size, linewidth=1.6)
            continue
        for mark in series.points:
            for ends, across in (((mark.low, mark.high), False), ((mark.left, mark.right), True)):
                if ends[0] is not None:
                    line = (ends, (mark.y, mark.y)) if across else ((mark.x, mark.x), ends)
                    axes.plot(*line, color=tint, linewidth=0.9)
        axes.plot(x, y, marker_of(number), color=tint, markersize=size)
    scale_upwards(axes, panel)
    if panel.x:
        scale_across(axes, panel.x)


def scale_upwards(axes: Axes, panel: ChartPanel) -> None:
    """The y axis of a panel: percent from 0 to 100, or up to a given number."""
    if panel.y.percent:
        as_percent(axes, 0.25 if panel.height > 100 else 0.5)
    elif panel.y.max is not None:
        axes.set_ylim(0, 1.05 * panel.y.max)


def scale_across(axes: Axes, axis: Axis) -> None:
    """The x axis of a plot: percent, ticks where it has its own, logarithmic if it is wide."""
    if axis.log:
        axes.set_xscale("log")
    if axis.ticks is not None:
        axes.set_xticks([value for value, _ in axis.ticks], [text for _, text in axis.ticks])
        axes.minorticks_off()
    elif axis.percent:
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def legend_entries(panels: Sequence[ChartPanel]) -> list[Artist]:
    """Every series of any panel once, if there is more than one, and the notes."""
    series = {entry.name: (panel, place, entry) for panel in panels for place, entry in enumerate(panel.series)}
    titled = all(panel.title for panel in panels)
    handles: list[Artist] = []
    for panel, place, entry in series.values() if not titled else ():
        number = place if entry.colour is None else entry.colour
        tint, name = colour(number), entry.name
        if panel.kind == "bars":
            handles.append(Patch(color=tint, alpha=opacity(number), label=name))
        elif panel.lines:
            handles.append(Line2D([], [], color=tint, linestyle=stroke(number), linewidth=1.6, label=name))
        else:
            handles.append(Line2D([], [], color=tint, linestyle="none", marker=marker_of(number), label=name))
    for note in dict.fromkeys(note for panel in panels for note in panel.notes):
        if note.look == "hatched":
            handles.append(Patch(facecolor="none", edgecolor=INK, hatch=HATCH, linewidth=0.6, label=note.text))
        elif note.look == "interval":
            lines = panels[0].kind == "plot" and panels[0].lines
            band = Patch(color=INK, alpha=0.15, linewidth=0, label=note.text)
            handles.append(band if lines else Line2D([], [], color=INK, linewidth=0.9, label=note.text))
        else:
            handles.append(Patch(color=colour(note.colour or 0), label=note.text))
    return handles


def marker_of(index: int) -> str:
    """Mark of a point; it changes where the colours begin again."""
    return MARKERS[index // len(COLOURS) % len(MARKERS)]
