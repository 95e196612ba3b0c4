"""The rules of the house, proved by reading the code: who may import whom, faces, names, and what is never done."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import safeneuron
from tests import ROOT

PACKAGE = Path(safeneuron.__file__).parent
# Each row may import the rows above it; packages of one row do not know each other.
ORDER = (
    "errors _version _lazy",
    "runtime",
    "data neurons",
    "models config",
    "selection evaluation",
    "training reporting",
    "attacks planning",
    "runs",
    "analysis",
    "cli",
    "__main__",
)
FLOOR = {package: number for number, row in enumerate(ORDER) for package in row.split()}
PACKAGES = [package for package in FLOOR if (PACKAGE / package).is_dir()]
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "scipy", "numpy", "matplotlib"}
# What a terminal waits for: these load nothing heavy, so that ``--help`` is instant.
LIGHT = ("data", "config", "cli", "errors", "runtime.files", "runtime.distributed", "runtime.progress")


def name_of(path: Path) -> str:
    """``neurons.hooks`` for safeneuron/neurons/hooks.py, ``neurons`` for its face."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
FACES = {name: tree for name, tree in TREES.items() if name in PACKAGES or name == ""}
MODULES = {name: tree for name, tree in TREES.items() if name not in FACES}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def statements(node: ast.AST, lazy: bool = True, typing: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module; those inside functions, and those for type checkers, only if asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            if typing:
                yield from statements(child, lazy, typing)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(child, lazy, typing)


def imported(module: str, lazy: bool = True, typing: bool = True) -> set[tuple[str, str]]:
    """What a module takes from the package, as ``(module, name)``; the name is empty where it takes all of it."""
    taken = set()
    for statement in statements(TREES[module], lazy, typing):
        if isinstance(statement, ast.Import):
            assert all(alias.name.partition(".")[0] != "safeneuron" for alias in statement.names), "name what you take"
            continue
        assert statement.level == 0, "imports are absolute"
        assert statement.module
        if package_of(statement.module) != "safeneuron":
            continue
        owner = statement.module.partition(".")[2]
        for alias in statement.names:
            inner = f"{owner}.{alias.name}".lstrip(".")
            taken.add((inner, "") if inner in TREES else (owner, alias.name))
    return taken


def foreign(module: str, lazy: bool = True, typing: bool = True) -> set[str]:
    """The top names of the other libraries that a module imports."""
    names = set()
    for statement in statements(TREES[module], lazy, typing):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif statement.module:
            names.add(statement.module)
    return {name.partition(".")[0] for name in names} - {"safeneuron"}


def calls(module: str) -> set[str]:
    """Everything that a module calls, as it is written: ``print``, ``torch.load``."""
    return {ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)}


def handed_on(package: str) -> dict[str, tuple[str, ...]]:
    """The names that a package's face hands on, by module."""
    modules: dict[str, tuple[str, ...]] = vars(importlib.import_module(f"safeneuron.{package}"))["MODULES"]
    return modules


# -- packages and their order -----------------------------------------------------------------------------------------


def test_every_package_has_a_floor_and_few_files_lie_outside():
    assert {package_of(module) for module in MODULES} == set(FLOOR)
    assert len(list(PACKAGE.glob("*.py"))) <= 5


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_between_packages_point_down(module):
    package = package_of(module)
    for owner, name in imported(module):
        other = package_of(owner)
        if other != package:
            assert FLOOR[other] < FLOOR[package], f"{module} imports {owner}.{name}"


