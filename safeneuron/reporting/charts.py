"""The figures of a report, filled with the numbers of its results: the only description of each.

The page draws them live, ``figures`` draws them for print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from safeneuron.reporting.details import StrongNeuron
from safeneuron.reporting.formatting import attack_title, in_words, percent, with_interval
from safeneuron.reporting.panels import Axis, Bar, BarPart, Chart, ChartPanel, Mark, Note, Series
from safeneuron.reporting.records import TrainingStep
from safeneuron.reporting.results import RunResults, StateResults

MOST_TICKS = 9
"""Shares pruned that are written at the axis of a curve, at most."""


class Bounded(NamedTuple):
    """A share and both ends of its interval."""

    value: float
    low: float
    high: float


RATE = Axis("attack success rate", percent=True, min=0, max=1)
_HATCHED, _INTERVAL = Note("incoherent", "hatched"), Note("95 % interval", "interval")
_CRITERIA = (("ES only", 1), ("ES and SAS", 4), ("SAS only", 2))
"""The parts of a set found by either criterion, with their colours."""


def charts_of(results: RunResults, neurons: Mapping[str, Sequence[StrongNeuron]] | None = None) -> dict[str, Chart]:
    """Every figure for which there are numbers; ``neurons`` are the strongest of each state.

    Args:
        results: The results of a run.
        neurons: The strongest neurons of each state; without them there is no such chart.

    Returns:
        The charts by name: some of ``attack``, ``curve``, ``layers``, ``neurons``, ``training``.
    """
    charts = {
        "attack": attack_chart(results),
        "curve": curve_chart(results.states),
        "layers": layers_chart(results.states),
        "neurons": neuron_chart(neurons or {}, results.layers),
        "training": training_chart(results.states),
    }
    return {name: chart for name, chart in charts.items() if chart.panels}


def attack_chart(results: RunResults) -> Chart:
    """Attack success rate of every state under every attack, the incoherent share on top of it."""
    columns = [c for c in results.columns() if any(state.success(*c) for state in results.states)]
    bars = []
    for group, column in enumerate(columns):
        for index, state in enumerate(results.states):
            attack = state.attack(*column)
            success = attack.success if attack else None
            if attack is None or success is None:
                continue
            broken = attack.incoherent or 0.0
            lines = [
                f"{state.name}, {attack_title(*column)}",
                f"complied: {in_words(success)}, {success.count} of {success.n}",
                f"incoherent: {percent(broken)}",
                f"{attack.neurons:,} neurons",
            ]
            parts = (BarPart(success.rate), BarPart(broken, hatched=True))
            bars.append(
                Bar(
                    group=group,
                    series=index,
                    parts=parts if broken else parts[:1],
                    low=success.low,
                    high=success.high,
                    tip="\n".join(lines),
                )
            )
    panel = ChartPanel(
        kind="bars",
        label="Attack success rate of every state under every attack",
        y=RATE,
        groups=tuple(attack_title(*column) for column in columns),
        series=tuple(Series(state.name) for state in results.states),
        bars=tuple(bars),
        notes=(_HATCHED, _INTERVAL),
    )
    return Chart(panels=(panel,) if bars else ())


def curve_chart(states: Sequence[StateResults]) -> Chart:
    """Attack success rate, and below it the incoherent share, against the share of neurons pruned."""
    success, broken, densities = [], [], set()
    for index, state in enumerate(states):
        marks, shares = [], []
        for point in sorted(state.curve, key=lambda point: point.density):
            rate = point.success
            if rate is None:
                continue
            densities.add(point.density)
            tip = (
                f"{state.name}, {100 * point.density:.3g} % pruned ({point.neurons:,} neurons)\n"
                f"complied: {with_interval(*rate)}\nincoherent: {percent(point.incoherent)}"
            )
            marks.append(Mark(x=point.density, y=rate[0], low=rate[1], high=rate[2], tip=tip))
            shares.append(Mark(x=point.density, y=point.incoherent, tip=tip))
        if marks:
            success.append(Series(state.name, index, tuple(marks)))
            broken.append(Series(state.name, index, tuple(shares)))
    every = -(-len(densities) // MOST_TICKS)
    ticks = tuple((density, f"{100 * density:.3g} %") for density in sorted(densities)[:: every or 1])
    wide = bool(densities) and min(densities) > 0 and max(densities) >= 10 * min(densities)
    axis = Axis("share of all neurons pruned, highest scores first", log=wide, ticks=ticks)
    label = "Attack success rate as more neurons are pruned"
    panels = (
        ChartPanel(
            kind="plot", lines=True, label=label, x=axis, y=RATE, series=tuple(success), height=230, notes=(_INTERVAL,)
        ),
        ChartPanel(
            kind="plot",
            lines=True,
            label="Share of incoherent text as more neurons are pruned",
            x=axis,
            y=Axis("incoherent", percent=True, min=0, max=1),
            series=tuple(broken),
            height=90,
            radius=3,
        ),
    )
    return Chart(panels=panels if success else (), stacked=True)


def layers_chart(states: Sequence[StateResults]) -> Chart:
    """Safety neurons in each layer, those found by both criteria apart; all panels on the same axes."""
    known = [(state.name, state.neurons) for state in states if state.neurons]
    top = max((max(neurons.per_layer.full, default=0) for _, neurons in known), default=0)
    panels: list[ChartPanel] = []
    for name, neurons in known:
        counts = neurons.per_layer
        bars = []
        for layer, (es, sas, full) in enumerate(zip(counts.es, counts.sas, counts.full, strict=True)):
            # The set is the union of both, so its size tells how many are in both.
            sizes = (full - sas, es + sas - full, full - es)
            parts = (BarPart(size, colour) for size, (_, colour) in zip(sizes, _CRITERIA, strict=True) if size > 0)
            tip = f"{name}, layer {layer}: {full:,} neurons\nES {es:,}, SAS {sas:,}, both {sizes[1]:,}"
            bars.append(Bar(group=layer, series=0, parts=tuple(parts), tip=tip))
        panels.append(
            ChartPanel(
                kind="bars",
                title=f"{name}: {neurons.full:,} neurons",
                label=f"Safety neurons of {name} in each layer",
                sparse=True,
                height=130,
                x=Axis("layer"),
                y=Axis("neurons", max=max(1, top)),
                groups=tuple(str(layer) for layer in range(len(bars))),
                series=(Series(name),),
                bars=tuple(bars),
                notes=tuple(Note(text, colour=colour) for text, colour in _CRITERIA) if not panels else (),
            )
        )
    return Chart(panels=tuple(panels))


def neuron_chart(neurons: Mapping[str, Sequence[StrongNeuron]], layers: int) -> Chart:
    """The strongest neurons of a state, by depth and effect size."""
    panels = []
    for name, strongest in neurons.items():
        groups: dict[str, list[Mark]] = {title: [] for title, _ in _CRITERIA}
        for neuron in strongest:
            title = {1: "ES only", 2: "SAS only", 3: "ES and SAS"}[neuron.criteria]
            tip = f"layer {neuron.layer}, neuron {neuron.channel} ({title})\n"
            tip += f"effect size d {neuron.d:.2f}, shift z {neuron.z:.2f}"
            groups[title].append(Mark(x=neuron.layer + neuron.channel / neuron.width, y=neuron.d, tip=tip))
        series = tuple(Series(title, colour, tuple(groups[title])) for title, colour in _CRITERIA if groups[title])
        if series:
            panels.append(
                ChartPanel(
                    kind="plot",
                    name=name,
                    title=f"{name}: the {len(strongest):,} strongest",
                    label=f"The strongest safety neurons of {name} by layer and effect size",
                    radius=2.6,
                    height=230,
                    x=Axis("layer, and place of the neuron in it", min=0, max=layers),
                    y=Axis("effect size d"),
                    series=series,
                )
            )
    return Chart(panels=tuple(panels), choose=True)


def training_chart(states: Sequence[StateResults]) -> Chart:
    """Loss, preference accuracy and reward margin over the steps of each trained state."""
    quantities: tuple[tuple[str, Callable[[TrainingStep], float | None]], ...] = (
        ("loss", lambda step: step.loss),
        ("preference accuracy", lambda step: step.accuracy),
        ("reward margin", lambda step: step.margin),
    )
    panels = []
    for title, value_of in quantities:
        series = []
        for index, state in enumerate(states):
            known = [(step.step, value) for step in state.training if (value := value_of(step)) is not None]
            marks = [Mark(x=x, y=y, tip=f"{state.name}, step {x}: {title} {y:.3g}") for x, y in known]
            if marks:
                series.append(Series(state.name, index, tuple(marks)))
        axis = Axis(title, percent=True, min=0, max=1) if title == "preference accuracy" else Axis(title)
        if series:
            panels.append(
                ChartPanel(
                    kind="plot",
                    lines=True,
                    label=f"{title} over the steps",
                    radius=1.6,
                    height=150,
                    x=Axis("step"),
                    y=axis,
                    series=tuple(series),
                )
            )
    return Chart(panels=tuple(panels))


class ScatterPoint(NamedTuple):
    """A name, and two shares with their intervals."""

    name: str
    x: Bounded
    y: Bounded


def scatter_chart(points: Sequence[ScatterPoint], x: str, y: str) -> Chart:
    """Shares against shares, a point with its intervals for each; ``x`` and ``y`` say what they are shares of."""
    series = []
    for index, point in enumerate(points):
        tip = f"{point.name}\n{x}: {with_interval(*point.x)}\n{y}: {with_interval(*point.y)}"
        (across, left, right), (up, low, high) = point.x, point.y
        mark = Mark(x=across, left=left, right=right, y=up, low=low, high=high, tip=tip)
        series.append(Series(point.name, index, (mark,)))
    panel = ChartPanel(
        kind="plot",
        label=f"{y} against {x}",
        height=300,
        radius=5.5,
        x=Axis(x, percent=True, min=0, max=1),
        y=Axis(y, percent=True, min=0, max=1),
        series=tuple(series),
        notes=(_INTERVAL,),
    )
    return Chart(panels=(panel,) if series else ())
