"""Write safeneuron/__init__.pyi, the public API for type checkers and editors: ``python docs/make_stub.py``.

With ``--check`` it says whether the stub is stale, and writes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated import write_or_check

import safeneuron

STUB = Path(__file__).parents[1] / "safeneuron" / "__init__.pyi"
HEAD = """\
# Written by docs/make_stub.py from MODULES in __init__.py.
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


if __name__ == "__main__":
    sys.exit(write_or_check({STUB: stub()}, sys.argv[1:], "docs/make_stub.py"))
