"""Who is told how long work goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int], None]
"""Told how much of a piece of work is done: ``progress(done, total)``."""


class Watcher(Protocol):
    """Who is told how a run goes on; the command line draws progress bars, tests listen."""

    def began(self, stage: str) -> None:
        """A stage starts now."""

    def progress(self, done: int, total: int) -> None:
        """The running stage has done so much of its work."""

    def ended(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage has finished, or had finished before."""

    def noted(self, text: str) -> None:
        """Something is worth a line."""

    def warned(self, text: str) -> None:
        """Something deserves attention but does not stop the run."""
