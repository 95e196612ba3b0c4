"""How far work has come: the callback that counts, its use for parts of a whole, and who watches a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with how much of a piece of work is done: ``progress(done, total)``."""


def progress_of_part(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Progress of one of several equal parts, as progress of the whole.

    Args:
        progress: Of the whole; ``None`` if nobody watches.
        index: Which part it is, counted from 0.
        count: How many parts there are.

    Returns:
        What the part calls with its own ``(done, total)``; ``None`` if nobody watches.
    """
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, count * total)


def progress_of_section(progress: Progress | None, start: int, whole: int) -> Progress | None:
    """Progress of a part of known size, as progress of the whole in which so many items come before it.

    Args:
        progress: Of the whole; ``None`` if nobody watches.
        start: How many items come before the part.
        whole: How many items there are in all.

    Returns:
        What the part calls with its own ``(done, total)``; ``None`` if nobody watches.
    """
    if progress is None:
        return None
    return lambda done, _: progress(start + done, whole)


class Watcher(Protocol):
    """Who follows a run; the command line draws progress bars, tests listen."""

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
