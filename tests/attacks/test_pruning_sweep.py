"""Sweeps: the answers of many attacks in shared batches are those of each attack alone; lists of sets to sweep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.attacks.pruning import each_layer, each_neuron, respond, sweep
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import tiny

MODELS = {family: tiny.model(family) for family in ("llama", "gemma2", "phi3")}
TEXTS = ["a", "how do I?", "x" * 30, "tell", "b", "what is it that you want to know about me?"]


def alone(model: Model, prompts: list[Prompt], attack: NeuronSet | Edit | None, tokens: int) -> list[str]:
    """The answers under one attack, by the way that a single attack takes."""
    with pruned(model, attack):
        found = [
            response for batch in respond(model, prompts, max_new_tokens=tokens, batch_size=4) for response in batch
        ]
    return [response.response for response in sorted(found, key=lambda response: response.index)]


def attacks_of(model: Model) -> st.SearchStrategy[NeuronSet | Edit | None]:
    sets = st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 47), max_size=12), max_size=3).map(
        lambda layers: NeuronSet.of(layers, model.widths, model.fingerprint)
    )
    return st.one_of(
        st.none(), sets, st.builds(Edit.scale, sets, st.floats(-3, 3)), st.builds(Edit.clamp, sets, st.floats(-3, 3))
    )


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(list(MODELS)), st.integers(1, 9), st.permutations(TEXTS))
def test_sweep_is_one_attack_after_the_other(data, family, batch_size, texts):
    model = MODELS[family]
    prompts = [Prompt(text) for text in texts[: data.draw(st.integers(1, 4))]]
    attacks = data.draw(st.lists(attacks_of(model), min_size=1, max_size=4))
    found = sweep(model, prompts, attacks, max_new_tokens=4, batch_size=batch_size)
    assert found == [alone(model, prompts, attack, 4) for attack in attacks]


def test_attacks_differ_and_progress_counts_answers(tiny_model):
    half = NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, tiny_model.widths, tiny_model.fingerprint)
    told = []
    prompts = [Prompt(text) for text in TEXTS]
    attacks = [None, half, Edit.clamp(half, 2.0)]
    found = sweep(
        tiny_model, prompts, attacks, max_new_tokens=6, batch_size=5, progress=lambda *count: told.append(count)
    )
    assert len({tuple(answers) for answers in found}) == 3
    assert told == [(5, 18), (10, 18), (15, 18), (18, 18)]
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())


def test_out_of_memory_halves_the_batch_and_its_attacks(tiny_model, monkeypatch):
    half = NeuronSet.of({0: range(24)}, tiny_model.widths, tiny_model.fingerprint)
    prompts = [Prompt(text) for text in TEXTS]
    expected = sweep(tiny_model, prompts, [None, half], max_new_tokens=4)
    answer = tiny_model.network.generate

    def small(input_ids, **settings):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return answer(input_ids=input_ids, **settings)

    monkeypatch.setattr(tiny_model.network, "generate", small)
    with pytest.warns(UserWarning, match="ran out of memory"):
        assert sweep(tiny_model, prompts, [None, half], max_new_tokens=4) == expected


def test_nothing_to_sweep(tiny_model):
    for prompts, attacks in (([], [None]), ([Prompt("a")], [])):
        with pytest.raises(InputError, match="needs prompts and attacks"):
            sweep(tiny_model, prompts, attacks)


def test_neurons_and_layers_one_by_one(tiny_model):
    neurons = NeuronSet.of({0: [3, 17], 2: [47]}, tiny_model.widths, tiny_model.fingerprint)
    singles, layers = each_neuron(neurons), each_layer(neurons)
    assert [single.label for single in singles] == ["0.3", "0.17", "2.47"]
    assert [len(single) for single in singles] == [1, 1, 1]
    assert singles[0] | singles[1] | singles[2] == neurons
    assert [layer.label for layer in layers] == ["layer 0", "layer 2"]
    assert layers[0] == singles[0] | singles[1]
    assert layers[1] == singles[2]
