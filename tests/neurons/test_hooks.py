"""What flows into output projections, seen and changed, in dense FFNs and experts of either layout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.hooks import TokenLayout, TokenStream, observed
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import layers
from tests.helpers import architectures, tiny, tiny_experts
from tests.helpers.pruning import IDS, hooks_in, logits, silence, some


def test_pruning_a_flattened_shared_expert_by_rows():
    """Shared experts compute on tokens without rows; an attack on some rows of a batch must still find them."""
    network = tiny_experts.network("qwen2-moe")
    ids = architectures.IDS
    from safeneuron.neurons.layout import neurons_at

    neurons = neurons_at(network, [(1, "mlp.shared_expert", channel) for channel in range(0, 40, 3)])
    with torch.no_grad():
        plain = network(input_ids=ids).logits
        with pruned(network, neurons):
            everywhere = network(input_ids=ids).logits
        with pruned(network, neurons, rows=torch.tensor([True, False])):
            first = network(input_ids=ids).logits
    torch.testing.assert_close(first[0], everywhere[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[1], plain[1], rtol=1e-4, atol=1e-5)
    assert (first[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["stacked", "split"])
def test_recorded_is_what_each_token_hears(layout):
    network = tiny_experts.network()
    expected = [tiny_experts.spoken(network, IDS, layer) for layer in (0, 1)]
    if layout == "split":
        tiny_experts.split(network)
    with recorded(network) as recording:
        logits(network)
    for layer in (0, 1):
        torch.testing.assert_close(recording.layers[layer], expected[layer], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_recording_within_pruning_sees_zeros_in_experts():
    network = tiny_experts.network()
    neurons = some(network)
    with pruned(network, neurons), recorded(network) as recording:
        logits(network)
    assert not recording.layers[1][..., neurons.layer(1)].nan_to_num().any()
    assert recording.layers[1].nan_to_num().any()


def test_gradients_flow_through_pruned_experts():
    network = tiny_experts.network()
    by_hand = copy.deepcopy(network)
    neurons = some(network)
    silence(by_hand, neurons, output_only=True)
    with pruned(network, neurons):
        network(input_ids=IDS, labels=IDS).loss.backward()
    by_hand(input_ids=IDS, labels=IDS).loss.backward()
    ours, theirs = (one.get_decoder().layers[0].mlp.experts.gate_up_proj.grad for one in (network, by_hand))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_model_is_what_it_was_after_an_exception(mixture):
    network = tiny_experts.network(mixture)
    before = logits(network)
    forwards = [vars(module).get("forward") for module in network.modules()]

    def fail() -> None:
        with pruned(network, some(network)), recorded(network):
            logits(network)
            raise KeyError("something broke inside")

    with pytest.raises(KeyError):
        fail()
    assert [vars(module).get("forward") for module in network.modules()] == forwards
    assert torch.equal(logits(network), before)


def pass_through(network: nn.Module) -> None:
    with torch.no_grad():
        network(input_ids=IDS)


@pytest.mark.parametrize("layout", ["dense", "stacked", "list"])
def test_inner_taps_see_what_outer_ones_have_made_of_it(layout):
    if layout == "dense":
        network = tiny.network()
    else:
        network = tiny_experts.network()
        network = tiny_experts.split(network) if layout == "list" else network
    seen = []

    def double(stream: TokenStream) -> torch.Tensor:
        seen.append(("outer", stream.first, stream.activations.clone()))
        return stream.activations * 2

    def look(stream: TokenStream) -> None:
        seen.append(("inner", stream.first, stream.activations.clone()))

    decoder, found = decoder_of(network), layers(network)[:1]
    with observed(decoder, found, double), observed(decoder, found, look):
        pass_through(network)
    assert seen
    for outer, inner in zip(seen[::2], seen[1::2], strict=True):
        assert (outer[0], inner[0], outer[1]) == ("outer", "inner", inner[1])
        assert torch.equal(outer[2] * 2, inner[2])
    with observed(decoder, found, look):
        pass_through(network)
    assert all("forward" not in vars(module) for module in network.modules())
    assert hooks_in(network) == 0


def test_two_models_watched_at_once_do_not_hear_one_another():
    first, second = tiny_experts.network(), tiny_experts.network("mixtral")
    count = {"first": 0, "second": 0}

    def tap(name: str) -> Callable[[TokenStream], None]:
        def look(stream: TokenStream) -> None:
            count[name] += 1

        return look

    with (
        observed(decoder_of(first), layers(first), tap("first")),
        observed(decoder_of(second), layers(second), tap("second")),
    ):
        pass_through(first)
    assert count["first"]
    assert not count["second"]


def test_the_kernel_of_experts_is_the_plain_loop_meanwhile():
    network = tiny_experts.network()
    chosen = network.config._experts_implementation
    kernels = []

    def look(stream: TokenStream) -> None:
        kernels.append(network.config._experts_implementation)

    with observed(decoder_of(network), layers(network), look):
        pass_through(network)
    assert set(kernels) == {"eager"}
    assert network.config._experts_implementation == chosen


def test_experts_that_compute_in_a_way_of_their_own_are_refused():
    network = tiny_experts.network()
    experts = network.model.layers[0].mlp.experts
    experts.forward = lambda hidden, index, weights: hidden
    with (
        pytest.raises(InputError, match="mixture of experts"),
        observed(decoder_of(network), layers(network)[:1], lambda stream: None),
    ):
        pass_through(network)


def test_a_stream_goes_whole_and_back():
    rows, length = 2, 3
    values = torch.arange(24.0).view(rows, length, 4)
    batch = TokenLayout(rows, length)
    turned = TokenLayout(rows, length, time_first=True)
    for stream in (
        TokenStream(0, 0, values, None, batch),
        TokenStream(0, 0, values.flatten(0, 1), None, batch),
        TokenStream(0, 0, values.transpose(0, 1), None, turned),
    ):
        assert torch.equal(stream.whole(), values)
        assert torch.equal(stream.narrowed(stream.whole()), stream.activations)
    routed = TokenStream(0, 0, values.flatten(0, 1)[[4, 1]], torch.tensor([4, 1]), batch)
    assert torch.equal(routed.whole()[1, 1], values[1, 1])
    assert not routed.whole()[0, 0].any()
    assert torch.equal(routed.narrowed(routed.whole()), routed.activations)
    with pytest.raises(InputError, match="architecture"):
        TokenStream(0, 0, values.transpose(0, 1), None, batch).whole()
