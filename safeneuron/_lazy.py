"""Faces of packages: names that are imported from their modules when they are first used."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def face(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__all__``, ``__getattr__`` and ``__dir__`` of a package that hands on names of its modules.

    Args:
        package: The package's name.
        modules: For each module, relative to the package, the names it gives to the outside. No name is that of a
            module of the package: Python would hand out the module, once it has been imported.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return tuple(sorted(module_of)), get, lambda: sorted(module_of)
