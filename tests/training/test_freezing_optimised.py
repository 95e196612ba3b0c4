"""``python -O`` leaves out every assert; a freeze that is broken is caught all the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def caught() -> dict[str, str]:
    """What each way of training with a broken freeze has raised, in a process without asserts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-O", "-m", "tests.programs.broken_freeze"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    first, *lines = done.stdout.splitlines()
    assert first == "optimised"
    return {name: error for name, _, error in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize("way", ["loop", "preference", "unproved"])
def test_frozen_slices_that_move_are_caught(caught, way):
    assert caught[way].startswith("RuntimeError: ")
    assert "frozen slices have changed" in caught[way]


def test_parameters_that_were_not_to_be_trained_are_caught(caught):
    assert caught["rest"].startswith("RuntimeError: ")
    assert "not to be trained" in caught["rest"]
