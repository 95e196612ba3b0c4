"""What a figure is made of: panels of bars or of lines and points, as plain values that know no library.

``charts`` fills them with numbers; ``templates/charts.js`` draws them live, ``figures`` for print. A panel is of the
kind ``bars`` or ``plot``; every mark carries the words that stand beside it when it is pointed at. Colours are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Axis:
    """An axis: its title, whether it counts percent, its ends (None: those of the data), and its ticks if not round."""

    title: str
    percent: bool = False
    min: float | None = None
    max: float | None = None
    log: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None


@dataclass(frozen=True)
class BarPart:
    """A piece of a bar, stacked on the one before it; its colour is that of the series if it has none."""

    value: float
    colour: int | None = None
    hatched: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a series in a group, with its interval if it has one."""

    group: int
    series: int
    parts: tuple[BarPart, ...]
    low: float | None = None
    high: float | None = None
    tip: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point of a plot, with intervals upwards (``low``, ``high``) and sideways (``left``, ``right``) if known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None
    tip: str


@dataclass(frozen=True)
class Series:
    """A name in the legend; in a plot also its points, and its colour if that is not its place."""

    name: str
    colour: int | None = None
    points: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Note:
    """An entry of the legend that is no series: a colour, or how something looks."""

    text: str
    look: Literal["hatched", "interval"] | None = None
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChartPanel:
    """One pair of axes. ``height`` is in pixels of the page; ``sparse`` groups are many, and not all are named."""

    kind: Literal["bars", "plot"]
    label: str
    title: str | None = None
    name: str | None = None
    x: Axis | None = None
    y: Axis
    series: tuple[Series, ...]
    height: int = 210
    notes: tuple[Note, ...] = ()
    groups: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    sparse: bool = False
    lines: bool = False
    radius: float = 4


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its panels side by side, one above the other (``stacked``), or one at a time (``choose``)."""

    panels: tuple[ChartPanel, ...]
    stacked: bool = False
    choose: bool = False

    def to_json(self) -> dict[str, Any]:
        """As the page's script takes it: what has its default is not there."""
        record: dict[str, Any] = TypeAdapter(Chart).dump_python(self, mode="json", exclude_defaults=True)
        return record
