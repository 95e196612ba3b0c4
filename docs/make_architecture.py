"""Draw the packages from their imports, and list them in docs/architecture.md: ``python docs/make_architecture.py``.

With ``--check`` it says whether the figure or the list is stale, and writes nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from generated import write_or_check

PACKAGE = Path(__file__).parents[1] / "safeneuron"
PAGE = Path(__file__).with_name("architecture.md")
FIGURE = Path(__file__).parent / "figures" / "packages.svg"
BEGIN, END = "<!-- packages: docs/make_architecture.py -->\n", "<!-- /packages -->"

# Pixels: of the figure, its margin, what lies between boxes of a floor and between floors, and between two long lines.
WIDTH, MARGIN, GUTTER, HEIGHT, BETWEEN, LANE = 960, 16, 72, 74, 34, 14
STYLE = (
    "text{font-family:'DejaVu Sans',Verdana,sans-serif;fill:#1b1f24;text-anchor:middle}"
    ".name{font-size:15px;font-weight:bold}.modules{font-size:10.5px;fill:#4a5158}"
    "rect.package{fill:#f2f5f9;stroke:#4477aa;stroke-width:1.2}path{fill:none;stroke:#8a9199;stroke-width:1.1}"
)


def packages() -> list[str]:
    """The packages, by name."""
    return sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())


def modules(package: str) -> list[str]:
    """The modules of a package, by name."""
    return sorted(path.stem for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__")


def imports(package: str) -> set[str]:
    """The other packages that one imports, inside functions and for type checkers too."""
    owners: set[str] = set()
    for path in (PACKAGE / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "safeneuron":
                inner = (node.module or "").split(".")[1:2]
                owners |= set(inner or [alias.name for alias in node.names])
    return (owners & set(packages())) - {package}


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """The packages by floor: each stands one above the highest that it imports."""
    placed: dict[str, int] = {}
    while len(placed) < len(graph):
        ready = [name for name in graph if name not in placed and graph[name] <= placed.keys()]
        if not ready:
            raise SystemExit(f"the packages import one another in a circle: {sorted(graph.keys() - placed.keys())}")
        placed |= {name: 1 + max((placed[other] for other in graph[name]), default=-1) for name in ready}
    return [[name for name in sorted(graph) if placed[name] == floor] for floor in range(max(placed.values()) + 1)]


def direct(graph: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """The imports that do not follow from others: the transitive reduction of the graph."""

    def reached(name: str) -> set[str]:
        return graph[name].union(*(reached(other) for other in graph[name]))

    for name in sorted(graph):
        indirect = set().union(*(reached(other) for other in graph[name]))
        yield from ((name, other) for other in sorted(graph[name] - indirect))


def wrapped(names: list[str], width: float) -> list[str]:
    """The module names in lines that fit into a box."""
    lines, most = [""], int(width / 6.1)
    for name in names:
        longer = f"{lines[-1]}  {name}".strip()
        if len(longer) <= most:
            lines[-1] = longer
        else:
            lines.append(name)
    return lines


def paths(graph: dict[str, set[str]], boxes: dict[str, tuple[float, float, float]]) -> Iterator[str]:
    """A path for each import that no other implies; a long one runs down the middle, in a lane of its own."""
    edges = list(direct(graph))
    long = [(upper, lower) for upper, lower in edges if boxes[lower][1] - boxes[upper][1] > HEIGHT + BETWEEN]
    for upper, lower in edges:
        x, y = boxes[upper][0] + boxes[upper][2] / 2, boxes[upper][1] + HEIGHT
        far_x, far_y = boxes[lower][0] + boxes[lower][2] / 2, boxes[lower][1]
        path = f"M{x:.0f} {y:.0f}"
        if (upper, lower) in long:
            x = WIDTH / 2 + LANE * (long.index((upper, lower)) - (len(long) - 1) / 2)
            path += f"{bent(x, y + BETWEEN)}V{far_y - BETWEEN:.0f}"
        yield f'<path d="{path}{bent(far_x, far_y)}"/>'


def bent(x: float, y: float) -> str:
    """A curve to a point, which it reaches from above."""
    return f"S{x:.0f} {y - BETWEEN / 2:.0f} {x:.0f} {y:.0f}"


def figure() -> str:
    """The SVG: a box for each package, floor over floor, and a line for each import that no other implies."""
    graph = {package: imports(package) for package in packages()}
    rows = floors(graph)
    boxes: dict[str, tuple[float, float, float]] = {}  # left, top, width
    for number, row in enumerate(reversed(rows)):
        width = min((WIDTH - 2 * MARGIN - GUTTER * (len(row) - 1)) / len(row), 520)
        left = (WIDTH - width * len(row) - GUTTER * (len(row) - 1)) / 2
        for place, name in enumerate(row):
            boxes[name] = (left + place * (width + GUTTER), MARGIN + number * (HEIGHT + BETWEEN), width)
    total = 2 * MARGIN + len(rows) * HEIGHT + (len(rows) - 1) * BETWEEN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" role="img" aria-label="Packages">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
        *paths(graph, boxes),
    ]
    for name, (left, top, width) in boxes.items():
        parts.append(f'<rect class="package" x="{left:.0f}" y="{top}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>')
        parts.append(f'<text class="name" x="{left + width / 2:.0f}" y="{top + 22}">{escape(name)}</text>')
        for number, line in enumerate(wrapped(modules(name), width)):
            height = top + 40 + 14 * number
            parts.append(f'<text class="modules" x="{left + width / 2:.0f}" y="{height}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def table() -> str:
    """The list of packages, highest first: what each face says belongs there, and the modules."""
    graph = {package: imports(package) for package in packages()}
    rows = ["| package | what belongs there | modules |", "|---|---|---|"]
    for row in reversed(floors(graph)):
        for name in row:
            tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
            purpose = " ".join((ast.get_docstring(tree) or "").replace("``", "`").split())
            rows.append(f"| `{name}` | {purpose} | {' '.join(modules(name))} |")
    return "\n".join(rows) + "\n"


def order() -> str:
    """The floors in one line, lowest first; packages of one floor are side by side."""
    graph = {package: imports(package) for package in packages()}
    return "```text\n" + " < ".join(" | ".join(row) for row in floors(graph)) + "\n```\n"


def page() -> str:
    """The page with its list as the packages are now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + order() + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page(), FIGURE: figure()}, sys.argv[1:], "docs/make_architecture.py"))
