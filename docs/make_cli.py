"""Write docs/cli.md from the program itself: ``python docs/make_cli.py``; with ``--check``, say whether it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from generated import write_or_check
from typer.main import get_command
from typer.testing import CliRunner

from safeneuron.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# The command line

This page is written by `python docs/make_cli.py` from `--help` and from `safeneuron config`; a test compares them.
Exit codes: 0 done, 2 something you can mend (one sentence on the error stream says what), 130 stopped with Ctrl-C, 1 an
error of the program (with a traceback; please report it).
"""


def page() -> str:
    """The whole page, as the program is now."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    parts = [HEAD, fenced("text", said("--help"))]
    for verb in commands:
        parts += [f"## safeneuron {verb}\n", fenced("text", said(verb, "--help"))]
    parts += ["## Every setting\n", "What `safeneuron config default` prints:\n"]
    return "\n".join([*parts, fenced("toml", said("config", "default"))])


def said(*arguments: str) -> str:
    """What the program prints for these arguments on a terminal of 100 columns."""
    result = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).invoke(app, arguments, prog_name="safeneuron")
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def fenced(language: str, text: str) -> str:
    """A code block and an empty line."""
    return f"```{language}\n{text}\n```\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, sys.argv[1:], "docs/make_cli.py"))
