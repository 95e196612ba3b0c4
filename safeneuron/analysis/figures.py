"""The figures of an analysis, fit for a paper: from the numbers of each part to SVG and PNG, in the report's style.

Those of one set of neurons are here, those that have a line or a row for each state in ``statewise``.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter, StrMethodFormatter

from safeneuron.reporting.figures import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    STROKES,
    STYLE,
    WIDTH,
    as_percent,
    as_text,
    colour,
    headroom,
    mark,
    opacity,
    stroke,
)
from safeneuron.reporting.summary import READING

ORANGE, GREEN, RED = COLOURS[2], COLOURS[3], COLOURS[5]
GREY = COLOURS[0]


def figure_files(figures: dict[str, Callable[[], Figure]]) -> dict[str, str | bytes]:
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


def states_figure(record: dict[str, Any]) -> Figure:
    """By layer: turnover, weights moved, likeness of hidden states, refusal direction, separability; a row a state."""
    states = [one for one in record["states"] if one["state"] != "T0"] or record["states"]
    figure = Figure(figsize=(WIDTH * 1.25, 2.2 * len(states) + 0.5), layout="constrained")
    rows = figure.subplots(len(states), 5, squeeze=False, sharex=True, sharey="col")
    for number, (state, row) in enumerate(zip(states, rows, strict=True)):
        _turnover(row[0], state)
        moved = state["moved"] or []
        _lines(row[1], {name: [one[name] for one in moved] for name in ("inside", "outside")} if moved else {})
        likeness = {"CKA, harmful": "cka_unsafe", "CKA, benign": "cka_safe", "cosine, harmful": "cosine_unsafe"}
        _lines(row[2], {label: state[key] for label, key in likeness.items()})
        _lines(row[3], {"own direction": state["along_own"], "T0's direction": state["along_T0"]})
        _lines(row[4], {"intact": state["separability"], "set pruned": state["separability_pruned"]})
        if not moved:
            row[1].text(0.5, 0.5, "weights were\nnot compared", ha="center", transform=row[1].transAxes, fontsize=7)
        titles = (
            "neurons against T0",
            "relative change of weights",
            "hidden states like T0's",
            "classes apart, in sd",
            "probe accuracy",
        )
        for axes, title in zip(row, titles, strict=True):
            axes.set_xlabel("layer" if number == len(states) - 1 else "")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.set_title(f"{state['state']}: {title}" if axes is row[0] else title, fontsize=8)
            if number == 0 and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=6.5)
    # The rows share their axes; an end that is set stops the other from moving, so that all lines must be there before.
    rows[0][2].set_ylim(top=1.02)
    rows[0][4].set_ylim(0, 1.02)
    headroom(rows[0][0], max(sum(kinds) for one in states for kinds in zip(*one["turnover"].values(), strict=True)), 3)
    return figure


def _turnover(axes: Axes, state: dict[str, Any]) -> None:
    bottom = np.zeros(len(state["turnover"]["kept"]))
    for name, tint in (("kept", BLUE), ("lost", FAINT), ("new", ORANGE)):
        counts = np.array(state["turnover"][name])
        axes.bar(range(len(counts)), counts, bottom=bottom, width=0.85, color=tint, label=name)
        bottom = bottom + counts


def _lines(axes: Axes, series: dict[str, Sequence[float | None]]) -> None:
    for index, (label, values) in enumerate(series.items()):
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True),
                color=(BLUE, ORANGE, GREEN)[index],
                linestyle=("-", "--", ":")[index],
                label=label,
            )


def redundancy_figure(record: dict[str, Any]) -> Figure:
    """Refusals left with sets pruned alone, together, and along the ranking; below, what each state's numbers are."""
    states = record["states"]
    figure = Figure(figsize=(WIDTH, 3.5 + 0.2 * len(states)), layout="constrained")
    (alone, together, curve), below = figure.subplots(2, 3, sharey="row", height_ratios=(2.4, 0.4 + 0.2 * len(states)))
    for index, state in enumerate(states):
        if state["sets"]:
            intact, sets, points = state["intact"], state["sets"], state["curve"]
            name = state["state"]
            places = np.arange(1, len(sets) + 1) + (index - (len(states) - 1) / 2) * 0.7 / len(states)
            _refused(alone, places.tolist(), [one["alone"] for one in sets], index, name, "none")
            _refused(together, range(len(sets) + 1), [intact, *(one["together"] for one in sets)], index, name)
            _refused(curve, [one["neurons"] for one in points], points, index, name)
    for axes, title, label in (
        (alone, "refused, each set pruned alone", "set, in the order found"),
        (together, "refused, sets pruned together", "sets pruned"),
        (curve, "refused, top neurons pruned", "neurons pruned"),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        as_percent(axes)
    titles = ("sets that break it alone (index)", "sets to halve it", "top neurons to halve it")
    names = ("redundancy_index", "sets_to_halve", "neurons_to_halve")
    for axes, title, name in zip(below, titles, names, strict=True):
        _numbers(axes, states, name)
        axes.set_title(title)
    for row, state in enumerate(states):
        if state["intervals"] is None:
            below[0].text(0, row, "refuses too rarely", va="center", fontsize=7)
    figure.legend(*together.get_legend_handles_labels(), loc="outside upper left", ncols=min(len(states), 6))
    figure.supxlabel(READING, fontsize=7)
    return figure


def _refused(
    axes: Axes, x: Sequence[float], found: Sequence[dict[str, float]], index: int, label: str, line: str = ""
) -> None:
    """Shares refused with their intervals; joined by the state's own line, if none is given."""
    rates = [one["refused"] for one in found]
    down = [one["refused"] - one["refused_low"] for one in found]
    up = [one["refused_high"] - one["refused"] for one in found]
    axes.errorbar(
        x, rates, yerr=[down, up], color=colour(index), linestyle=line or stroke(index),
        marker=mark(index), markersize=4, linewidth=1.2, elinewidth=0.7, label=label,
    )  # fmt: skip


def _numbers(axes: Axes, states: Sequence[dict[str, Any]], name: str) -> None:
    """One number of every state with its interval, a row a state; what is beyond all that was tried is an arrow."""
    most = max((_tried(state, name) for state in states), default=1)
    for row, state in enumerate(states):
        if state["intervals"] is not None:
            ends = state["intervals"][name].values()
            value, low, high = (1.15 * most if one is None else one for one in (state[name], *ends))
            axes.plot([low, high], [row, row], color=colour(row), linewidth=1.6, solid_capstyle="butt")
            if high > most:
                axes.plot([high], [row], ">", color=colour(row), markersize=5, clip_on=False)
            if value <= most:
                axes.plot([value], [row], mark(row), color=colour(row), markersize=5.5, clip_on=False)
    axes.set_xlim(-0.04 * most, 1.15 * most)
    axes.set_ylim(len(states) - 0.4, -0.6)
    axes.set_yticks(range(len(states)), [state["state"] for state in states])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _tried(state: dict[str, Any], name: str) -> int:
    """How many sets, or neurons, a state was tried with."""
    return int(state["curve"][-1]["neurons"] if name == "neurons_to_halve" else len(state["sets"]))


def scale_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Attack success against the number of preference pairs (Fig. 6), a line a training and attack."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in records:
        lines.setdefault((one["label"], one["set"], one["knowledge"]), []).append(one)
    # A training has a colour, an attack a line and a mark, and each line stands a little aside, for its intervals.
    trainings = list(dict.fromkeys(label for label, _, _ in lines))
    attacks = list(dict.fromkeys((which, knowledge) for _, which, knowledge in lines))
    aside = 0.003 * (max(one["pairs"] for one in records) - min(one["pairs"] for one in records))
    for index, ((label, name, knowledge), found) in enumerate(lines.items()):
        kind = attacks.index((name, knowledge))
        x = [one["pairs"] + aside * (index - (len(lines) - 1) / 2) for one in found]
        spread = [[one["rate"] - one["low"] for one in found], [one["high"] - one["rate"] for one in found]]
        axes.errorbar(
            x, [one["rate"] for one in found], yerr=spread, color=colour(trainings.index(label) + 1),
            linestyle=STROKES[kind % len(STROKES)], marker=mark(kind), markersize=3.5, elinewidth=0.8, linewidth=1.2,
            label=f"{label}, {name if knowledge == 'none' else f'{name} {knowledge}'}",
        )  # fmt: skip
    axes.set_xlabel("preference pairs")
    axes.set_title("attack success rate")
    as_percent(axes)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def rounds_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Attack success, and the neurons kept from changing, state by state of the main training (Table 2)."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    names = [name for name in records[0] if name.startswith("ASR ")]
    for index, name in enumerate(names):
        known = [(row, one[name]) for row, one in enumerate(records) if one[name] is not None]
        if known:
            left.plot(
                *zip(*known, strict=True), color=colour(index), linestyle=STROKES[index % len(STROKES)],
                marker=mark(index), markersize=4, label=name.removeprefix("ASR "),
            )  # fmt: skip
    left.set_title("attack success rate")
    as_percent(left)
    right.bar(range(len(records)), [one["frozen"] or 0 for one in records], color=BLUE, width=0.6)
    right.set_title("neurons frozen in training")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (left, right):
        axes.set_xticks(range(len(records)), [one["state"] for one in records])
        axes.set_xlim(-0.5, len(records) - 0.5)
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure
