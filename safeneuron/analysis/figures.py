"""The figures of an analysis, fit for a paper: from the record of each part to SVG and PNG, in the report's style."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter, StrMethodFormatter

from safeneuron.analysis.depth import DepthRecord
from safeneuron.analysis.drift import StateRecord, StatesRecord
from safeneuron.analysis.methods import MethodsRecord, Volcano
from safeneuron.analysis.redundancy import OutcomeRecord, RedundancyRecord, StateRedundancy
from safeneuron.analysis.scaling import RoundRecord, ScalePoint
from safeneuron.analysis.stability import StabilityRecord
from safeneuron.analysis.topics import TopicsRecord
from safeneuron.reporting.style import (
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


def topics_figure(record: TopicsRecord) -> Figure:
    """Roles by layer (Fig. 3), and overlap against the number of topics with both baselines (Fig. 5)."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    bottom = np.zeros(len(record.widths))
    roles = record.layers
    bars = ((roles.core, BLUE, "in all topics"), (roles.shared, ORANGE, "in some"), (roles.specific, FAINT, "in one"))
    for role, tint, label in bars:
        counts = np.array(role)
        left.bar(range(len(counts)), counts, bottom=bottom, width=0.85, color=tint, label=label)
        bottom = bottom + counts
    _layers(left, "neurons by role")
    headroom(left, bottom.max(), 3)
    left.legend(loc="upper left")
    topics, dealt, chance = record.overlaps, record.shuffled_topics, record.random_neurons
    _overlap(
        middle,
        [(overlap.topics, overlap.jaccard) for overlap in topics],
        [(overlap.topics, overlap.jaccard) for overlap in dealt],
        [(random.topics, random.jaccard, random.jaccard_low, random.jaccard_high) for random in chance],
    )
    middle.set_title("intersection / union")
    _overlap(
        right,
        [(overlap.topics, overlap.shared) for overlap in topics],
        [(overlap.topics, overlap.shared) for overlap in dealt],
        [(random.topics, random.shared, random.shared_low, random.shared_high) for random in chance],
    )
    right.set_title("intersection / mean size")
    middle.legend(loc="upper right")
    return figure


def _overlap(
    axes: Axes,
    topics: Sequence[tuple[int, float]],
    dealt: Sequence[tuple[int, float]],
    chance: Sequence[tuple[int, float, float, float]],
) -> None:
    """Overlaps by number of topics, beside prompts dealt at random and random sets with both ends of their spread."""
    means = [(count, mean) for count, mean, _, _ in chance]
    for points, label, tint, style in (
        (topics, "topics", BLUE, "-"),
        (dealt, "prompts dealt at random", ORANGE, "--"),
        (means, "random neurons", GREY, ":"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), color=tint, linestyle=style, marker="o", markersize=2.5, label=label)
    counts, _, low, high = zip(*chance, strict=True)
    axes.fill_between(counts, low, high, color=GREY, alpha=0.25, linewidth=0)
    axes.set_xlabel("number of topics K")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    as_percent(axes)


def depth_figure(record: DepthRecord) -> Figure:
    """Density over relative depth (Fig. 4), and the thirds, of every set."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    sets = record.sets
    for index, placed in enumerate(sets):
        middles = (np.arange(len(placed.density)) + 0.5) / len(placed.density)
        left.plot(middles, placed.density, color=colour(index), linestyle=stroke(index), label=placed.name)
    left.set_xlabel("relative depth")
    left.set_title("density of the set")
    left.set_xlim(0, 1)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    figure.legend(loc="outside upper left", ncols=min(len(sets), 5))
    for index, placed in enumerate(sets):
        x = np.arange(3) + (index - (len(sets) - 1) / 2) * 0.8 / len(sets)
        right.bar(x, placed.thirds, width=0.74 / len(sets), color=colour(index), alpha=opacity(index))
    right.set_xticks(range(3), ["early", "middle", "late"])
    right.set_title("share of the set by third")
    as_percent(right)
    return figure


def stability_figure(record: StabilityRecord) -> Figure:
    """Jaccard of disjoint samples against their size, how often neurons are found again, and other ways to measure."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    samples = record.samples
    sizes = [sample.prompts for sample in samples]
    low, high = [sample.low for sample in samples], [sample.high for sample in samples]
    left.fill_between(sizes, low, high, color=BLUE, alpha=0.2, linewidth=0)
    left.plot(sizes, [sample.mean for sample in samples], color=BLUE, marker="o", markersize=3, label="two samples")
    left.plot(sizes, [sample.chance for sample in samples], color=GREY, linestyle=":", label="random neurons")
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
    middle.bar(np.arange(10) * 10 + 5, record.bootstrap.frequencies, width=8.5, color=BLUE)
    middle.set_xlabel("bootstrap samples that find it, %")
    middle.set_title("neurons ever found")
    bars = [(measured.variant, measured.jaccard, ORANGE) for measured in record.variants]
    for also in record.also:
        bars.append((f"prompts of {Path(also.prompts_of).stem}", also.jaccard, BLUE))
        bars.append(("the same requests", also.wording.jaccard, GREEN))
    bars = [bar for bar in bars if not math.isnan(bar[1])]
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


def methods_figure(record: MethodsRecord, points: Volcano) -> Figure:
    """Intersection of methods by layer (Fig. 7), and the volcano plot of d against shift."""
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, pair in enumerate(record.agreements[:6]):
        left.plot(
            range(len(pair.layers)), pair.layers, color=colour(index + 1), linestyle=stroke(index),
            label=f"{pair.first} and {pair.second} ({pair.both:,}; chance {pair.chance:,.0f})",
        )  # fmt: skip
    _layers(left, "neurons in both sets")
    left.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", ncols=3, fontsize=7)
    kinds = ((0, FAINT, "not selected"), (1, RED, "selected, q ≥ .05"), (2, BLUE, "selected, q < .05"))
    kind, shift, d = (column.numpy() for column in (points.kind, points.shift, points.d))
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


def states_figure(record: StatesRecord) -> Figure:
    """By layer: turnover, weights moved, likeness of hidden states, refusal direction, separability; a row a state."""
    states = [state for state in record.states if state.state != "T0"] or record.states
    figure = Figure(figsize=(WIDTH * 1.25, 2.2 * len(states) + 0.5), layout="constrained")
    rows = figure.subplots(len(states), 5, squeeze=False, sharex=True, sharey="col")
    for number, (state, row) in enumerate(zip(states, rows, strict=True)):
        _turnover(row[0], state)
        moved = state.moved or []
        sides = {"inside": [layer.inside for layer in moved], "outside": [layer.outside for layer in moved]}
        _lines(row[1], sides if moved else {})
        likeness = {
            "CKA, harmful": state.cka_unsafe, "CKA, benign": state.cka_safe, "cosine, harmful": state.cosine_unsafe,
        }  # fmt: skip
        _lines(row[2], likeness)
        _lines(row[3], {"own direction": state.along_own, "T0's direction": state.along_T0})
        _lines(row[4], {"intact": state.separability, "set pruned": state.separability_pruned})
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
            axes.set_title(f"{state.state}: {title}" if axes is row[0] else title, fontsize=8)
            if number == 0 and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=6.5)
    # The rows share their axes; an end that is set stops the other from moving, so that all lines must be there before.
    rows[0][2].set_ylim(top=1.02)
    rows[0][4].set_ylim(0, 1.02)
    turnovers = [(state.turnover.kept, state.turnover.lost, state.turnover.new) for state in states]
    headroom(rows[0][0], max(sum(counts) for turnover in turnovers for counts in zip(*turnover, strict=True)), 3)
    return figure


def _turnover(axes: Axes, state: StateRecord) -> None:
    kept, lost, new = state.turnover.kept, state.turnover.lost, state.turnover.new
    bottom = np.zeros(len(kept))
    for by_layer, name, tint in ((kept, "kept", BLUE), (lost, "lost", FAINT), (new, "new", ORANGE)):
        counts = np.array(by_layer)
        axes.bar(range(len(counts)), counts, bottom=bottom, width=0.85, color=tint, label=name)
        bottom = bottom + counts


def _lines(axes: Axes, series: dict[str, list[float]]) -> None:
    for index, (label, values) in enumerate(series.items()):
        known = [(x, value) for x, value in enumerate(values) if not math.isnan(value)]
        if known:
            axes.plot(
                *zip(*known, strict=True),
                color=(BLUE, ORANGE, GREEN)[index],
                linestyle=("-", "--", ":")[index],
                label=label,
            )


def redundancy_figure(record: RedundancyRecord) -> Figure:
    """Refusals left with sets pruned alone, together, and along the ranking; below, what each state's numbers are."""
    states = record.states
    figure = Figure(figsize=(WIDTH, 3.5 + 0.2 * len(states)), layout="constrained")
    (alone, together, curve), below = figure.subplots(2, 3, sharey="row", height_ratios=(2.4, 0.4 + 0.2 * len(states)))
    for index, state in enumerate(states):
        if state.sets:
            sets, points, name = state.sets, state.curve, state.state
            places = np.arange(1, len(sets) + 1) + (index - (len(states) - 1) / 2) * 0.7 / len(states)
            _refused(alone, places.tolist(), [pruned.alone for pruned in sets], index, name, "none")
            left = [state.intact, *(pruned.together for pruned in sets)]
            _refused(together, range(len(sets) + 1), left, index, name)
            _refused(curve, [point.neurons for point in points], points, index, name)
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
        if state.intervals is None:
            below[0].text(0, row, "refuses too rarely", va="center", fontsize=7)
    figure.legend(*together.get_legend_handles_labels(), loc="outside upper left", ncols=min(len(states), 6))
    figure.supxlabel(READING, fontsize=7)
    return figure


def _refused(
    axes: Axes, x: Sequence[float], outcomes: Sequence[OutcomeRecord], index: int, label: str, line: str = ""
) -> None:
    """Shares refused with their intervals; joined by the state's own line, if none is given."""
    rates = [outcome.refused for outcome in outcomes]
    down = [outcome.refused - outcome.refused_low for outcome in outcomes]
    up = [outcome.refused_high - outcome.refused for outcome in outcomes]
    axes.errorbar(
        x, rates, yerr=[down, up], color=colour(index), linestyle=line or stroke(index),
        marker=mark(index), markersize=4, linewidth=1.2, elinewidth=0.7, label=label,
    )  # fmt: skip


def _numbers(axes: Axes, states: Sequence[StateRedundancy], name: str) -> None:
    """One number of every state with its interval, a row a state; what is beyond all that was tried is an arrow."""
    most = max((_tried(state, name) for state in states), default=1)
    for row, state in enumerate(states):
        if state.intervals is not None:
            interval, beyond = state.intervals[name], 1.15 * most
            numbers = (state.numbers[name], interval.low, interval.high)
            value, low, high = (beyond if number is None else number for number in numbers)
            axes.plot([low, high], [row, row], color=colour(row), linewidth=1.6, solid_capstyle="butt")
            if high > most:
                axes.plot([high], [row], ">", color=colour(row), markersize=5, clip_on=False)
            if value <= most:
                axes.plot([value], [row], mark(row), color=colour(row), markersize=5.5, clip_on=False)
    axes.set_xlim(-0.04 * most, 1.15 * most)
    axes.set_ylim(len(states) - 0.4, -0.6)
    axes.set_yticks(range(len(states)), [state.state for state in states])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _tried(state: StateRedundancy, name: str) -> int:
    """How many sets, or neurons, a state was tried with."""
    return state.curve[-1].neurons if name == "neurons_to_halve" else len(state.sets)


def scale_figure(points: Sequence[ScalePoint]) -> Figure:
    """Attack success against the number of preference pairs (Fig. 6), a line a training and attack."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str, str], list[ScalePoint]] = {}
    for point in points:
        lines.setdefault((point.label, point.set, point.knowledge), []).append(point)
    # A training has a colour, an attack a line and a mark, and each line stands a little aside, for its intervals.
    trainings = list(dict.fromkeys(label for label, _, _ in lines))
    attacks = list(dict.fromkeys((which, knowledge) for _, which, knowledge in lines))
    aside = 0.003 * (max(point.pairs for point in points) - min(point.pairs for point in points))
    for index, ((label, name, knowledge), line) in enumerate(lines.items()):
        kind = attacks.index((name, knowledge))
        x = [point.pairs + aside * (index - (len(lines) - 1) / 2) for point in line]
        spread = [[point.rate - point.low for point in line], [point.high - point.rate for point in line]]
        axes.errorbar(
            x, [point.rate for point in line], yerr=spread, color=colour(trainings.index(label) + 1),
            linestyle=STROKES[kind % len(STROKES)], marker=mark(kind), markersize=3.5, elinewidth=0.8, linewidth=1.2,
            label=f"{label}, {name if knowledge == 'none' else f'{name} {knowledge}'}",
        )  # fmt: skip
    axes.set_xlabel("preference pairs")
    axes.set_title("attack success rate")
    as_percent(axes)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def rounds_figure(rounds: Sequence[RoundRecord]) -> Figure:
    """Attack success, and the neurons kept from changing, state by state of the main training (Table 2)."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for index, name in enumerate(rounds[0].rates):
        known = [(row, state.rates[name]) for row, state in enumerate(rounds) if state.rates[name] is not None]
        if known:
            left.plot(
                *zip(*known, strict=True), color=colour(index), linestyle=STROKES[index % len(STROKES)],
                marker=mark(index), markersize=4, label=name,
            )  # fmt: skip
    left.set_title("attack success rate")
    as_percent(left)
    right.bar(range(len(rounds)), [state.frozen or 0 for state in rounds], color=BLUE, width=0.6)
    right.set_title("neurons frozen in training")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (left, right):
        axes.set_xticks(range(len(rounds)), [state.state for state in rounds])
        axes.set_xlim(-0.5, len(rounds) - 0.5)
    figure.legend(loc="outside upper left", ncols=len(rounds[0].rates))
    return figure
