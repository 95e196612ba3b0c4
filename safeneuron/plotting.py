"""The figures of an analysis, fit for a paper: from the numbers of each part to SVG and PNG, in the report's style.

Those of one set of neurons are here, those that have a line or a row for each state in ``statewise``.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    PercentFormatter,
)

from safeneuron.figures import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    STYLE,
    WIDTH,
    as_percent,
    as_text,
    colour,
    headroom,
    opacity,
    stroke,
)

ORANGE, GREEN, RED = COLOURS[2], COLOURS[3], COLOURS[5]
GREY = COLOURS[0]


def drawn(figures: dict[str, Callable[[], Figure]]) -> dict[str, str | bytes]:
    """Every figure as ``NAME.svg`` text and ``NAME.png`` bytes at 200 dots an inch; the same for the same numbers."""
    files: dict[str, str | bytes] = {}
    for name, draw in figures.items():
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            figure = draw()
            files[f"{name}.svg"] = as_text(figure, name)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
            files[f"{name}.png"] = buffer.getvalue()
    return files


def topics_figure(record: dict[str, Any]) -> Figure:
    """Roles by layer (Fig. 3), and overlap against the number of topics with both baselines (Fig. 5)."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    bottom = np.zeros(len(record["widths"]))
    names = (("core", BLUE, "in all topics"), ("shared", ORANGE, "in some"), ("specific", FAINT, "in one"))
    for role, tint, label in names:
        counts = np.array(record["layers"][role])
        left.bar(range(len(counts)), counts, bottom=bottom, width=0.85, color=tint, label=label)
        bottom = bottom + counts
    _layers(left, "neurons by role")
    headroom(left, bottom.max(), 3)
    left.legend(loc="upper left")
    for axes, measure, title in (
        (middle, "jaccard", "intersection / union"),
        (right, "shared", "intersection / mean size"),
    ):
        _overlap(axes, record, measure)
        axes.set_title(title)
    middle.legend(loc="upper right")
    return figure


def _overlap(axes: Axes, record: dict[str, Any], measure: str) -> None:
    def line(key: str, name: str, tint: str, style: str) -> None:
        points = [(one["topics"], one[name]) for one in record[key] if one[name] is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=tint, linestyle=style, marker="o", markersize=2.5, label=labels[key]
            )

    labels = {"overlaps": "topics", "shuffled_topics": "prompts dealt at random", "random_neurons": "random neurons"}
    line("overlaps", measure, BLUE, "-")
    line("shuffled_topics", measure, ORANGE, "--")
    line("random_neurons", measure, GREY, ":")
    chance = record["random_neurons"]
    low, high = ([one[f"{measure}_{end}"] or 0.0 for one in chance] for end in ("low", "high"))
    axes.fill_between([one["topics"] for one in chance], low, high, color=GREY, alpha=0.25, linewidth=0)
    axes.set_xlabel("number of topics K")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    as_percent(axes)