def test_no_circle_of_modules_lazy_imports_included():
    graph = {module: {owner for owner, _ in imported(module)} - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_crosses_packages_stands_on_the_face_of_its_owner(module):
    for owner, name in imported(module):
        package, _, inner = owner.partition(".")
        if package in PACKAGES and package != package_of(module) and inner:
            allowed = handed_on(package)
            assert inner in allowed, f"{module} reaches behind {package} for {owner}"
            assert not name or name in allowed[inner], f"{module} reaches behind {package} for {owner}.{name}"


def test_this_reader_of_imports_sees_them_all():
    """The rules above are only worth what it sees."""
    assert ("runs.pipeline", "Pipeline") in imported("cli.run")
    assert ("runs.pipeline", "Pipeline") not in imported("cli.run", lazy=False)
    assert ("runs.run", "Run") in imported("cli.run", lazy=False)
    assert ("runs.run", "Run") not in imported("cli.run", lazy=False, typing=False)
    assert ("runtime.distributed", "") in imported("runs.run")
    assert {"torch", "transformers"} <= foreign("models.embedded")


# -- faces and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_a_face_is_short_says_what_belongs_there_and_hands_on_what_exists(package):
    source = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert len((ast.get_docstring(FACES[package]) or "").split()) >= 12
    face = importlib.import_module(f"safeneuron.{package}")
    for module, names in handed_on(package).items():
        for name in names:
            assert f"{package}.{name}" not in TREES, f"{name} is a module of {package}: Python would hand out that"
            assert vars(importlib.import_module(f"safeneuron.{package}.{module}"))[name] is getattr(face, name)
    with pytest.raises(AttributeError):
        _ = face.nothing


def test_every_public_name_can_be_imported():
    for name in safeneuron.__all__:
        assert getattr(safeneuron, name).__module__.startswith("safeneuron."), name
    assert sorted(safeneuron.__all__) == list(safeneuron.__all__) == dir(safeneuron)
    with pytest.raises(AttributeError, match="nothing"):
        _ = safeneuron.nothing


def definitions(tree: ast.Module) -> Iterator[str]:
    """The public names that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_twice():
    homes: dict[str, list[str]] = {}
    for module, tree in MODULES.items():
        for name in definitions(tree):
            homes.setdefault(name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_modules_are_short():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: size for path, size in sizes.items() if size > 450} == {}
    assert median(sizes.values()) < 200


@pytest.mark.parametrize("module", sorted(TREES))
def test_every_module_says_what_it_is_for(module):
    assert len((ast.get_docstring(TREES[module]) or "").split()) >= 6


@pytest.mark.parametrize("module", sorted(name for name in MODULES if "." in name))
def test_every_module_has_its_tests(module):
    package, name = module.split(".")
    assert (ROOT / "tests" / package / f"test_{name}.py").exists()


# -- what may be imported and called where ----------------------------------------------------------------------------


def test_the_command_line_and_what_it_needs_at_once_load_nothing_heavy():
    code = "import sys, importlib; "
    light = [module for module in MODULES for name in LIGHT if module == name or package_of(module) == name]
    code += f"[importlib.import_module('safeneuron.' + name) for name in {sorted({*light, *PACKAGES})!r}]; "
    code += f"print(*sorted({HEAVY | {'tqdm', 'jinja2', 'yaml'}!r} & sys.modules.keys()))"
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == ""


def test_the_terminal_belongs_to_the_command_line():
    assert {package_of(module) for module in TREES if {"typer", "rich"} & foreign(module)} == {"cli"}


@pytest.mark.parametrize("module", sorted(module for module in MODULES if package_of(module) != "cli"))
def test_only_the_command_line_prints_and_ends_the_program(module):
    assert not {"print", "sys.stdout.write", "sys.stderr.write", "sys.exit", "exit", "input"} & calls(module)


@pytest.mark.parametrize("module", sorted(TREES))
def test_nothing_is_unpickled_or_evaluated(module):
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & foreign(module)
    assert not {"torch.load", "torch.save", "eval", "exec", "os.system"} & calls(module)


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_exception_is_caught_without_a_name(module):
    handlers = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


def narrows(test: ast.expr) -> bool:
    """Whether a condition only tells a type checker what a value is: ``isinstance`` or ``is not None``."""
    if isinstance(test, ast.BoolOp):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Call):
        return ast.unparse(test.func) == "isinstance"
    return isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")


@pytest.mark.parametrize("module", sorted(TREES))
def test_promises_are_kept_by_raise(module):
    """``python -O`` leaves out every ``assert``."""
    asserted = [node.test for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)]
    assert [ast.unparse(test) for test in asserted if not narrows(test)] == []
