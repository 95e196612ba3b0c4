"""Every change that this package makes to another library while it runs, each undone at the end of its block.

Tested with Python 3.11, TRL 1.16 and tqdm 4.70; ``tests/runtime/test_patches.py`` fails where a library has changed
what is patched here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def warnings_told(category: type[Warning], tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block warnings of one kind go to ``tell`` instead of being shown as Python shows warnings.

    ``warnings.showwarning`` is what Python says to replace for this.

    Args:
        category: The kind of warning; others are shown as before.
        tell: Is given the message.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, kind: type[Warning], *where: object) -> None:
        if issubclass(kind, category):
            tell(str(message))
        else:
            shown(message, kind, *where)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


@contextmanager
def answers_scored_alone() -> Iterator[None]:
    """Within the block TRL runs the LM head at the answers' tokens only, also on the CPU; the losses are the same.

    TRL does so where it has Triton. Elsewhere it scores the prompts' tokens too and throws them away, which on the CPU
    is a third of the time of a step.
    """
    utils: Any = import_module("trl.trainer.utils")
    with_triton: Callable[[Any], bool] = utils._use_triton
    utils._use_triton = lambda device: device.type == "cpu" or with_triton(device)
    try:
        yield
    finally:
        utils._use_triton = with_triton


def without_progress_bars() -> None:
    """Let the libraries that are imported from now on, here and in child processes, draw no progress bars.

    They draw them with tqdm, which reads the variable when it is imported.
    """
    os.environ["TQDM_DISABLE"] = "1"
