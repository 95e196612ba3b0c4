"""The public API: few names, listed once, and known to type checkers."""

from __future__ import annotations

import tomllib

import safeneuron
from tests import ROOT


def test_the_stub_is_part_of_what_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"py.typed", "*.pyi"} <= set(settings["tool"]["setuptools"]["package-data"]["safeneuron"])


def test_there_are_few_names_at_the_top():
    assert 40 <= len(safeneuron.__all__) <= 50
