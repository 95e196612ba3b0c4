"""Neurons kept, lost and new by hand; movement of weights that a test has moved by a known amount."""

from __future__ import annotations

import math

import pytest
import torch

from safeneuron.analysis.drift import movements, turnover, weights_in
from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny


def test_turnover_by_hand():
    before, after = (NeuronSet.of(one, (4, 4), "f") for one in ({0: [0, 1], 1: [2]}, {0: [1, 2, 3]}))
    assert turnover(before, after) == ([1, 0], [1, 1], [2, 0])


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_what_moved_by_a_tenth_has_moved_by_a_tenth_and_the_rest_has_not(tmp_path, family):
    """Phi-3 keeps gate and up in one matrix."""
    model = tiny.model(family)
    model.save(tmp_path / "before")
    moved = NeuronSet.of({1: [3, 7]}, model.widths, model.fingerprint)
    with torch.no_grad():
        for piece in owned_slices(model, moved):
            values = piece.parameter.index_select(piece.dim, piece.index)
            piece.parameter.index_copy_(piece.dim, piece.index, values * 1.1)
    found = movements(model, weights_in(tmp_path / "before"), moved)
    assert [one.layer for one in found] == [0, 1, 2]
    assert found[1].inside == pytest.approx(0.1, rel=1e-4)
    assert found[1].outside == 0
    assert math.isnan(found[0].inside)
    assert found[0].outside == 0


def test_only_what_is_there_is_read(tmp_path):
    with pytest.raises(InputError, match="holds no safetensors"):
        weights_in(tmp_path)
    model = tiny.model()
    model.network.save_pretrained(tmp_path, max_shard_size="20KB")
    read = weights_in(tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(read(name), model.network.get_parameter(name))
    with pytest.raises(InputError, match="has no parameter nothing"):
        read("nothing")
