"""One self-contained page from a template: its style, its script and its data inside, and nothing loaded from anywhere.

Everything is escaped by the template; data go in as JSON in which no character can end their element. The page's own
policy allows only the one script whose hash it names, so that a script in an answer could not run even if it got out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safeneuron.reporting.details import JudgedAnswer
from safeneuron.reporting.formatting import Table, attack_title, decimal, interval, percent

TEMPLATES = Path(__file__).with_name("templates")
SCRIPTS = ("charts.js", "page.js")


def as_page(template: str, values: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page of a template; ``data`` are the JSON values that its script finds, by the id of their element."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = script_text()
    shared = {
        "style": Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": {name: embedded(value) for name, value in data.items()},
        "percent": percent,
        "decimal": decimal,
        "interval": interval,
    }
    return environment.get_template(template).render({**values, **shared})


def script_text() -> str:
    """The page's script, in a scope of its own."""
    body = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}}})();\n'


def embedded(value: object) -> Markup:
    """A value as JSON for a script element: no ``<`` or ``&`` in it, so no tag or comment can begin or end there."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def as_image(svg: str) -> str:
    """The address of a figure for ``<img>``: there nothing of it runs, and none of its names meet the page's."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


LONGEST = 20_000
"""Characters of one answer in the page."""
ROOM = 15_000_000
"""Bytes of all answers in the page; where they take more, each is cut, so that a page can still be sent by mail."""


def masked(text: str) -> tuple[str, int]:
    """The first words of a response and the number of characters held back.

    At most three words, 24 characters and half of the text, so that a short answer or one without spaces is masked too.
    """
    text = text.strip()
    opening = " ".join(text.split()[:3])[: min(24, len(text) // 2)].rstrip()
    return opening, len(text) - len(opening)


class ShownAnswer(NamedTuple):
    """An answer as a reader may see it: its text, and the number of characters that were held back."""

    answer: JudgedAnswer
    text: str
    hidden: int


def examples_shown(examples: Iterable[JudgedAnswer], show_text: bool) -> dict[str, list[ShownAnswer]]:
    """Examples by state and attack as a reader may see them.

    Without ``show_text`` the response is cut here, before any template sees it.
    """
    groups: dict[str, list[ShownAnswer]] = {}
    for answer in examples:
        text, hidden = (answer.response, 0) if show_text else masked(answer.response)
        title = f"{answer.state}, {attack_title(answer.set, answer.knowledge)}, {answer.kind}"
        groups.setdefault(title, []).append(ShownAnswer(answer, text, hidden))
    return groups


def compressed(responses: Sequence[JudgedAnswer], show_text: bool) -> dict[str, Any]:
    """The answers for the browser, as JSON: lists of names and prompts, each once, and rows that point into them.

    A row is state, attack, kind, verdict, prompt (all indices), text, and the number of characters that are not there:
    those masked without ``show_text``, or cut where all answers would not find room.
    """
    names: dict[str, dict[str, int]] = {key: {} for key in ("states", "attacks", "kinds", "verdicts", "prompts")}

    def place(key: str, name: str) -> int:
        return names[key].setdefault(name, len(names[key]))

    cut = _cut_to(limit_of(responses)) if show_text else masked
    rows = [
        [
            place("states", answer.state),
            place("attacks", attack_title(answer.set, answer.knowledge)),
            place("kinds", answer.kind),
            place("verdicts", answer.verdict),
            place("prompts", _request(answer)),
            *cut(answer.response),
        ]
        for answer in responses
    ]
    return {**{key: list(indices) for key, indices in names.items()}, "whole": show_text, "rows": rows}


def _request(answer: JudgedAnswer) -> str:
    """The request, with the name of its image if it had one."""
    return f"{answer.prompt} [image: {answer.image}]" if answer.image else answer.prompt


def limit_of(responses: Sequence[JudgedAnswer]) -> int:
    """Characters of one answer for which there is room, the same for all of them."""
    size = sum(len(response.response.encode()) for response in responses)
    if size <= ROOM:
        return LONGEST
    characters = sum(len(response.response) for response in responses)
    return min(LONGEST, int(ROOM / len(responses) * characters / size))


def _cut_to(limit: int) -> Callable[[str], tuple[str, int]]:
    return lambda text: (text[:limit], max(0, len(text) - limit))


def tabled(title: str, note: str, table: Table) -> list[str]:
    """A section with a table, or nothing if the table has no rows."""
    return [f"## {title}", note, table_escaped(table)] if table.rows else []


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no end of a table cell.

    Args:
        text: Anything, from a stranger too.

    Returns:
        One line of Markdown.
    """
    line = re.sub(r"[\r\n]+", " ", str(text)).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)


def table_escaped(table: Table) -> str:
    """A Markdown table.

    Args:
        table: Header and rows.

    Returns:
        The lines of the table; what is in its cells is escaped.
    """
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else escaped(cell) for cell in line)} |" for line in lines)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it.

    Args:
        text: Any text.

    Returns:
        The block with its fences.
    """
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
