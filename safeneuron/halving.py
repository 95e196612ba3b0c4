"""What is done when memory runs out: the work is done in halves, and goes on so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from safeneuron.errors import InputError
from safeneuron.memory import hand_back_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's errors say when an allocation has failed, on the CPU, on a GPU and in the libraries it calls."""


class MemoryShortage(UserWarning):
    """Memory ran out, and the work goes on in smaller parts."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in SIGNS))
    )


@contextmanager
def shortage_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block a ``MemoryShortage`` is told to ``tell`` instead of being shown as Python shows warnings."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: object) -> None:
        if issubclass(category, MemoryShortage):
            tell(str(message))
        else:
            shown(message, category, *where)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


class Halving(Generic[Item]):
    """Work on lists of items, in parts that fit into memory: where one does not, its halves are tried, and remembered.

    ``most`` is what a part may cost, 0 for no limit yet; ``cost`` is what memory depends on, the number of items if
    nothing else is said. ``what`` names the work and ``advice`` says what a user can do when a single item is too much.
    """

    def __init__(self, what: str, advice: str, cost: Callable[[Sequence[Item]], int] = len, most: int = 0) -> None:
        self.what = what
        self.advice = advice
        self.cost = cost
        self.most = most

    def parts(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """The items in order, in parts that cost no more than ``most``, made by halving; the larger half is first."""
        if len(items) <= 1 or not self.most or self.cost(items) <= self.most:
            return [items]
        middle = (len(items) + 1) // 2
        return [*self.parts(items[:middle]), *self.parts(items[middle:])]

    def over(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> list[Result]:
        """What ``work`` makes of the parts, in order. Raises ``InputError`` if a single item is too much."""
        waiting = self.parts(items)
        results: list[Result] = []
        while waiting:
            try:
                results.append(work(waiting[0]))
                del waiting[0]
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self.halve(waiting[0], error)
            # Only here, where the exception is gone, are the tensors of the failed pass free.
            hand_back_memory()
            waiting = [part for large in waiting for part in self.parts(large)]
        return results

    def halve(self, part: Sequence[Item], error: BaseException) -> None:
        """Let no later part cost more than half of this one, which was too much; one warning says so.

        Raises ``InputError`` if the part is a single item.
        """
        if len(part) == 1:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{self.what} ran out of memory with one at a time ({reason}); {self.advice}") from error
        middle = (len(part) + 1) // 2
        self.most = max(self.cost(part[:middle]), self.cost(part[middle:]))
        warnings.warn(
            f"{self.what} ran out of memory with {len(part)} at once; it goes on with {middle}, and remembers that",
            MemoryShortage,
            stacklevel=3,
        )