def depth_figure(record: dict[str, Any]) -> Figure:
    """Density over relative depth (Fig. 4), and the thirds, of every set."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    sets = record["sets"]
    for index, one in enumerate(sets):
        middles = (np.arange(len(one["density"])) + 0.5) / len(one["density"])
        left.plot(middles, one["density"], color=colour(index), linestyle=stroke(index), label=one["name"])
    left.set_xlabel("relative depth")
    left.set_title("density of the set")
    left.set_xlim(0, 1)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    figure.legend(loc="outside upper left", ncols=min(len(sets), 5))
    for index, one in enumerate(sets):
        x = np.arange(3) + (index - (len(sets) - 1) / 2) * 0.8 / len(sets)
        right.bar(x, one["thirds"], width=0.74 / len(sets), color=colour(index), alpha=opacity(index))
    right.set_xticks(range(3), ["early", "middle", "late"])
    right.set_title("share of the set by third")
    as_percent(right)
    return figure


def stability_figure(record: dict[str, Any]) -> Figure:
    """Jaccard of disjoint samples against their size, how often neurons are found again, and other ways to measure."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    samples = record["samples"]
    sizes = [one["prompts"] for one in samples]
    left.fill_between(
        sizes, [one["low"] for one in samples], [one["high"] for one in samples], color=BLUE, alpha=0.2, linewidth=0
    )
    left.plot(sizes, [one["mean"] for one in samples], color=BLUE, marker="o", markersize=3, label="two samples")
    left.plot(sizes, [one["chance"] for one in samples], color=GREY, linestyle=":", label="random neurons")
    left.set_xscale("log")
    # Numbers that would run into the next one are left out.
    apart = [size for size, larger in itertools.pairwise(sizes) if larger >= size * (sizes[-1] / sizes[0]) ** 0.12]
    apart += sizes[-1:]
    left.set_xticks(apart, [str(size) for size in apart])
    left.minorticks_off()
    left.set_xlabel("prompts of each class")
    left.set_title("Jaccard of two samples")
    left.legend(loc="best")
    as_percent(left)
    middle.bar(np.arange(10) * 10 + 5, record["bootstrap"]["frequencies"], width=8.5, color=BLUE)
    middle.set_xlabel("bootstrap samples that find it, %")
    middle.set_title("neurons ever found")
    bars = [(one["variant"], one["jaccard"], ORANGE) for one in record["variants"]]
    for one in record.get("also", []):
        name = Path(one["prompts_of"]).stem
        bars += [(f"prompts of {name}", one["jaccard"], BLUE), ("the same requests", one["wording"]["jaccard"], GREEN)]
    bars = [bar for bar in bars if bar[1] is not None]
    for row, (_, jaccard, tint) in enumerate(bars):
        right.barh(row, jaccard, color=tint, height=0.6)
    right.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.xaxis.set_major_locator(MultipleLocator(0.25))
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    right.tick_params(axis="x", labelsize=7.5)
    right.grid(axis="x")
    right.grid(visible=False, axis="y")
    right.set_title("Jaccard, measured otherwise")
    return figure


def methods_figure(record: dict[str, Any], points: dict[str, Any]) -> Figure:
    """Intersection of methods by layer (Fig. 7), and the volcano plot of d against shift."""
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, one in enumerate(record["agreements"][:6]):
        left.plot(
            range(len(one["layers"])), one["layers"], color=colour(index + 1), linestyle=stroke(index),
            label=f"{one['first']} and {one['second']} ({one['both']:,}; chance {one['chance']:,.0f})",
        )  # fmt: skip
    _layers(left, "neurons in both sets")
    left.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", ncols=3, fontsize=7)
    kinds = ((0, FAINT, "not selected"), (1, RED, "selected, q ≥ .05"), (2, BLUE, "selected, q < .05"))
    kind, shift, d = (np.array(points[name]) for name in ("kind", "shift", "d"))
    for number, tint, label in kinds:
        which = kind == number
        right.scatter(shift[which], d[which], s=4, color=tint, linewidths=0, label=label, rasterized=True)
    right.axhline(0, color=INK, linewidth=0.5)
    right.axvline(0, color=INK, linewidth=0.5)
    near = float(np.median(np.abs(shift)) or 1.0)
    right.set_xscale("symlog", linthresh=near)
    # At most three powers a side, none next to zero, where the linear part has no room for its words.
    first, last = np.ceil(np.log10(2 * near)), np.floor(np.log10(max(np.abs(shift).max(), 2 * near)))
    powers = 10.0 ** np.arange(first, last + 1)[::-1][:3]
    right.set_xticks([*-powers, 0, *powers])
    # Formulas are off in this style, so powers are written out.
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.minorticks_off()
    right.set_xlabel("shift of the mean activation (symmetric log)")
    right.set_title("effect size d")
    right.legend(loc="lower right", markerscale=2, fontsize=7)
    return figure


def _layers(axes: Axes, title: str) -> None:
    axes.set_xlabel("layer")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
