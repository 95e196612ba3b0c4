"""Pruning in the weights: equal to the hook for every family, undone bit by bit, and a checkpoint that loads again."""

from __future__ import annotations

import json

import pytest
import torch

from safeneuron.attacks.checkpoint import PRUNING_RECORD, with_edit_in_weights, write_pruned
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.layout import LINEAGE
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import tiny

IDS = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 5]])
CHOSEN = {0: [3, 17], 2: [0, 47]}


def neurons_of(model: Model) -> NeuronSet:
    return NeuronSet.of(CHOSEN, model.widths, model.fingerprint, "chosen")


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=IDS).logits


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def same_bits(model: Model, before: dict[str, torch.Tensor]) -> bool:
    now = model.network.state_dict()
    return all(torch.equal(now[name].view(torch.int32), value.view(torch.int32)) for name, value in before.items())


@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0])
def test_checkpoint_answers_as_the_hook(family, factor, tmp_path):
    model = tiny.model(family)
    edit = Edit.scale(neurons_of(model), factor)
    before, plain = bits(model), logits(model)
    with pruned(model, edit):
        by_hook = logits(model)
    write_pruned(model, edit, tmp_path / "pruned")
    assert same_bits(model, before)
    again = load(tmp_path / "pruned", dtype="stored")
    torch.testing.assert_close(logits(again), by_hook, rtol=1e-5, atol=1e-6)
    assert (by_hook - plain).abs().max() > 1e-3
    assert again.fingerprint == model.fingerprint
    assert NeuronSet.load(tmp_path / "pruned" / "neurons.json") == edit.neurons
    record = json.loads((tmp_path / "pruned" / PRUNING_RECORD).read_text())
    assert (record["operator"], record["neurons"], record["of"]) == (edit.name, 4, 144)


def test_a_zero_factor_writes_the_same_weights_as_zero(tmp_path):
    model = tiny.model()
    for name, edit in (("zero", neurons_of(model)), ("scale", Edit.scale(neurons_of(model), 0.0))):
        write_pruned(model, edit, tmp_path / name)
    assert same_bits(load(tmp_path / "zero", dtype="stored"), bits(load(tmp_path / "scale", dtype="stored")))


@pytest.mark.parametrize("values", [-1.5, torch.tensor([1.0, -2.0, 0.5, 3.0])])
def test_values_go_into_the_bias_where_there_is_one(values, tmp_path):
    model = tiny.model("llama", mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    edit = Edit.clamp(neurons_of(model), values)
    before = bits(model)
    with pruned(model, edit):
        by_hook = logits(model)
    write_pruned(model, edit, tmp_path / "pruned")
    assert same_bits(model, before)
    torch.testing.assert_close(logits(load(tmp_path / "pruned", dtype="stored")), by_hook, rtol=1e-4, atol=1e-5)


def test_values_are_refused_where_there_is_no_bias(family, tmp_path):
    model = tiny.model(family)
    before = bits(model)
    with pytest.raises(InputError, match=r"clamp pins neurons to values, .* has none; expected zero or scale"):
        write_pruned(model, Edit.clamp(neurons_of(model), 1.0), tmp_path / "pruned")
    assert same_bits(model, before)
    assert not (tmp_path / "pruned").exists()


def test_the_precision_of_the_checkpoint_is_kept(tmp_path):
    model = tiny.model()
    model.network.to(torch.bfloat16)
    model.save(tmp_path / "half")
    write_pruned(load(tmp_path / "half", dtype="stored"), neurons_of(model), tmp_path / "pruned")
    again = load(tmp_path / "pruned", dtype="stored")
    assert {parameter.dtype for parameter in again.network.parameters()} == {torch.bfloat16}
    for name, value in again.network.state_dict().items():
        expected = model.network.state_dict()[name].clone()
        if "down_proj" in name and (layer := int(name.split("layers.")[1][0])) in CHOSEN:
            expected[:, CHOSEN[layer]] = 0
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("fails", [False, True])
def test_engraved_weights_come_back_bit_by_bit(family, fails):
    model = tiny.model(family)
    down = model.network.get_decoder().layers[0].mlp.down_proj.weight
    with torch.no_grad():
        down[:, 3] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42]).repeat(8)
    neurons = neurons_of(model)
    before = bits(model)
    try:
        with with_edit_in_weights(model, Edit.zero(neurons)):
            assert not down[:, 3].any()
            assert model.fingerprint == neurons.fingerprint
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same_bits(model, before)
    assert LINEAGE not in vars(model.network.config)


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_folders_of_others_are_left_alone(tiny_model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="not written by safeneuron prune"):
            write_pruned(tiny_model, neurons_of(tiny_model), folder)
    write_pruned(tiny_model, neurons_of(tiny_model), tmp_path / "new")
    write_pruned(tiny_model, neurons_of(tiny_model), tmp_path / "new")


def test_neurons_of_another_model(tiny_model, tmp_path):
    with pytest.raises(InputError, match="another model of the same shape"):
        write_pruned(tiny_model, neurons_of(tiny.model(seed=1)), tmp_path / "pruned")
    assert LINEAGE not in vars(tiny_model.network.config)
