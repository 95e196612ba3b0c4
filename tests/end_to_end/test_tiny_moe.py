"""The whole run on a tiny mixture of experts of ``tiny-moe.toml``: what stays, and what is told."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices, routers
from safeneuron.runtime.files import read_json
from safeneuron.selection.scores import Scores
from tests import ROOT
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    world = tmp_path_factory.mktemp("world")
    runpy.run_path(str(ROOT / "examples" / "configs" / "make_tiny_moe.py"))["write"](world)
    changes = [
        f"model.name={world}/model",
        f"pairs.safety=[{{path='{world}/pairs.jsonl'}}]",
        "attack.max_new_tokens=2",
        "align.epochs=1",
    ]
    tiny_run.execute(ROOT / "examples" / "configs" / "tiny-moe.toml", world / "run", changes=changes)
    return world


def weights(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_frozen_slices_of_experts_are_bit_equal_and_the_rest_moved(folder):
    before, after = weights(folder / "model"), weights(folder / "run" / "T1" / "align" / "model")
    neurons = NeuronSet.load(folder / "run" / "T0" / "select" / "neurons.json")
    pieces = owned_slices(after, neurons)
    assert len(pieces) == 4
    assert all(piece.experts is not None for piece in pieces)
    for piece in pieces:
        old, new = (model.get_parameter(piece.name).detach() for model in (before, after))
        frozen = torch.zeros(old.shape, dtype=torch.bool)
        for expert, place in zip(piece.experts.tolist(), piece.index.tolist(), strict=True):
            frozen[expert].select(piece.dim - 1, place).fill_(True)
        assert torch.equal(old[frozen], new[frozen])
        assert (old[~frozen] != new[~frozen]).any()
    record = read_json(folder / "run" / "T1" / "align" / "frozen.json")
    assert record["frozen"] == len(neurons)
    assert record["frozen_identical"]


@pytest.mark.parametrize(("state", "frozen"), [("T1", True), ("routers-T1", False)])
def test_routers_are_trained_or_not(folder, state, frozen):
    before, after = weights(folder / "model"), weights(folder / "run" / state / "align" / "model")
    pairs = list(zip(routers(before), routers(after), strict=True))
    assert len(pairs) == 2
    assert all(torch.equal(old, new) == frozen for old, new in pairs)


def test_experts_without_tokens_are_reported(folder):
    scores = Scores.load(folder / "run" / "T0" / "select" / "scores.safetensors")
    assert 0 < scores.unscored < len(scores.d)
    assert read_json(folder / "run" / "T0" / "select" / "thresholds.json")["unscored"] == scores.unscored
    report = (folder / "run" / "report" / "report.md").read_text(encoding="utf-8")
    assert f"{scores.unscored:,} of 512 neurons of T0 were not scored" in report
