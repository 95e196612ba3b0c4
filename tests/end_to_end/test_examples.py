"""Every example runs, on a tiny model, and proves at its end that what is frozen stayed and the rest moved."""

from __future__ import annotations

import importlib
import re
import runpy
import sys

import pytest
import torch

from tests import ROOT
from tests.helpers import tiny
from tests.helpers.frozen_checks import add_noise, snapshot, some_neurons

FOLDER = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "shared")
PROOF = (
    r"(\d+) frozen neurons: all of their (\d+) weights are identical\n([\d,]+) of the ([\d,]+) other weights have moved"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = tiny.model()
    add_noise(model.network)
    model.save(folder)
    return folder


@pytest.fixture
def shared(monkeypatch):
    """The module that the scripts import from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("shared")


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs_and_proves_the_freeze(script, shared, model_folder, tmp_path, monkeypatch, capsys):
    words = [f"{script}.py", "--model", str(model_folder), "--steps", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    proof = re.search(rf"{PROOF} \([\d.]+%\)\n\Z", capsys.readouterr().out)
    assert proof, "the proof must be the last that is printed"
    neurons, held, moved, free = (int(number.replace(",", "")) for number in proof.groups())
    assert neurons > 0
    assert held == neurons * 3 * tiny.HIDDEN
    # Adapters are for the linear layers of the decoder; embeddings, LM head and norms have none.
    assert moved > (0.99 if script != "lora" else 0.5) * free
    if script != "reward":
        assert held + free == sum(parameter.numel() for parameter in tiny.network().parameters())


def test_proof_notices_a_frozen_weight_that_moved(shared, capsys):
    network = tiny.network()
    neurons, before = some_neurons(network), snapshot(network)
    with torch.no_grad():
        network.model.layers[2].mlp.up_proj.weight[4] += 1.0
    shared.show_proof(before, network, neurons)
    assert f"{tiny.HIDDEN} of the " in capsys.readouterr().out
    with torch.no_grad():
        network.model.layers[2].mlp.up_proj.weight[3, 0] += 1.0
    with pytest.raises(AssertionError, match="up_proj"):
        shared.show_proof(before, network, neurons)


def test_examples_are_short_and_listed():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", text, re.MULTILINE)) == SCRIPTS
    lengths = {script: len((FOLDER / f"{script}.py").read_text(encoding="utf-8").splitlines()) for script in SCRIPTS}
    assert all(20 <= length <= 50 for length in lengths.values()), lengths
