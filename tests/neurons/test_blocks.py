"""Mixtures of experts: which tokens a neuron hears, against a reference token by token; pruning, freezing, layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from safeneuron.attacks.checkpoint import with_edit_in_weights
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import exchanges_of
from safeneuron.models.forward import MeasurementSettings
from safeneuron.neurons.interventions import Edit, edited, pruned, recorded
from safeneuron.neurons.layout import LINEAGE, fingerprint, layers, neuron_addresses, neurons_at, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.neurons.verification import prove
from safeneuron.neurons.weights import owned_slices, parameters_of_no_neuron, routers
from safeneuron.selection.measurement import measure
from safeneuron.selection.saliency import wanda
from safeneuron.selection.scores import FEWEST, score, select
from safeneuron.training.freezing import Freeze, frozen
from tests.helpers import tiny, tiny_experts
from tests.helpers.tiny_experts import EXPERTS, MIXTURES, WIDTH

IDS = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 5]])


@pytest.fixture(params=list(MIXTURES))
def mixture(request):
    return request.param


def some(network: nn.Module) -> NeuronSet:
    """Neurons of every expert, and of whatever else there is, in the last layer, and one in the first."""
    last = len(widths_of(network)) - 1
    width = widths_of(network)[last]
    return NeuronSet.of({0: [5], last: range(1, width, 7)}, widths_of(network), fingerprint(network))


def logits(network: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=ids).logits


def silence(network: nn.Module, neurons: NeuronSet, output_only: bool) -> None:
    """Zero what the neurons own, by hand: the columns of the output projections, or all of it."""
    with torch.no_grad():
        for piece in owned_slices(network, neurons):
            is_output = (
                any(name in piece.name for name in ("down_proj", "w2", "output_proj")) and "bias" not in piece.name
            )
            if is_output or not output_only:
                if piece.experts is None:
                    piece.parameter.index_fill_(piece.dim, piece.index, 0)
                for expert, place in (
                    zip(piece.experts.tolist(), piece.index.tolist(), strict=True) if piece.experts is not None else ()
                ):
                    piece.parameter[expert].select(piece.dim - 1, place).zero_()


def test_every_expert_is_found(mixture):
    network = tiny_experts.network(mixture)
    (*_, last) = layers(network)
    (stack,) = (block for block in last.blocks if block.is_mixture)
    assert (stack.count, stack.width, stack.first) == (EXPERTS, WIDTH, 0)
    shared = {"qwen2-moe": tiny_experts.SHARED, "deepseek-v3": WIDTH, "llama4": WIDTH}.get(mixture, 0)
    assert last.width == EXPERTS * WIDTH + shared
    assert prove(network).unproved == ()


def test_pruning_equals_zero_columns(mixture):
    network = tiny_experts.network(mixture)
    neurons, before = some(network), logits(network)
    with pruned(network, neurons):
        by_hook = logits(network)
    assert torch.equal(logits(network), before)
    silence(network, neurons, output_only=True)
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-4, atol=1e-5)
    assert (by_hook - before).abs().max() > 1e-3


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
    with pytest.raises(
        InputError, match=r"no channel 24 of 1 in layer 0; expected one of 0, 1, 2, 3, mlp.shared_expert"
    ):
        neurons_at(network, [(0, 1, 24)])


def test_edits_reach_experts(mixture):
    """A factor by hook, by row and in the weights come to the same."""
    network = tiny_experts.network(mixture)
    model = tiny_experts.model(mixture)
    model.network = network
    neurons = some(network)
    halved = Edit.scale(neurons, 0.5)
    plain = logits(network)
    with pruned(network, halved):
        by_hook = logits(network)
    with edited(network, [None, halved], [1, 0]):
        by_row = logits(network)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with with_edit_in_weights(model, halved):
        by_weight = logits(network)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(by_hook, by_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_row[0], by_hook[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_row[1], plain[1], rtol=1e-4, atol=1e-5)


def test_a_constant_needs_a_bias():
    model = tiny_experts.model("gpt-oss")
    pinned = Edit.clamp(some(model.network), 0.7)
    with pruned(model, pinned):
        by_hook = logits(model.network)
    with with_edit_in_weights(model, pinned):
        torch.testing.assert_close(logits(model.network), by_hook, rtol=1e-4, atol=1e-5)
    model = tiny_experts.model("mixtral")
    with (
        pytest.raises(InputError, match="would need a bias"),
        with_edit_in_weights(model, Edit.clamp(some(model.network), 0.7)),
    ):
        pass


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


def test_recording_within_pruning_sees_zeros_in_experts():
    network = tiny_experts.network()
    neurons = some(network)
    with pruned(network, neurons), recorded(network) as recording:
        logits(network)
    assert not recording.layers[1][..., neurons.layer(1)].nan_to_num().any()
    assert recording.layers[1].nan_to_num().any()


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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_slices_of_experts_stay_bit_for_bit(mixture, optimizer):
    network = tiny_experts.network(mixture).train()
    neurons = some(network)
    setattr(network.config, LINEAGE, fingerprint(network))
    kinds = {"adamw": (torch.optim.AdamW, {"weight_decay": 0.1}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}
    kind, settings = kinds[optimizer]
    stepping = kind(network.parameters(), lr=0.05, **settings)
    network(input_ids=IDS, labels=IDS).loss.backward()
    stepping.step()  # stale momentum
    pieces = owned_slices(network, neurons)
    masks = {}
    for piece in pieces:
        mask = masks.setdefault(piece.name, torch.zeros(piece.parameter.shape, dtype=torch.bool))
        for number, place in enumerate(piece.index.tolist()):
            one = mask if piece.experts is None else mask[int(piece.experts[number])]
            one.select(piece.dim - (piece.experts is not None), place).fill_(True)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    with frozen(network, neurons, stepping):
        for _ in range(3):
            stepping.zero_grad()
            network(input_ids=IDS, labels=IDS).loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            stepping.step()
    for name, mask in masks.items():
        after = network.get_parameter(name)
        assert torch.equal(after[mask], before[name][mask]), name
        assert mask.any() and not mask.all(), name  # noqa: PT018
        assert (after != before[name])[~mask].any(), name


def test_a_restore_puts_back_what_was_moved(mixture):
    network = tiny_experts.network(mixture)
    freeze = Freeze(network, some(network))
    digest = freeze.digest()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    assert len(freeze.changed()) == len(freeze.slices)
    freeze.restore()
    assert freeze.changed() == []
    assert freeze.digest() == digest


def test_routers_are_what_is_neither_neuron_nor_attention(mixture):
    network = tiny_experts.network(mixture)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(parameter)] for parameter in routers(network)}
    assert found
    assert all("gate" in name or "router" in name for name in found)
    assert not any("gate_up" in name or "gate_proj" in name for name in found)
    free = {names[id(parameter)] for parameter in parameters_of_no_neuron(network)}
    assert found <= free


def prompts(count: int, start: int) -> list[Prompt]:
    return [Prompt(f"{number} " + "abcdefghijklmnop"[: 3 + number % 9]) for number in range(start, start + count)]


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_statistics_are_those_of_the_tokens_that_were_routed(pooling, batch_tokens):
    model = tiny_experts.model()
    classes = prompts(24, 0), prompts(20, 100)
    stats = measure(model, *classes, MeasurementSettings(pooling=pooling, batch_tokens=batch_tokens))
    for moments, texts in zip((stats.unsafe, stats.safe), classes, strict=True):
        rows = []
        for prompt in texts:
            ids = torch.tensor([model.encode([{"role": "user", "content": prompt.text}])])
            said = torch.cat([tiny_experts.spoken(model.network, ids, layer)[0] for layer in (0, 1)], dim=1).double()
            heard = ~said.isnan()
            if pooling == "last":
                rows.append(said[-1])
            elif pooling == "mean":
                rows.append(said.nanmean(dim=0))
            else:
                rows.append(said.nan_to_num(-torch.inf).amax(dim=0).masked_fill(~heard.any(dim=0), torch.nan))
        vectors = torch.stack(rows)
        counts = (~vectors.isnan()).sum(dim=0)
        assert torch.equal(moments.per_neuron, counts)
        torch.testing.assert_close(moments.mean, vectors.nanmean(dim=0).nan_to_num(), rtol=1e-4, atol=1e-6)
        square = ((vectors - vectors.nanmean(dim=0)) ** 2).nansum(dim=0)
        torch.testing.assert_close(moments.m2, square, rtol=1e-3, atol=1e-6)


def test_experts_that_hear_too_little_are_not_scored(tmp_path):
    model = tiny_experts.model()
    with torch.no_grad():
        for layer in model.network.get_decoder().layers:
            # The fourth expert is never asked.
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3].abs_()
    with torch.no_grad():
        model.network.get_input_embeddings().weight.abs_()
    stats = measure(model, prompts(24, 0), prompts(24, 100))
    stats.save(tmp_path / "stats.safetensors")
    again = ActivationStats.load(tmp_path / "stats.safetensors")
    assert torch.equal(again.unsafe.counts, stats.unsafe.counts)
    scores = score(again)
    silent = scores.scored.view(2, EXPERTS, WIDTH)[:, :, 0]
    enough = (stats.unsafe.counts >= FEWEST) & (stats.safe.counts >= FEWEST)
    assert torch.equal(silent, enough.view(2, EXPERTS, WIDTH)[:, :, 0])
    assert scores.unscored
    assert not silent.all()
    assert silent.any()
    assert not scores.d[~scores.scored].any()
    assert not scores.z[~scores.scored].any()
    neurons = select(again, density=0.05)
    assert len(neurons)
    assert scores.scored[neurons.flat].all()


def test_what_reads_whole_layers_refuses_experts():
    model = tiny_experts.model()
    asked = [Prompt("how are you")] * 2
    with pytest.raises(InputError, match=r"SNIP or Wanda reads one FFN a layer.*has experts"):
        wanda(model, exchanges_of(model, asked, ["well", "fine"]))


def test_dense_models_have_no_counts(tiny_model):
    stats = measure(tiny_model, prompts(4, 0), prompts(4, 10))
    assert stats.unsafe.counts is None
    assert stats.safe.counts is None
    assert len(tiny_model.widths) == tiny.LAYERS
