"""SNIP and Wanda against one answer at a time with plain gradients and activations, for every family."""

from __future__ import annotations

import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import Exchange, exchanges_of
from safeneuron.selection.saliency import snip, wanda
from tests.helpers import tiny

PROMPTS = [Prompt(text) for text in ("how do I?", "a", "tell me all of it, and then some", "why?")]
ANSWERS = ["no", "I would rather not say.", "yes", "because"]


def ffn_matrices(model) -> list[torch.nn.Linear]:
    """All linear layers of the FFNs, layer by layer, written down again from the modelling code."""
    layers = model.network.get_decoder().layers
    return [module for layer in layers for module in layer.mlp.modules() if isinstance(module, torch.nn.Linear)]


def lifted(model, scores: list[torch.Tensor]) -> torch.Tensor:
    """The sum over what each neuron owns: rows of gate and up, fused or not, and columns of down."""
    per_layer = len(scores) // tiny.LAYERS
    neurons = []
    for layer in range(tiny.LAYERS):
        *inputs, down = scores[layer * per_layer : (layer + 1) * per_layer]
        rows = torch.cat(inputs).sum(dim=1)
        neurons.append(rows[: tiny.WIDTH] + rows[tiny.WIDTH :] + down.sum(dim=0))
    return torch.cat(neurons)


def labelled(one: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels as transformers takes them: -100 at the prompt."""
    ids = torch.tensor([one.ids])
    labels = ids.clone()
    labels[0, : one.prompt] = -100
    return ids, labels


def slow_snip(model, exchanges: list[Exchange]) -> list[torch.Tensor]:
    matrices = ffn_matrices(model)
    scores = [torch.zeros(matrix.weight.shape, dtype=torch.float64) for matrix in matrices]
    for one in exchanges:
        model.network.zero_grad()
        ids, labels = labelled(one)
        model.network(input_ids=ids, labels=labels).loss.backward()
        for score, matrix in zip(scores, matrices, strict=True):
            score += (matrix.weight.detach() * matrix.weight.grad).abs().double() / len(exchanges)
    model.network.zero_grad()
    return scores


def slow_wanda(model, exchanges: list[Exchange]) -> list[torch.Tensor]:
    scores = []
    for matrix in ffn_matrices(model):
        seen = []
        handle = matrix.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0][0]))
        with torch.no_grad():
            for one in exchanges:
                model.network(input_ids=torch.tensor([one.ids]))
        handle.remove()
        answers = torch.cat([values[one.prompt :] for values, one in zip(seen, exchanges, strict=True)]).double()
        scores.append(matrix.weight.abs().double() * answers.square().mean(dim=0).sqrt())
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 90, 4096])
def test_snip_is_that_of_one_answer_at_a_time(family, batch_tokens):
    model = tiny.model(family)
    exchanges = exchanges_of(model, PROMPTS, ANSWERS)
    found = snip(model, exchanges, batch_tokens)
    expected = lifted(model, slow_snip(model, exchanges))
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-6)
    assert (found.widths, found.fingerprint) == (model.widths, model.fingerprint)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_wanda_is_that_of_one_answer_at_a_time(family, batch_tokens):
    model = tiny.model(family)
    exchanges = exchanges_of(model, PROMPTS, ANSWERS)
    found = wanda(model, exchanges, batch_tokens)
    torch.testing.assert_close(found.values, lifted(model, slow_wanda(model, exchanges)), rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_it_was(tiny_model):
    weights = {name: value.clone() for name, value in tiny_model.network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in tiny_model.network.parameters()]
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    with torch.no_grad():
        first = snip(tiny_model, exchanges)
    wanda(tiny_model, exchanges)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model.network.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.network.parameters())
    assert [parameter.requires_grad for parameter in tiny_model.network.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.network.modules())
    tiny_model.network.requires_grad_(False)
    assert torch.equal(snip(tiny_model, exchanges).values, first.values)


def test_progress_counts_exchanges(tiny_model):
    told = []
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    snip(tiny_model, exchanges, 1, lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_gradients_that_are_not_finite_are_refused(tiny_model):
    with torch.no_grad():
        tiny_model.network.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    for selector in (snip, wanda):
        with pytest.raises(InputError, match="not finite"):
            selector(tiny_model, exchanges_of(tiny_model, PROMPTS, ANSWERS))


@pytest.mark.parametrize(
    ("answers", "said"), [(["a"], "4 prompts and 1 answers"), (["a", "b", "", "c"], "'tell me all of it")]
)
def test_answers_that_do_not_fit(tiny_model, answers, said):
    with pytest.raises(InputError, match=said):
        exchanges_of(tiny_model, PROMPTS, answers)
