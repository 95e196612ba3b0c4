"""Find what must not be committed, large files and private keys: ``python tools/check_files.py [FILE ...]``.

Without files all that git tracks or would add are looked at. Ends with exit code 1 where something is found.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MOST_BYTES = 600_000
# Written so that this file holds no such line itself.
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE[ ]KEY( BLOCK)?-----")


def tracked() -> list[Path]:
    """The files that git tracks or would add, in the folder of the command."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True
    )
    return [Path(name.decode()) for name in listed.stdout.split(b"\0") if name]


def problems(files: list[Path]) -> list[str]:
    """One line for each file that is too large or holds a private key."""
    found = []
    for file in files:
        if not file.is_file():
            continue
        content = file.read_bytes()
        if len(content) > MOST_BYTES:
            found.append(f"{file} has {len(content):,} bytes, more than {MOST_BYTES:,}; fetch it where it is needed")
        if PRIVATE_KEY.search(content):
            found.append(f"{file} holds a private key; take it out, and do not use that key again")
    return found


def main(arguments: list[str]) -> int:
    """Look at the named files or at all."""
    found = problems([Path(name) for name in arguments] or tracked())
    sys.stderr.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
