"""The figures of an analysis that have a line or a row for each state: what changed, redundancy, data scale, rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from safeneuron.figures import BLUE, COLOURS, FAINT, STROKES, WIDTH, as_percent, colour, headroom, mark, stroke
from safeneuron.redundancy import READING

ORANGE, GREEN = COLOURS[2], COLOURS[3]


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
