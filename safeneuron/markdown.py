"""Markdown for release notes and pull requests, in which a stranger's text stays text."""

from __future__ import annotations

import re

from safeneuron.tables import Table


def tabled(title: str, note: str, table: Table) -> list[str]:
    """A section with a table, or nothing if the table has no rows."""
    return [f"## {title}", note, piped(table)] if table[1] else []


def plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no end of a table cell."""
    line = re.sub(r"[\r\n]+", " ", str(text)).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)


def piped(table: Table) -> str:
    """A Markdown table."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else plain(cell) for cell in line)} |" for line in lines)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
