"""Contrasts of two conditions against one prompt at a time: two states, twins, gradient times activation gap."""

from __future__ import annotations

import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import Exchange, common_ending, exchanges_of, prompts_alone
from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.layout import feed_forwards
from safeneuron.selection.contrast import activation_contrast, gradient_gap, twin_difference, twins
from safeneuron.selection.measurement import measure
from tests.helpers import planted, tiny

PROMPTS = [Prompt(text) for text in ("how do I?", "a", "tell me all of it, and then some", "why?")]
ANSWERS = ["no", "I would rather not say.", "yes", "because"]
SAFE = [Prompt(text) for text in ("hello", "what is the sum of two and two?", "b")]


def activations(model, ids: list[int]) -> torch.Tensor:
    """Of one prompt run alone, ``[token, neuron]``."""
    with torch.no_grad(), recorded(model) as recording:
        model.network(input_ids=torch.tensor([ids]))
    return torch.cat([recording.layers[layer][0] for layer in sorted(recording.layers)], dim=1).double()


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_contrast_is_the_root_mean_square_over_answer_tokens(family, batch_tokens):
    model, other = tiny.model(family), tiny.model(family, seed=1)
    exchanges = exchanges_of(model, PROMPTS, ANSWERS)
    gaps = [(activations(model, one.ids) - activations(other, one.ids))[one.prompt :] for one in exchanges]
    found = activation_contrast(model, other, exchanges, batch_tokens)
    torch.testing.assert_close(found.values, torch.cat(gaps).square().mean(dim=0).sqrt(), rtol=1e-3, atol=1e-5)
    assert found.fingerprint == model.fingerprint


def test_a_state_differs_in_nothing_from_itself(tiny_model):
    assert not activation_contrast(tiny_model, tiny_model, exchanges_of(tiny_model, PROMPTS, ANSWERS)).values.any()


def test_states_of_different_shapes(tiny_model):
    with pytest.raises(InputError, match="144 and 96 neurons in 3 and 2 layers"):
        activation_contrast(tiny_model, tiny.model(layers=2), exchanges_of(tiny_model, PROMPTS, ANSWERS))


# -- twins --------------------------------------------------------------------------------------------------------


def test_twins_are_found_by_id_and_put_in_one_order():
    unsafe = [Prompt("x", id="1"), Prompt("y", id="2"), Prompt("z"), Prompt("w", id="4")]
    safe = [Prompt("d", id="4"), Prompt("e"), Prompt("f", id="1")]
    assert twins(unsafe, safe) == ([unsafe[0], unsafe[3]], [safe[2], safe[0]])
    with pytest.raises(InputError, match="no unsafe prompt has a twin"):
        twins(unsafe, safe[1:2])


def test_twin_difference_is_the_mean_over_twins(tiny_model):
    unsafe, safe = planted.twins(5)
    stats = measure(tiny_model, unsafe, safe)
    gaps = [
        activations(tiny_model, one.ids)[-1] - activations(tiny_model, other.ids)[-1]
        for one, other in zip(prompts_alone(tiny_model, unsafe), prompts_alone(tiny_model, safe), strict=True)
    ]
    torch.testing.assert_close(twin_difference(stats).values, torch.stack(gaps).mean(dim=0).abs(), rtol=1e-3, atol=1e-5)


# -- gradient times gap -------------------------------------------------------------------------------------------


def slow_gradients(model, one: Exchange) -> torch.Tensor:
    """d (mean log-likelihood of the answer) / d activation, ``[token, neuron]``, from a plain pass."""
    seen = []
    handles = [
        block.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for block in feed_forwards(model)
    ]
    ids = torch.tensor([one.ids])
    labels = ids.clone()
    labels[0, : one.prompt] = -100
    loss = model.network(input_ids=ids, labels=labels).loss
    for handle in handles:
        handle.remove()
    return torch.cat([-slope[0] for slope in torch.autograd.grad(loss, seen)], dim=1).double()


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_gradient_gap_is_that_of_one_prompt_at_a_time(family, batch_tokens):
    model = tiny.model(family)
    refused, safe = exchanges_of(model, PROMPTS, ANSWERS), prompts_alone(model, SAFE)
    count = common_ending(model)
    assert count == 2, "the end of the message and the assistant's token"

    def ending(one: Exchange, values: torch.Tensor) -> torch.Tensor:
        return values[one.prompt - count : one.prompt]

    gradient = torch.stack([ending(one, slow_gradients(model, one)) for one in refused]).mean(dim=0)
    gap = torch.stack([ending(one, activations(model, one.ids)) for one in refused]).mean(dim=0)
    gap -= torch.stack([ending(one, activations(model, one.ids)) for one in safe]).mean(dim=0)
    found = gradient_gap(model, refused, safe, batch_tokens)
    torch.testing.assert_close(found.values, (gradient * gap).sum(dim=0), rtol=1e-3, atol=1e-6)


def test_gradient_gap_leaves_the_model_as_it_was_and_tells_progress(tiny_model):
    refused, safe = exchanges_of(tiny_model, PROMPTS, ANSWERS), prompts_alone(tiny_model, SAFE)
    told = []
    gradient_gap(tiny_model, refused, safe, 1, lambda done, total: told.append((done, total)))
    assert told == [(done, 7) for done in range(1, 8)]
    assert all(parameter.grad is None for parameter in tiny_model.network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.network.modules())


def test_a_model_without_a_template_has_its_last_token(tiny_model):
    tiny_model.tokenizer.chat_template = None
    assert common_ending(tiny_model) == 1
