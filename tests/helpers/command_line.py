"""The program as the tests call it: in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from typer.testing import CliRunner, Result

from safeneuron.cli import app
from tests import ROOT

PROGRAM = [sys.executable, "-c", "from safeneuron.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
SMALL = [
    *("--set", 'attack.sets=["FULL"]', "--set", 'attack.knowledge=["static"]', "--set", "attack.random=false"),
    *("--set", "attack.curve=[]", "--set", "variants={}", "--set", "align.rounds=1"),
]


def invoke(*arguments: object) -> Result:
    """The program in this process."""
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=ENVIRONMENT, **options)


def refusal(result: Result) -> str:
    """The one sentence on stderr of a program that ended with exit code 2."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line
