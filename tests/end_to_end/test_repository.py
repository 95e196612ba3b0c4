"""The habits of the repository: one list of checks for commits and for ``make lint``, and what they find."""

from __future__ import annotations

import importlib.util
import re
import runpy

import pytest
import yaml

from tests import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> str:
    """The lines of one target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert found, target
    return found[1]


@pytest.fixture
def check():
    return runpy.run_path(str(ROOT / "tools" / "check_files.py"))["main"]


def test_a_private_key_is_found(check, tmp_path, capsys):
    file = tmp_path / "id"
    file.write_text("-----BEGIN " + "RSA PRIVATE KEY-----\nMII\n", encoding="utf-8")
    assert check([str(file)]) == 1
    assert "private key" in capsys.readouterr().err


def test_a_large_file_is_found_and_a_small_one_is_none(check, tmp_path, capsys):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(600_000))
    large.write_bytes(bytes(600_001))
    assert check([str(small)]) == 0
    assert check([str(small), str(large)]) == 1
    assert "600,001 bytes" in capsys.readouterr().err


def test_commits_and_make_lint_check_the_same():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    entries = [re.sub(r" --force-exclude", "", hook["entry"]) for hook in hooks]
    assert {hook["language"] for hook in hooks} == {"system"}, "hooks run what make test installs, without a network"
    for entry in entries:
        assert f"$(BIN)/{entry}" in recipe("lint")
    assert len(recipe("lint").splitlines()) == len(entries)


def test_continuous_integration_runs_the_test_command_of_the_readme_and_the_slow_tests():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^make test +#", readme, re.MULTILINE)
    assert re.search(r"^make test$", script, re.MULTILINE)
    assert re.search(r"^make test-slow$", script, re.MULTILINE)


def test_links_of_the_site_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec is not None
    assert spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    monkeypatch.setattr(site, "SITE", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").write_text('<h1 id="place">There</h1><a href="..">back</a>', encoding="utf-8")
    page = tmp_path / "index.html"
    page.write_text('<a href="there/#place">1</a><a href="https://arxiv.org">2</a>', encoding="utf-8")
    assert site.broken() == []
    page.write_text('<a href="there/#nowhere">1</a><a href="gone/">2</a><img src="gone.svg">', encoding="utf-8")
    assert site.broken() == ["index.html: gone.svg", "index.html: gone/", "index.html: there/#nowhere"]


def test_every_package_is_in_the_reference_and_in_its_list():
    packages = sorted(face.parent.name for face in (ROOT / "safeneuron").glob("*/__init__.py"))
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert sorted(re.findall(r'"reference/(\w+)\.md"', site.replace("index", ""))) == packages
    assert sorted(runpy.run_path(str(ROOT / "docs" / "make_site.py"))["PACKAGES"]) == packages
