"""Neurons kept, lost and new by hand, weights moved by a known amount, and representations whose likeness is known."""

from __future__ import annotations

import math

import pytest
import torch

from safeneuron.analysis.drift import (
    Turnover,
    hidden_states,
    linear_cka,
    mean_cosine,
    mean_directions,
    movements,
    parameter_reader,
    projections,
    separability,
    turnover,
)
from safeneuron.errors import InputError
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from tests.helpers import planted, tiny


def test_turnover_by_hand():
    before, after = (NeuronSet.of(one, (4, 4), "f") for one in ({0: [0, 1], 1: [2]}, {0: [1, 2, 3]}))
    assert turnover(before, after) == Turnover([1, 0], [1, 1], [2, 0])


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
    found = movements(model, parameter_reader(tmp_path / "before"), moved)
    assert [one.layer for one in found] == [0, 1, 2]
    assert found[1].inside == pytest.approx(0.1, rel=1e-4)
    assert found[1].outside == 0
    assert math.isnan(found[0].inside)
    assert found[0].outside == 0


def test_only_what_is_there_is_read(tmp_path):
    with pytest.raises(InputError, match="holds no safetensors"):
        parameter_reader(tmp_path)
    model = tiny.model()
    model.network.save_pretrained(tmp_path, max_shard_size="20KB")
    read = parameter_reader(tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(read(name), model.network.get_parameter(name))
    with pytest.raises(InputError, match="has no parameter nothing"):
        read("nothing")


def test_cka_does_not_see_rotation_and_scale_and_is_small_for_what_is_unrelated():
    torch.manual_seed(0)
    first, other = torch.randn(40, 200), torch.randn(40, 200)
    turn = torch.linalg.qr(torch.randn(200, 200)).Q
    assert linear_cka(first, 3 * first @ turn + 7) == pytest.approx(1, abs=1e-4)
    assert abs(linear_cka(first, other)) < 0.1, "the biased estimate would be near 1 with so few prompts"
    between = linear_cka(first, first + other)
    assert 0.3 < between < 0.9
    assert math.isnan(linear_cka(first, torch.ones(40, 200)))


def test_cosine_and_projections_by_hand():
    first = torch.tensor([[1.0, 0], [0, 2]])
    assert mean_cosine(first, torch.tensor([[2.0, 0], [1, 0]])) == pytest.approx(0.5)
    unsafe, safe = torch.tensor([[[3.0, 0]], [[5.0, 9]]]), torch.tensor([[[0.0, 4]], [[2.0, 5]]])
    (along,) = projections(unsafe, safe, torch.tensor([[1.0, 0]]))
    assert along == pytest.approx((4 - 1) / math.sqrt(2))
    assert torch.equal(mean_directions(unsafe, safe - safe), torch.tensor([[4, 4.5]]).double() / math.hypot(4, 4.5))


def test_states_are_those_of_a_prompt_alone_whatever_it_is_batched_with():
    model = tiny.model()
    prompts, _ = planted.twins(5)
    together = hidden_states(model, prompts)
    assert together.shape == (5, tiny.LAYERS, tiny.HIDDEN)
    for number, prompt in enumerate(prompts):
        torch.testing.assert_close(hidden_states(model, [prompt])[0], together[number], rtol=1e-4, atol=1e-5)


def test_harm_is_seen_after_the_layer_that_reads_it_and_not_before():
    model = planted.model()
    unsafe, safe = (hidden_states(model, prompts) for prompts in planted.twins(40))
    accuracy = separability(unsafe, safe)
    assert accuracy[0] == 0.5
    assert accuracy[1] > 0.7
    assert accuracy[2] > 0.85
    along = projections(unsafe, safe, mean_directions(unsafe, safe))
    assert math.isnan(along[0])
    assert along[1] > 1
    with pruned(model, planted.neurons(model)):
        again = hidden_states(model, planted.twins(40)[0])
    assert torch.equal(again[:, 1], unsafe[:, 1])
    assert not torch.equal(again[:, 2], unsafe[:, 2])
