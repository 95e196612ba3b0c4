"""The network that is trained: a copy in a precision that loses nothing, and what counts as its change."""

from __future__ import annotations

import copy

import pytest
import torch

from safeneuron.neurons.layout import LINEAGE
from safeneuron.training.freezing import Freeze
from safeneuron.training.policy import (
    base_of_adapters,
    checkpoint_dtype,
    free_change,
    gathered,
    plain_copy,
    sharing_weights,
    store_in,
    untrained,
)
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny
from tests.helpers.frozen_checks import snapshot, some_neurons


def test_a_plain_copy_is_float32_and_remembers_its_neurons():
    model = tiny.model()
    model.network.to(torch.bfloat16)
    plain = plain_copy(model)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    assert getattr(plain.config, LINEAGE) == model.fingerprint
    assert all(
        torch.equal(new, old.float()) for new, old in zip(plain.parameters(), model.network.parameters(), strict=True)
    )
    with torch.no_grad():
        plain.lm_head.weight.zero_()
    assert model.network.lm_head.weight.any()


def test_adapters_have_a_base_in_float32_where_training_computes_in_it():
    base = base_of_adapters(tiny.model(), TrainingSettings(precision="float32", lora_rank=2))
    assert {weight.dtype for weight in base.parameters()} == {torch.float32}


def test_another_object_with_the_same_memory():
    network = tiny.network()
    twin = sharing_weights(network)
    assert twin is not network
    assert [w.data_ptr() for w in twin.parameters()] == [w.data_ptr() for w in network.parameters()]
    assert not any(weight.requires_grad for weight in twin.parameters())


def test_a_checkpoint_is_stored_in_its_own_precision_if_that_holds_the_values():
    network = tiny.network()
    assert checkpoint_dtype(network, torch.bfloat16) == torch.float32
    rounded = copy.deepcopy(network).to(torch.bfloat16)
    assert checkpoint_dtype(rounded, torch.bfloat16) == torch.bfloat16
    store_in(torch.float32, rounded.parameters())
    assert checkpoint_dtype(rounded, torch.bfloat16) == torch.bfloat16


def test_no_gradient_is_computed_within_the_block():
    weights = list(tiny.network().parameters())[:2]
    with untrained(weights):
        assert not any(weight.requires_grad for weight in weights)
    assert all(weight.requires_grad for weight in weights)


def test_trained_weights_take_the_place_of_the_given_ones():
    trained, whole = tiny.network(seed=1), tiny.network(seed=0)
    assert gathered(trained, whole) is whole
    assert snapshot(whole).keys() == snapshot(trained).keys()
    assert all(torch.equal(value, snapshot(trained)[name]) for name, value in snapshot(whole).items())


def test_the_change_is_that_of_the_free_weights_alone():
    before = tiny.network()
    after = copy.deepcopy(before)
    proof = Freeze(after, some_neurons(before))
    with torch.no_grad():
        for weight in after.parameters():
            weight.mul_(1.5)
    proof.restore()
    assert free_change(after, before, proof, ()) == pytest.approx(0.5, rel=1e-6)


def test_a_parameter_that_was_not_to_be_trained_must_not_change():
    before = tiny.network()
    after = copy.deepcopy(before)
    fixed = {id(after.lm_head.weight)}
    assert free_change(after, before, None, fixed) == 0.0
    with torch.no_grad():
        after.lm_head.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match="lm_head"):
        free_change(after, before, None, fixed)
