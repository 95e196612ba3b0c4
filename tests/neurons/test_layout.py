"""Whose neurons these are, and where: networks seen through wrappers, fingerprints, addresses."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.utils import compile_regions

from safeneuron.errors import InputError
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import LINEAGE, fingerprint, network_of, neuron_addresses, neurons_at, widths_of
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny, tiny_experts
from tests.helpers.pruning import IDS, down_column, logits, neurons_of
from tests.helpers.tiny_experts import EXPERTS, WIDTH


def test_bare_network_and_model_are_the_same(tiny_model):
    assert network_of(tiny_model) is tiny_model.network
    assert network_of(tiny_model.network) is tiny_model.network
    assert fingerprint(tiny_model) == fingerprint(tiny_model.network) == tiny_model.fingerprint
    assert widths_of(tiny_model) == tiny_model.widths


def test_neurons_of_the_language_model_are_those_of_its_classifier(family, tmp_path):
    network = tiny.network(family)
    network.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert fingerprint(classifier) == fingerprint(network)
    names = [piece.name for piece in owned_slices(network, neurons_of(network))]
    assert [piece.name for piece in owned_slices(classifier, neurons_of(network))] == names


@pytest.mark.parametrize("how", [torch.compile, compile_regions])
def test_compiled_model_is_seen_through(how):
    network = tiny.network()
    compiled = how(network)
    assert fingerprint(compiled) == fingerprint(network)
    pieces = zip(owned_slices(compiled, neurons_of(network)), owned_slices(network, neurons_of(network)), strict=True)
    assert all(found.parameter is piece.parameter for found, piece in pieces)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_is_the_same_in_every_precision(family, dtype):
    network = tiny.network(family)
    known = fingerprint(network)
    assert fingerprint(network.to(dtype)) == known
    assert fingerprint(network.to(torch.float32)) == known


def test_fingerprint_ignores_signs_that_float16_cannot_hold():
    network = tiny.network()
    with torch.no_grad():
        down_column(network, 0)[0, :3] = torch.tensor([1e-9, -1e-9, 1e-30])
    known = fingerprint(network)
    assert fingerprint(network.to(torch.bfloat16)) == known
    assert fingerprint(network.to(torch.float16)) == known


def test_fingerprints_differ_by_weights_shape_and_family():
    networks = [
        tiny.network(),
        tiny.network(seed=1),
        tiny.network(layers=2),
        tiny.network(intermediate_size=56),
        *(tiny.network(family) for family in ("qwen2", "mistral", "phi3")),
    ]
    prints = [fingerprint(network) for network in networks]
    assert len(set(prints)) == len(prints)
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in prints)
    assert fingerprint(tiny.network()) == prints[0]


def test_same_weights_in_another_family_are_another_model():
    llama, mistral = tiny.network("llama"), tiny.network("mistral")
    mistral.load_state_dict(llama.state_dict())
    assert fingerprint(mistral) != fingerprint(llama)


def test_fingerprint_is_kept_through_training_by_the_lineage():
    network = tiny.network()
    known = fingerprint(network)
    setattr(network.config, LINEAGE, known)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert fingerprint(network) == known
    delattr(network.config, LINEAGE)
    assert fingerprint(network) != known


def test_layouts_agree_on_whose_neurons_these_are():
    stacked, split = tiny_experts.network(), tiny_experts.split(tiny_experts.network())
    assert fingerprint(stacked) == fingerprint(split)
    assert widths_of(stacked) == widths_of(split) == (EXPERTS * WIDTH,) * 2
    neurons = neurons_at(stacked, [(0, 3, 5), (1, 0, 23), (1, 2, 7)], "chosen")
    assert neuron_addresses(split, neurons) == [(0, 3, 5), (1, 0, 23), (1, 2, 7)]
    assert neurons_at(split, neuron_addresses(stacked, neurons)) == neurons
    with pruned(stacked, neurons), pruned(split, neurons):
        torch.testing.assert_close(logits(stacked), logits(split), rtol=1e-4, atol=1e-5)
    assert len(owned_slices(stacked, neurons)) == 4
    assert len(owned_slices(split, neurons)) == 9


def test_a_place_that_is_not_there_is_refused():
    network = tiny_experts.network("qwen2-moe")
    shared = neurons_at(network, [(0, "mlp.shared_expert", 39)])
    assert shared.layers()[0].tolist() == [EXPERTS * WIDTH + 39]
    with pytest.raises(InputError, match="channel 24"):
        neurons_at(network, [(0, 1, 24)])
