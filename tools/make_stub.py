"""Write safeneuron/__init__.pyi, the public API for type checkers and editors: ``python tools/make_stub.py``.

With ``--check`` it says whether the stub is stale, and writes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import safeneuron

STUB = Path(__file__).parents[1] / "safeneuron" / "__init__.pyi"
HEAD = """\
# Written by tools/make_stub.py from MODULES in __init__.py.
from collections.abc import Mapping, Sequence

from safeneuron._version import __version__ as __version__
"""


def stub() -> str:
    """The public names as imports from their modules, which a type checker follows."""
    imports = [
        f"from safeneuron.{module} import {name} as {name}\n"
        for module, names in safeneuron.MODULES.items()
        for name in sorted(names, key=order)
    ]
    return f"{HEAD}{''.join(imports)}\nMODULES: Mapping[str, Sequence[str]]\n__all__: tuple[str, ...]\n"


def order(name: str) -> tuple[bool, bool, str]:
    """Constants, then classes, then functions, as ruff sorts imports."""
    return not name.isupper(), not name[0].isupper(), name


def main(arguments: list[str]) -> int:
    """Write the stub, or with ``--check`` compare it; the exit code is 1 where it is stale."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python tools/make_stub.py [--check]\n")
        return 2
    if not arguments:
        STUB.write_text(stub(), encoding="utf-8")
        return 0
    if STUB.is_file() and STUB.read_text(encoding="utf-8") == stub():
        return 0
    sys.stderr.write(f"{STUB.name} is stale; write it again with: python tools/make_stub.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
