"""One self-contained page from a template: its style, its script and its data inside, and nothing loaded from anywhere.

Everything is escaped by the template; data go in as JSON in which no character can end their element. The page's own
policy allows only the one script whose hash it names, so that a script in an answer could not run even if it got out.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safeneuron.shares import decimal, percent

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
    own = {
        "style": Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": {name: embedded(value) for name, value in data.items()},
        "percent": percent,
        "decimal": decimal,
    }
    return environment.get_template(template).render({**values, **own})


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
