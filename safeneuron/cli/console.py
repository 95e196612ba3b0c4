"""The terminal: two consoles, progress bars, tables, and the options that several verbs share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from safeneuron.runtime import distributed

# Texts and paths are printed as they are: none of their characters is markup. Of many processes the first one speaks.
out = Console(
    highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not distributed.is_main(),
    force_terminal=None if distributed.is_main() else False,
)  # fmt: skip
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change one setting; may be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if not given.")]
Redo = Annotated[
    list[str] | None,
    typer.Option("--redo", metavar="STAGE", help="Make a stage (T1/attack, or attack for all) and what follows again."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, or a config to start one from.")]


class Bars:
    """Progress bars with time estimates on a terminal; one line a stage where the output is not a terminal."""

    def __init__(self) -> None:
        # The time left is estimated over the last hour, since one step of a large model takes minutes.
        self.bars = Progress(
            TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=out, transient=True, speed_estimate_period=3600,
        )  # fmt: skip
        self.task: TaskID | None = None

    def began(self, stage: str) -> None:
        """Show a bar for the stage, without a length until its first progress."""
        if out.is_terminal:
            self.task = self.bars.add_task(stage, total=None)
        else:
            out.print(f"{stage} ...")

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self.task is not None:
            self.bars.update(self.task, completed=done, total=total)

    def ended(self, stage: str, seconds: float, skipped: bool) -> None:
        """Leave one line of the stage."""
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        if skipped:
            out.print(f"{stage}: done before, skipped", style="dim")
        else:
            out.print(f"{stage}: done in {seconds:.1f} s")

    def noted(self, text: str) -> None:
        """Print a line."""
        out.print(text)

    def warned(self, text: str) -> None:
        """Print a warning."""
        warn(text)


def warn(text: str) -> None:
    """A warning in one line; of many processes the first one says it."""
    if distributed.is_main():
        err.print(Text.assemble(("warning: ", "yellow"), text))


def print_grid(path: Path) -> None:
    """A run's result table, drawn to the width of the terminal."""
    from rich.table import Table

    from safeneuron.runs.show import result_grid

    shown = result_grid(path)
    if shown is not None:
        drawn = Table(title=shown.title, caption=shown.note, title_justify="left", caption_justify="left", box=SIMPLE)
        for index, name in enumerate(shown.header):
            drawn.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in shown.rows:
            drawn.add_row(*map(Text, row))
        out.print(drawn, soft_wrap=False)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table without a frame: the first column left, the others right."""
    from rich.table import Table

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(name), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print()
    out.print(table)


def print_lines(lines: Iterable[str]) -> None:
    """Each line as it is."""
    for line in lines:
        out.print(line)


def toml_string(text: str) -> str:
    """A text as a TOML string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
