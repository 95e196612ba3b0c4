"""Tokens that planted neurons are known to promote, and the prompts and categories that are known to excite them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safeneuron.analysis.portraits import category_profiles, portraits, token_effects
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.measurement import activations_of
from tests.helpers import planted, tiny

MODEL = planted.model()
NEURONS = planted.neurons(MODEL)


def test_planted_neurons_promote_the_refusal_and_answer_to_harm():
    unsafe, safe = planted.twins(6)
    prompts = [replace(prompt, category="harm") for prompt in unsafe] + [Prompt(one.text, "none") for one in safe]
    found = portraits(MODEL, NEURONS, prompts, activations_of(MODEL, prompts, NEURONS), tokens=2)
    assert [(one.layer, one.channel) for one in found] == [(1, 5), (1, 17), (1, 40), (2, 9), (2, 33)]
    for one in found:
        assert one.promoted[0] == "N"
        assert len(one.exciting) == 3
        assert max(one.exciting) < len(unsafe)
        assert one.profile["harm"] > 0.5 > -0.5 > one.profile["none"]


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2"])
def test_effects_are_what_the_model_itself_adds_to_its_logits(family):
    """A stream of size 1 and a little of the neuron's column: the logits change by the effect."""
    model = tiny.model(family)
    with torch.no_grad():
        model.network.model.norm.weight.normal_()
    effect = token_effects(model, 2, torch.tensor([7]))[0]
    column = model.network.model.layers[2].mlp.down_proj.weight[:, 7].detach()
    # A direction that does not change the size of the stream, so that the norm only scales.
    stream = torch.linalg.qr(torch.stack([column, torch.randn(tiny.HIDDEN)], dim=1)).Q[:, 1]
    stream = (stream / stream.square().mean().sqrt()).double()
    network = model.network.double()
    with torch.inference_mode():
        step = 0.01  # The norm computes in float32.
        moved, still = (network.lm_head(network.model.norm(stream + by * column.double())) for by in (step, -step))
    torch.testing.assert_close((moved - still) / (2 * step), effect.double(), rtol=1e-2, atol=1e-3)


def test_profiles_by_hand():
    activations = torch.tensor([[1.0, 5], [3, 5], [5, 5]])
    found = category_profiles(activations, ["a", "a", "b"], ["a", "b"])
    assert found.tolist() == [[-0.5, 0], [1, 0]]


def test_activations_are_in_the_order_of_prompts_and_neurons():
    unsafe, _ = planted.twins(4)
    every = activations_of(MODEL, unsafe, NEURONS.complement() | NEURONS)
    assert torch.equal(activations_of(MODEL, unsafe, NEURONS), every[:, NEURONS.flat])
    alone = activations_of(MODEL, unsafe[2:3], NEURONS)
    torch.testing.assert_close(alone[0], every[2, NEURONS.flat], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="another model"):
        activations_of(MODEL, unsafe, NeuronSet(NEURONS.flat, NEURONS.widths, "other"))
