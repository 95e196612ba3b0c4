"""Files that are written from the code: each script writes its own, and with ``--check`` says which are stale."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write_or_check(wanted: Mapping[Path, str], arguments: list[str], script: str) -> int:
    """Write the files, or with ``--check`` compare them.

    Args:
        wanted: What is to be in each file.
        arguments: Those of the command line: none, or ``--check``.
        script: How messages call the script.

    Returns:
        The exit code: 0, or 1 where a file is stale, or 2 for other arguments.
    """
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"usage: python {script} [--check]\n")
        return 2
    if not arguments:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    written = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in wanted}
    stale = [path.name for path, text in wanted.items() if written[path] != text]
    if stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; write anew with: python {script}\n")
    return 1 if stale else 0
