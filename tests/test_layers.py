"""The house's rules, proved by reading the code: imports point down, layer 0 is light, only the command line prints."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import safeneuron

PACKAGE = Path(safeneuron.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}

LAYERS = (
    {
        "errors",
        "ranks",
        "memory",
        "halving",
        "config",
        "runs",
        "rows",
        "data",
        "forms",
        "catalogue",
        "pairs",
        "shares",
        "embedded",
        "licences",
        "pushing",
        "pictures",
        "drawing",
    },
    {
        "moments",
        "neurons",
        "statistics",
        "selecting",
        "rankings",
        "comparing",
        "differences",
        "edits",
        "coherence",
        "refusals",
        "signs",
        "groups",
        "logistic",
        "topics",
        "depths",
        "stability",
        "methods",
        "redundancy",
    },
    {
        "models",
        "quantising",
        "vision",
        "towers",
        "ffn",
        "naming",
        "owning",
        "anatomy",
        "stacks",
        "watching",
        "touching",
        "offloading",
        "shapes",
        "lengths",
        "timing",
        "conformance",
        "doctor",
        "adapters",
        "shards",
        "freezing",
        "training",
        "weights",
        "dpo",
        "parts",
        "planning",
        "fitting",
        "batching",
        "ablating",
        "refreshing",
        "judges",
        "attempts",
        "directions",
        "finetuning",
        "similarity",
        "streaming",
        "persisting",
        "serving",
        "sentences",
        "relevance",
        "classifying",
        "guard_models",
        "guards",
        "rubric",
        "panel",
        "drifting",
        "representations",
        "portraits",
    },
    {
        "measuring",
        "probing",
        "saliency",
        "contrasting",
        "pairing",
        "aligning",
        "attacking",
        "judging",
        "capability",
        "sweeping",
        "reporting",
        "tables",
        "summarising",
        "figures",
        "charts",
        "browsing",
        "pages",
        "markdown",
        "limits",
        "comparison",
        "sidebyside",
        "sifting",
        "plotting",
        "statewise",
    },
    {
        "pipeline",
        "preparing",
        "states",
        "collecting",
        "explaining",
        "scoreboard",
        "gathering",
        "foreseeing",
        "durations",
        "publishing",
        "model_cards",
        "redteam",
        "sources",
        "finding",
        "answering",
        "inspecting",
        "weakening",
        "evolving",
        "scaling",
        "telling",
        "analysing",
        "flattening",
    },
    {"cli", "__main__"},
)
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}
STAGES = LAYERS[3]
PARTS_OF_THE_REPORT = {
    "tables", "summarising", "figures", "charts", "browsing", "pages", "markdown", "limits", "comparison",
}  # fmt: skip
REPORTS = {"reporting", "sidebyside", "markdown", "plotting", "statewise"}
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "scipy", "numpy", "matplotlib"}
MAY_IMPORT_TRANSFORMERS = {
    "weights", "vision",
    "models", "quantising", "freezing", "training", "ablating", "refreshing", "embedded", "aligning", "shapes",
    "lengths",
    "sentences", "guard_models", "guards", "serving", "finetuning", "anatomy", "adapters",
}  # fmt: skip


def imports(node: ast.AST, lazy: bool, typing: bool) -> Iterator[str]:
    """Dotted names that a module imports; those inside functions, and those for type checkers, only if asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            if typing:
                yield from imports(child, lazy, typing)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, lazy, typing)


def own(module: str, lazy: bool = True, typing: bool = True) -> set[str]:
    """The modules of the package that this one imports."""
    names = [name.split(".") for name in imports(MODULES[module], lazy, typing)]
    found = {name[1] for name in names if name[0] == "safeneuron" and len(name) > 1 and name[1] in MODULES}
    return found - {"__init__"}


def foreign(module: str, lazy: bool = True, typing: bool = True) -> set[str]:
    """The top names of the other packages that this module imports."""
    return {name.split(".")[0] for name in imports(MODULES[module], lazy, typing)} - {"safeneuron"}


def calls(module: str) -> set[str]:
    """Everything that a module calls, as it is written: ``print``, ``torch.load``."""
    return {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}


def test_every_module_belongs_to_one_layer():
    assert sum(map(len, LAYERS)) == len(LAYER_OF), "no module is in two layers"
    assert LAYER_OF.keys() == MODULES.keys() - {"__init__"}


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_imports_point_down(module):
    for imported in own(module):
        assert LAYER_OF[imported] <= LAYER_OF[module], f"{module} imports {imported} from a layer above it"


@pytest.mark.parametrize("module", sorted(STAGES))
def test_stages_do_not_import_one_another(module):
    allowed = PARTS_OF_THE_REPORT if module in REPORTS else set()
    assert own(module) & STAGES <= allowed


def test_modules_are_loaded_in_no_circle():
    TopologicalSorter({module: own(module, lazy=False, typing=False) for module in LAYER_OF}).prepare()


def test_the_reader_of_imports_sees_them_all():
    """The rules above are only worth what this reader sees."""
    assert "pipeline" in own("cli")
    assert "pipeline" not in own("cli", lazy=False)
    assert "runs" in own("cli", lazy=False)
    assert "runs" not in own("cli", lazy=False, typing=False)
    assert {"torch", "transformers"} <= foreign("embedded")
    assert not HEAVY & foreign("embedded", lazy=False)


# -- what may be imported where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(LAYERS[0] | LAYERS[4] | LAYERS[5] | {"__init__"}))
def test_heavy_packages_are_not_loaded_by_the_bottom_nor_named_by_the_top(module):
    allowed = {"aligning"} if module == "pipeline" else set()
    assert not HEAVY & foreign(module, lazy=False, typing=False) - allowed


def test_the_bottom_layer_and_the_command_line_load_nothing_heavy():
    names = sorted(LAYERS[0] | {"cli"})
    code = "import sys; " + "; ".join(f"import safeneuron.{name}" for name in names)
    code += f"; print(*sorted({HEAVY | {'tqdm', 'jinja2', 'yaml'}!r} & sys.modules.keys()))"
    root = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=root)
    assert done.stdout.strip() == ""


def test_transformers_is_imported_only_where_models_are_touched():
    assert {module for module in MODULES if "transformers" in foreign(module)} == MAY_IMPORT_TRANSFORMERS


def test_the_terminal_belongs_to_the_command_line():
    assert {module for module in MODULES if {"typer", "rich"} & foreign(module)} == {"cli"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"cli"}))
def test_only_the_command_line_prints_and_ends_the_program(module):
    assert not {"print", "sys.stdout.write", "sys.stderr.write", "sys.exit", "exit", "input"} & calls(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_unpickled_or_evaluated(module):
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & foreign(module)
    assert not {"torch.load", "torch.save", "eval", "exec", "os.system"} & calls(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_exception_is_caught_without_a_name(module):
    handlers = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module):
    assert len((ast.get_docstring(MODULES[module]) or "").split()) >= 6


# -- the public names -------------------------------------------------------------------------------------------------


def test_every_public_name_can_be_imported_and_is_declared_to_type_checkers():
    for name in safeneuron.__all__:
        assert getattr(safeneuron, name).__module__.startswith("safeneuron."), name
    declared = {name.rsplit(".", 1)[-1] for name in imports(MODULES["__init__"], lazy=False, typing=True)}
    assert declared - {"import_module", "TYPE_CHECKING", "Any"} == set(safeneuron.__all__)
    assert sorted(safeneuron.__all__) == list(safeneuron.__all__)
    assert set(safeneuron.__all__) <= set(dir(safeneuron))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = safeneuron.nothing
