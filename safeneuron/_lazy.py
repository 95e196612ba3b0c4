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
        modules: For each module, relative to the package, the names that others may use; none where they use the
            module as a whole. No name is that of a module: Python hands out the module, once it has been imported.
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    whole = [module for module, names in modules.items() if not names]

    def get(name: str) -> Any:
        if name in whole:
            return import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    names = sorted([*module_of, *whole])
    return tuple(names), get, lambda: names
