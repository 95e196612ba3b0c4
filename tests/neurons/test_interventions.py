"""The seam, held against hand-edited weights for every family: recording, pruning, ownership, fingerprints."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import fingerprint
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny
from tests.helpers.pruning import CHOSEN, IDS, activations, down_column, hooks_in, logits, neurons_of


def test_recorded_is_gate_times_up(family):
    network = tiny.network(family)
    mlp = network.get_decoder().layers[1].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = activations(network)[1]
    handle.remove()
    if family == "phi3":
        gate, up = mlp.gate_up_proj(seen[0]).chunk(2, dim=-1)
        act = mlp.activation_fn
    else:
        gate, up, act = mlp.gate_proj(seen[0]), mlp.up_proj(seen[0]), mlp.act_fn
    assert found.shape == (2, 5, tiny.WIDTH)
    torch.testing.assert_close(found, act(gate) * up)


def test_recorded_reduces_each_layer_at_once(family):
    network = tiny.network(family)
    whole = activations(network)
    with torch.no_grad(), recorded(network, lambda values: values.amax(dim=1)) as recording:
        network(input_ids=IDS)
    assert sorted(recording.layers) == [0, 1, 2]
    for layer, values in recording.layers.items():
        assert torch.equal(values, whole[layer].amax(dim=1))


def test_pruning_equals_zero_columns(family):
    network = tiny.network(family)
    before = logits(network)
    with pruned(network, neurons_of(network)):
        by_hook = logits(network)
    with torch.no_grad():
        for layer, channels in CHOSEN.items():
            down_column(network, layer)[:, channels] = 0
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-5, atol=1e-6)
    assert (by_hook - before).abs().max() > 1e-3


def test_pruned_gradients_equal_those_of_zero_columns(family):
    network, edited = tiny.network(family), tiny.network(family)
    with pruned(network, neurons_of(network)):
        network(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for layer, channels in CHOSEN.items():
            down_column(edited, layer)[:, channels] = 0
    edited(input_ids=IDS, labels=IDS).loss.backward()
    for layer, channels in CHOSEN.items():
        assert not down_column(network, layer).grad[:, channels].any()
    # Only at the pruned columns does the edited model still have a gradient; it is taken out before comparing.
    theirs = dict(edited.named_parameters())
    for name, parameter in network.named_parameters():
        expected = theirs[name].grad.clone()
        if name.endswith("down_proj.weight") and (layer := int(name.split("layers.")[1][0])) in CHOSEN:
            expected[:, CHOSEN[layer]] = 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_pruning_with_biases_equals_zero_columns():
    network = tiny.network("llama", mlp_bias=True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    with pruned(network, neurons_of(network)):
        by_hook = logits(network)
    with torch.no_grad():
        for layer, channels in CHOSEN.items():
            down_column(network, layer)[:, channels] = 0
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-5, atol=1e-6)


def test_empty_set_owns_nothing_and_prunes_nothing():
    network = tiny.network()
    nothing = neurons_of(network, {})
    before = logits(network)
    assert owned_slices(network, nothing) == []
    for neurons in (nothing, None):
        with pruned(network, neurons):
            assert torch.equal(logits(network), before)


def test_recording_within_pruning_sees_zeros():
    network = tiny.network()
    with torch.no_grad(), pruned(network, neurons_of(network)), recorded(network) as recording:
        network(input_ids=IDS)
    assert not recording.layers[0][..., [3, 17]].any()
    assert recording.layers[0][..., [2, 4]].any()
    assert recording.layers[1].any()


@pytest.mark.parametrize("manager", ["recorded", "pruned", "both"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_bit_identical_afterwards(family, manager, fails):
    network = tiny.network(family)
    neurons = neurons_of(network)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    before, hooks = logits(network), hooks_in(network)

    def use() -> None:
        outer = pruned(network, neurons if manager != "recorded" else None)
        with outer, recorded(network) if manager != "pruned" else pruned(network, None):
            assert hooks_in(network) > hooks
            logits(network)
            if fails:
                raise KeyError("something broke inside")

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert hooks_in(network) == hooks
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert torch.equal(logits(network), before)


def test_a_compiled_graph_asks_no_hooks():
    """Why compiled models are refused below. If this fails, they could be pruned."""
    network = tiny.network()
    compiled = torch.compile(network, backend="aot_eager")
    before = logits(compiled)
    with pruned(network, neurons_of(network)):
        assert torch.equal(logits(compiled), before)
        assert not torch.equal(logits(network), before)


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.model.layers[1].compile()
    return network


@pytest.mark.parametrize("how", [torch.compile, compile_regions, compiled_in_place])
def test_hooks_are_refused_where_they_would_not_be_asked(how):
    network = tiny.network()
    neurons, compiled = neurons_of(network), how(network)
    for use in (pruned(compiled, neurons), recorded(compiled)):
        with pytest.raises(InputError, match="compiled"), use:
            pass
    with pruned(compiled, None):
        assert hooks_in(network) == 0


@pytest.mark.parametrize("use", [owned_slices, lambda network, neurons: pruned(network, neurons).__enter__()])
def test_set_of_another_model_is_refused(use):
    network, twin, wider = tiny.network(seed=0), tiny.network(seed=1), tiny.network(intermediate_size=56)
    with pytest.raises(InputError, match="168 neurons"):
        use(network, neurons_of(wider))
    with pytest.raises(InputError, match="another model"):
        use(network, neurons_of(twin))
    assert hooks_in(network) == 0


def test_transferred_set_is_accepted():
    network, twin = tiny.network(seed=0), tiny.network(seed=1)
    moved = neurons_of(twin).transferred(fingerprint(network))
    with pruned(network, moved):
        by_transfer = logits(network)
    with pruned(network, neurons_of(network)):
        assert torch.equal(logits(network), by_transfer)
    assert [piece.name for piece in owned_slices(network, moved)]
