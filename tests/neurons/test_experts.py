"""Mixtures of experts: which tokens a neuron hears, against a reference token by token; pruning, freezing, layouts."""

from __future__ import annotations

import pytest
import torch

from safeneuron.attacks.checkpoint import with_edit_in_weights
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import exchanges_of
from safeneuron.models.forward import MeasurementSettings
from safeneuron.neurons.interventions import Edit, edited, pruned
from safeneuron.neurons.layout import LINEAGE, fingerprint
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.neurons.weights import owned_slices
from safeneuron.selection.measurement import measure
from safeneuron.selection.saliency import wanda
from safeneuron.selection.scores import FEWEST, score, select
from safeneuron.training.freezing import Freeze, frozen
from tests.helpers import tiny, tiny_experts
from tests.helpers.pruning import IDS, logits, silence, some
from tests.helpers.tiny_experts import EXPERTS, WIDTH


def test_pruning_equals_zero_columns(mixture):
    network = tiny_experts.network(mixture)
    neurons, before = some(network), logits(network)
    with pruned(network, neurons):
        by_hook = logits(network)
    assert torch.equal(logits(network), before)
    silence(network, neurons, output_only=True)
    torch.testing.assert_close(by_hook, logits(network), rtol=1e-4, atol=1e-5)
    assert (by_hook - before).abs().max() > 1e-3


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
        pytest.raises(InputError, match="bias"),
        with_edit_in_weights(model, Edit.clamp(some(model.network), 0.7)),
    ):
        pass


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
    with pytest.raises(InputError, match="experts"):
        wanda(model, exchanges_of(model, asked, ["well", "fine"]))


def test_dense_models_have_no_counts(tiny_model):
    stats = measure(tiny_model, prompts(4, 0), prompts(4, 10))
    assert stats.unsafe.counts is None
    assert stats.safe.counts is None
    assert len(tiny_model.widths) == tiny.LAYERS
