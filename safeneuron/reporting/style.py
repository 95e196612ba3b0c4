"""The look of all figures: colours, lines and fonts, and a figure as SVG text that is the same for the same numbers.

Text stays text, so that a page can give it its own font, and all lines that are not data have one of two colours, so
that a page with a dark background can exchange them. Data colours are those of Okabe and Ito, told apart by all eyes.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

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


def as_text(figure: Figure, name: str) -> str:
    """The figure as one ``<svg>`` element without date, version, background or external reference.

    Identifiers get the name of the figure in front, because several figures stand in one page.

    Args:
        figure: The drawn figure.
        name: Its name, the same on every machine.

    Returns:
        The element, from ``<svg`` on.
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


def colour(index: int) -> str:
    """Colour of a state, the same in every figure.

    Args:
        index: Place of the state.

    Returns:
        The colour as ``#rrggbb``.
    """
    return COLOURS[index % len(COLOURS)]


def opacity(index: int) -> float:
    """Opacity of the bar of a state; it changes where the colours begin again.

    Args:
        index: Place of the state.

    Returns:
        Between 0 and 1.
    """
    return (1.0, 0.5)[index // len(COLOURS) % 2]


def stroke(index: int) -> Literal["-", "--", ":"]:
    """Line of a state; it changes where the colours begin again.

    Args:
        index: Place of the state.

    Returns:
        A line style of matplotlib.
    """
    return STROKES[index // len(COLOURS) % len(STROKES)]


def mark(index: int) -> str:
    """Mark of a state, so that it is known without its colour too.

    Args:
        index: Place of the state.

    Returns:
        A marker of matplotlib.
    """
    return MARKERS[index % len(MARKERS)]


def headroom(axes: Axes, highest: float, entries: int) -> None:
    """Room above the highest bar for a legend of so many entries inside the axes.

    Args:
        axes: Axes with bars.
        highest: Height of the highest bar.
        entries: Lines of the legend.
    """
    axes.set_ylim(0, max(highest, 1) * (1.05 + 0.11 * entries))


def as_percent(axes: Axes, step: float = 0.25) -> None:
    """From 0 to 100 %, whatever the data: a small difference must not look large.

    Args:
        axes: The axes of the figure.
        step: Distance of the ticks, as a share.
    """
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
