"""What neurons own of the weights, and what belongs to none."""

from __future__ import annotations

import torch

from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.weights import owned_slices, parameters_of_no_neuron, routers
from tests.helpers import tiny, tiny_experts
from tests.helpers.pruning import CHOSEN, activations, input_rows, logits, neurons_of, silence, some


def test_own_rows_change_own_activation_only(family):
    network = tiny.network(family)
    before = activations(network)[0]
    with torch.no_grad():
        for weight, row in input_rows(network, 0, 17):
            weight[row] += 0.5
    changed = (activations(network)[0] != before).any(dim=0).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [17]


def test_owned_slices_are_rows_and_columns(family):
    network = tiny.network(family)
    slices = owned_slices(network, neurons_of(network, {1: [3, 17]}))
    found = {(piece.name, piece.dim, tuple(piece.index.tolist())) for piece in slices}
    mlp = next(name for name, _ in network.named_modules() if name.endswith("layers.1.mlp"))
    if family == "phi3":
        rows = {(f"{mlp}.gate_up_proj.weight", 0, (3, 17, tiny.WIDTH + 3, tiny.WIDTH + 17))}
    else:
        rows = {(f"{mlp}.{name}_proj.weight", 0, (3, 17)) for name in ("gate", "up")}
    assert found == rows | {(f"{mlp}.down_proj.weight", 1, (3, 17))}
    for piece in slices:
        assert piece.parameter is network.get_parameter(piece.name)


def test_owned_slices_are_all_that_a_neuron_is(family):
    """What a neuron owns at zero leaves nothing of it: the same output as pruning it, wherever else weights lie."""
    network = tiny.network(family)
    neurons = neurons_of(network)
    with pruned(network, neurons):
        expected = logits(network)
    with torch.no_grad():
        for piece in owned_slices(network, neurons):
            piece.parameter.index_fill_(piece.dim, piece.index, 0)
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-6)
    for layer, channels in CHOSEN.items():
        assert not activations(network)[layer][..., channels].any()


def test_owned_slices_hold_input_biases_but_not_the_output_bias():
    network = tiny.network("llama", mlp_bias=True)
    names = [piece.name for piece in owned_slices(network, neurons_of(network, {2: [5]}))]
    mlp = "model.layers.2.mlp"
    assert sorted(names) == sorted(
        [f"{mlp}.{side}_proj.{kind}" for side in ("gate", "up") for kind in ("weight", "bias")]
        + [f"{mlp}.down_proj.weight"]
    )
    biases = [piece for piece in owned_slices(network, neurons_of(network, {2: [5]})) if piece.name.endswith("bias")]
    assert [(piece.dim, piece.index.tolist()) for piece in biases] == [(0, [5])] * 2


def test_what_a_neuron_owns_is_all_of_it(mixture):
    network = tiny_experts.network(mixture)
    neurons = some(network)
    with pruned(network, neurons):
        expected = logits(network)
    silence(network, neurons, output_only=False)
    torch.testing.assert_close(logits(network), expected, rtol=1e-4, atol=1e-5)
    with recorded(network) as recording:
        logits(network)
    for layer, channels in neurons.layers().items():
        assert not recording.layers[layer][..., channels].nan_to_num().any()


def test_routers_are_what_is_neither_neuron_nor_attention(mixture):
    network = tiny_experts.network(mixture)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(parameter)] for parameter in routers(network)}
    assert found
    assert all("gate" in name or "router" in name for name in found)
    assert not any("gate_up" in name or "gate_proj" in name for name in found)
    free = {names[id(parameter)] for parameter in parameters_of_no_neuron(network)}
    assert found <= free
