"""The figures of the report, drawn with matplotlib as SVG text that is the same for the same results.

Text stays text, so that a page can give it its own font, and all lines that are not data have one of two colours, so
that a page with a dark background can exchange them. Data colours are those of Okabe and Ito, told apart by all eyes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from safeneuron.reporting.results import COLUMNS, attack_of, incoherent_share, success_of

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType


INK = "#3b4048"
FAINT = "#d9dce1"
BLUE = "#0072b2"
COLOURS = ("#868d96", BLUE, "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
STROKES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
MARKERS = "osD^v"
WIDTH = 8.6
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # It comes with matplotlib, so the layout is the same everywhere, and it is wide.
    "font.size": 8.5,
    "text.parse_math": False,  # A dollar in a name is a dollar.
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}


def draw_figures(results: dict[str, Any]) -> dict[str, str]:
    """SVG text of every figure for which there are numbers: some of ``attack``, ``curve``, ``layers``, ``training``."""
    drawn = {}
    for name, figure in wanted(results).items():
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            drawn[name] = as_text(figure(results["states"]), name)
    return drawn


def as_pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """The same figures as PNG of 300 dots an inch on white, where a paper or a slide takes no SVG."""
    drawn = {}
    for name, figure in wanted(results).items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure(results["states"]).savefig(buffer, format="png", dpi=300, metadata={"Software": None})
        drawn[name] = buffer.getvalue()
    return drawn


def wanted(results: dict[str, Any]) -> dict[str, Callable[[Sequence[dict[str, Any]]], Figure]]:
    """The figures for which there are numbers, by name."""
    states = results["states"]
    found: dict[str, Callable[[Sequence[dict[str, Any]]], Figure]] = {}
    if any(success_of(attack_of(state, *column)) for state in states for column in COLUMNS):
        found["attack"] = attack_figure
    if any(state["curve"] for state in states):
        found["curve"] = curve_figure
    if any(state["neurons"] for state in states):
        found["layers"] = layers_figure
    if any(state["training"] for state in states):
        found["training"] = training_figure
    return found


def as_text(figure: Figure, name: str) -> str:
    """The figure as one ``<svg>`` element without date, version, background or external reference.

    Identifiers get the name of the figure in front, because several figures stand in one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", FONT)

    def prefixed(tag: re.Match[str]) -> str:
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])

    return re.sub(r"<[^<>]*>", prefixed, text)


def themed(figure: str) -> Markup:
    """A figure for the page, its lines and its darkest colour in those of the page, light or dark."""
    return Markup(figure.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)").replace(BLUE, "var(--blue)"))


