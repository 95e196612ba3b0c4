"""Operators on neurons, held against weights changed by hand for every family, one at a time and several in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.interventions import Edit, edited, pruned, recorded, rewritten
from safeneuron.neurons.layout import fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.measurement import measure
from tests.helpers import planted, tiny

IDS = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 5], [50, 51, 52, 53, 54]])
CHOSEN = {0: [3, 17], 2: [0, 47]}
COUNT = sum(map(len, CHOSEN.values()))


def neurons_of(network: nn.Module, layers: dict[int, list[int]] = CHOSEN) -> NeuronSet:
    return NeuronSet.of(layers, widths_of(network), fingerprint(network))


def logits(network: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=ids).logits


def edits_of(neurons: NeuronSet) -> dict[str, Edit]:
    values = torch.linspace(-2, 3, len(neurons), dtype=torch.float64)
    return {
        "zero": Edit.zero(neurons),
        "half": Edit.scale(neurons, 0.5),
        "flipped": Edit.scale(neurons, -3.0),
        "one value": Edit.clamp(neurons, -1.5),
        "values": Edit.clamp(neurons, values),
        "factor and values": Edit(neurons, 0.25, values),
    }


def by_hand(network: nn.Module, edit: Edit) -> None:
    """The edit in the weights: scaled columns of W_down, and a bias where there was none."""
    values = iter(edit.values.tolist() if edit.values is not None else [0.0] * COUNT)
    with torch.no_grad():
        for layer, channels in CHOSEN.items():
            down = network.get_decoder().layers[layer].mlp.down_proj
            columns = down.weight[:, channels].clone()
            constant = sum(next(values) * column for column in columns.T)
            down.weight[:, channels] = edit.factor * columns
            down.bias = nn.Parameter(constant if down.bias is None else down.bias + constant)


@pytest.mark.parametrize("name", edits_of(neurons_of(tiny.network())))
def test_hook_equals_weights_changed_by_hand(family, name):
    network = tiny.network(family)
    edit = edits_of(neurons_of(network))[name]
    before = logits(network)
    with pruned(network, edit):
        by_hook = logits(network)
    assert torch.equal(logits(network), before)
    assert (by_hook - before).abs().max() > 1e-3
    by_hand(network, edit)
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-4, atol=1e-4)


def test_hook_equals_hand_where_the_projection_has_a_bias():
    network = tiny.network("llama", mlp_bias=True)
    edit = edits_of(neurons_of(network))["values"]
    with pruned(network, edit):
        by_hook = logits(network)
    by_hand(network, edit)
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-4, atol=1e-4)


def test_a_zero_edit_is_the_neuron_set(family):
    network = tiny.network(family)
    with pruned(network, neurons_of(network)):
        expected = logits(network)
    for same in (Edit.zero(neurons_of(network)), Edit.clamp(neurons_of(network), 0.0)):
        with pruned(network, same):
            assert torch.equal(logits(network), expected)


def test_a_factor_of_one_is_the_model_itself(family):
    network = tiny.network(family)
    before = logits(network)
    with pruned(network, Edit.scale(neurons_of(network), 1.0)):
        assert torch.equal(logits(network), before)


def test_self_patch_is_the_identity(family):
    """With its own activations put in their place a model answers the same, bit by bit; with others it does not."""
    network = tiny.network(family)
    with recorded(network) as recording:
        before = logits(network)
    own = dict(recording.layers)
    with rewritten(network, {layer: lambda _, kept=kept: kept for layer, kept in own.items()}):
        assert torch.equal(logits(network), before)
        assert not torch.allclose(logits(network, IDS.flip(1)), logits(network, IDS))
    others = {layer: lambda _, kept=kept: kept.roll(1, dims=0) for layer, kept in own.items()}
    with rewritten(network, others):
        assert not torch.allclose(logits(network), before)


def test_patching_with_means_takes_the_benign_means(tiny_model):
    unsafe, safe = planted.twins(4)
    stats = measure(tiny_model, unsafe, safe)
    neurons = neurons_of(tiny_model.network)
    for edit, expected in (
        (Edit.mean(neurons, stats), stats.safe.mean),
        (Edit.opposite(neurons, stats, 2.0), -2 * stats.unsafe.mean),
    ):
        with torch.no_grad(), pruned(tiny_model, edit), recorded(tiny_model) as recording:
            tiny_model.network(input_ids=IDS)
        for layer, channels in CHOSEN.items():
            values = expected.split(tiny.WIDTH)[layer][channels].float()
            assert torch.equal(recording.layers[layer][..., channels], values.expand(3, 5, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_bit_identical_afterwards(fails):
    network = tiny.network()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    before = logits(network)
    try:
        with edited(network, [None, *edits_of(neurons_of(network)).values()], [1, 6, 0]):
            logits(network)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert torch.equal(logits(network), before)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_zeroed_neuron_may_be_infinite():
    network = tiny.network()
    neurons = neurons_of(network)
    with pruned(network, neurons):
        expected = logits(network)
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[3] = torch.inf
    with pruned(network, neurons):
        assert torch.equal(logits(network), expected)
    with edited(network, [Edit.zero(neurons), Edit.scale(neurons, 0.5)], [0, 0, 1]):
        mixed = logits(network)
    assert torch.equal(mixed[:2], expected[:2])
    assert mixed[2].isnan().any()


# -- several in one batch -----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=3), st.sampled_from(["llama", "phi3", "gemma2"]))
def test_each_row_is_under_its_own_edit(rows, family):
    network = tiny.network(family)
    edits = [None, *edits_of(neurons_of(network)).values()]
    with edited(network, edits, rows):
        together = logits(network)
    for row, number in enumerate(rows):
        with pruned(network, edits[number]):
            assert torch.equal(together[row], logits(network)[row])


def test_sets_of_different_sizes_and_layers_in_one_batch():
    network = tiny.network()
    edits = [Edit.zero(neurons_of(network, layers)) for layers in ({0: [1]}, {1: range(40), 2: [3]}, {})]
    with edited(network, edits, [2, 1, 0]):
        together = logits(network)
    for row, edit in enumerate(reversed(edits)):
        with pruned(network, edit):
            assert torch.equal(together[row], logits(network)[row])


def test_rows_limit_any_operator():
    network = tiny.network()
    edit = edits_of(neurons_of(network))["values"]
    before = logits(network)
    with pruned(network, edit):
        everywhere = logits(network)
    with pruned(network, edit, torch.tensor([False, True, False])):
        some = logits(network)
    assert torch.equal(some[1], everywhere[1])
    assert torch.equal(some[[0, 2]], before[[0, 2]])


def test_gradients_flow_through_every_operator():
    network = tiny.network()
    neurons = neurons_of(network)
    for edit, left in ((Edit.scale(neurons, 0.5), True), (Edit.clamp(neurons, 1.0), False)):
        for managed in (pruned(network, edit), edited(network, [edit], [0, 0, 0])):
            network.zero_grad()
            with managed:
                network(input_ids=IDS, labels=IDS).loss.backward()
            up = network.model.layers[0].mlp.up_proj.weight.grad[CHOSEN[0]]
            assert bool(up.any()) == left


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_values_that_do_not_fit():
    neurons = neurons_of(tiny.network())
    with pytest.raises(InputError, match="shape"):
        Edit.clamp(neurons, torch.zeros(3))
    with pytest.raises(InputError, match="finite"):
        Edit.clamp(neurons, float("nan"))


def test_edits_and_statistics_of_another_model(tiny_model):
    stats = measure(tiny.model(seed=1), *planted.twins(2))
    with pytest.raises(InputError, match="another model"):
        Edit.mean(neurons_of(tiny_model.network), stats)
    other = Edit.zero(neurons_of(tiny.network(seed=1)))
    for managed in (pruned(tiny_model, other), edited(tiny_model, [None, other], [0, 0])):
        with pytest.raises(InputError, match="another model"), managed:
            pass


def test_transfer_is_explicit_and_needs_the_same_shape(tiny_model):
    sibling = tiny.model(seed=1)
    found = neurons_of(sibling.network)
    meant = found.transferred(tiny_model.fingerprint, tiny_model.widths)
    with pruned(tiny_model, meant):
        by_transfer = logits(tiny_model.network)
    with pruned(tiny_model, neurons_of(tiny_model.network)):
        assert torch.equal(by_transfer, logits(tiny_model.network))
    with pytest.raises(InputError, match="shape"):
        found.transferred(tiny_model.fingerprint, (48, 48))