def attack_figure(states: Sequence[dict[str, Any]]) -> Figure:
    """Attack success rate of every state for every set pruned, the incoherent share hatched on top."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    groups = [column for column in COLUMNS if any(success_of(attack_of(state, *column)) for state in states)]
    width = 0.82 / len(states)
    for index, state in enumerate(states):
        for group, column in enumerate(groups):
            attack = attack_of(state, *column)
            share = success_of(attack)
            if share:
                x = group + (index - (len(states) - 1) / 2) * width
                draw_bar(axes, x, width * 0.88, share.rate, incoherent_share(attack) or 0.0, index)
                axes.plot([x, x], [share.low, share.high], color=INK, linewidth=0.9, solid_capstyle="butt")
    labels = [name if knowledge in ("none", "control") else f"{name}\n{knowledge}" for name, knowledge in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("attack success rate")
    as_percent(axes)
    handles: list[Patch | Line2D] = [
        Patch(color=colour(index), alpha=opacity(index), label=state["name"]) for index, state in enumerate(states)
    ]
    handles.append(Patch(facecolor="none", edgecolor=INK, hatch="/////", linewidth=0.6, label="incoherent"))
    handles.append(Line2D([], [], color=INK, linewidth=0.9, label="95 % interval"))
    place_legend(figure, handles)
    return figure


def draw_bar(axes: Axes, x: float, width: float, rate: float, incoherent: float, index: int) -> None:
    """One bar: complied in full colour, incoherent hatched on top of it."""
    axes.bar(x, rate, width, color=colour(index), alpha=opacity(index))
    if incoherent:
        edge = colour(index)
        axes.bar(x, incoherent, width, rate, facecolor="none", edgecolor=edge, hatch="/////", linewidth=0.6)


def curve_figure(states: Sequence[dict[str, Any]]) -> Figure:
    """Attack success rate, and below it the incoherent share, against the share of neurons pruned."""
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    success, broken = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    densities: set[float] = set()
    for index, state in enumerate(states):
        judged = [point for point in state["curve"] if point["rate"] is not None]
        curve = sorted(judged, key=lambda point: float(point["density"]))
        if curve:
            x = [point["density"] for point in curve]
            densities.update(x)
            low, high = [point["low"] for point in curve], [point["high"] for point in curve]
            success.fill_between(x, low, high, color=colour(index), alpha=0.15, linewidth=0)
            rates = [point["rate"] for point in curve]
            success.plot(x, rates, stroke(index), color=colour(index), marker="o", markersize=3.5, linewidth=1.6)
            incoherent = [point["incoherent"] for point in curve]
            broken.plot(x, incoherent, stroke(index), color=colour(index), marker="o", markersize=3, linewidth=1.2)
    positive = sorted(density for density in densities if density > 0)
    if positive and positive[-1] >= 20 * positive[0]:
        broken.set_xscale("symlog", linthresh=positive[0])
    if len(densities) <= 9:
        broken.set_xticks(sorted(densities))
    broken.minorticks_off()
    broken.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    broken.set_xlabel("share of all neurons pruned, highest scores first")
    success.set_ylabel("attack success rate")
    broken.set_ylabel("incoherent")
    as_percent(success)
    as_percent(broken, 0.5)
    place_legend(figure, state_lines(states, "curve"))
    return figure


def layers_figure(states: Sequence[dict[str, Any]]) -> Figure:
    """Neurons found in every layer, one panel a state, all on the same axes."""
    known = [state for state in states if state["neurons"]]
    columns = min(len(known), 2 if len(known) in (2, 4) else 3)
    rows = -(-len(known) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + (2.3 if columns == 1 else 1.75) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, state in zip(panels, known, strict=False):
        counts = state["neurons"]["per_layer"]
        layers = range(len(counts["FULL"]))
        axes.bar(layers, counts["FULL"], width=0.86, color=FAINT, label="FULL (either)")
        axes.plot(layers, counts["ES"], color=BLUE, linewidth=1.5, label="ES, effect size")
        axes.plot(layers, counts["SAS"], "--", color="#d55e00", linewidth=1.5, label="SAS, activation shift")
        axes.set_title(f"{state['name']}: {state['neurons']['FULL']:,} neurons")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(known) :]:
        axes.set_visible(False)
    place_legend(figure, panels[0].get_legend_handles_labels()[0])
    figure.supxlabel("layer", fontsize=8.5)
    figure.supylabel("neurons", fontsize=8.5)
    return figure


def training_figure(states: Sequence[dict[str, Any]]) -> Figure:
    """Loss, preference accuracy and reward margin over the steps of each trained state."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {"loss": "loss", "accuracy": "preference accuracy", "margin": "reward margin"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for index, state in enumerate(states):
            steps = [step for step in state["training"] if step.get(key) is not None]
            if steps:
                x, y = [step["step"] for step in steps], [step[key] for step in steps]
                axes.plot(x, y, stroke(index), color=colour(index), linewidth=1.4)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    as_percent(panels[1])
    place_legend(figure, state_lines(states, "training"))
    return figure


def scatter(points: Sequence[dict[str, Any]], across: str, up: str) -> str:
    """SVG text: shares against shares, a point with its intervals for each (``comparison.scatter_points``)."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "scatter"}):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots()
        for index, point in enumerate(points):
            (x, left, right), (y, low, high) = point["x"], point["y"]
            shape = "osD^v"[index // len(COLOURS) % 5]
            across_by, up_by = [[x - left], [right - x]], [[y - low], [high - y]]
            axes.errorbar([x], [y], up_by, across_by, shape, color=colour(index), elinewidth=0.9, label=point["name"])
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        as_percent(axes)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        figure.legend(loc="outside upper left", ncols=min(len(points), 4))
        return as_text(figure, "scatter")


def state_lines(states: Sequence[dict[str, Any]], key: str) -> list[Line2D]:
    """Legend entries of the states that have something under ``key``."""
    return [
        Line2D([], [], color=colour(index), linestyle=stroke(index), linewidth=1.6, label=state["name"])
        for index, state in enumerate(states)
        if state[key]
    ]


def colour(index: int) -> str:
    """Colour of a state, the same in every figure."""
    return COLOURS[index % len(COLOURS)]


def opacity(index: int) -> float:
    """Opacity of the bar of a state; it changes where the colours begin again."""
    return (1.0, 0.5)[index // len(COLOURS) % 2]


def stroke(index: int) -> Literal["-", "--", ":"]:
    """Line of a state; it changes where the colours begin again."""
    return STROKES[index // len(COLOURS) % len(STROKES)]


def mark(index: int) -> str:
    """Mark of a state, so that it is known without its colour too."""
    return MARKERS[index % len(MARKERS)]


def headroom(axes: Axes, highest: float, entries: int) -> None:
    """Room above the highest bar for a legend of so many entries inside the axes."""
    axes.set_ylim(0, max(highest, 1) * (1.05 + 0.11 * entries))


def as_percent(axes: Axes, step: float = 0.25) -> None:
    """From 0 to 100 %, whatever the data: a small difference must not look large."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def place_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend above all panels, in as many rows as it needs."""
    figure.legend(handles=list(handles), loc="outside upper left", ncols=min(len(handles), 7), columnspacing=1.4)
