"""Linear layers of any class, and what is put around them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from safeneuron.neurons.linears import (
    acting,
    computed_weight,
    device_of,
    is_transposed,
    linear_in,
    size_of,
    unwrapped,
    weight_and_bias,
    weight_of,
)
from tests.helpers import tiny


class Packed(nn.Module):
    """A layer whose weights are integers of its own making."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.codes.T.to(values.dtype) / 8 + self.bias


def test_sizes_are_inputs_and_outputs_in_every_class():
    assert size_of(nn.Linear(3, 5)) == (3, 5)
    assert size_of(Conv1D(5, 3)) == (3, 5)
    assert size_of(Packed(3, 5)) == (3, 5)
    assert [size_of(module) for module in (nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 5)), nn.Embedding(3, 5))] == [
        None
    ] * 3


def test_only_gpt_2_keeps_its_weights_transposed():
    assert is_transposed(Conv1D(5, 3))
    assert not is_transposed(nn.Linear(3, 5))


def test_weights_and_biases_as_far_as_there_are_any():
    plain, packed = nn.Linear(3, 5, bias=False), Packed(3, 5)
    assert list(weight_and_bias(plain)) == ["weight"]
    assert list(weight_and_bias(nn.Linear(3, 5))) == ["weight", "bias"]
    assert weight_of(plain) is plain.weight
    assert (weight_of(packed), list(weight_and_bias(packed))) == (None, ["bias"])
    assert device_of(packed) == torch.device("cpu")
    assert device_of(nn.Linear(3, 5, device="meta")) == torch.device("meta")


def test_packed_weights_are_what_they_compute():
    packed = Packed(20, 5)
    found = computed_weight(packed, 20, torch.float32)
    torch.testing.assert_close(found, packed.codes.T[:16].float() / 8)
    assert computed_weight(packed.to("meta"), 20, torch.float32) is None


@pytest.mark.parametrize("name", ["_orig_mod", "_checkpoint_wrapped_module", "module"])
def test_a_wrapper_with_one_module_of_a_known_name_is_seen_through(name):
    inner, wrapper, two = nn.Linear(3, 5), nn.Module(), nn.Module()
    wrapper.add_module(name, inner)
    two.add_module(name, inner)
    two.add_module("other", nn.Linear(5, 3))
    assert unwrapped(wrapper) is inner
    assert unwrapped(two) is two
    assert unwrapped(inner) is inner


def test_adapters_are_seen_through():
    network = tiny.network()
    before = network.model.layers[0].mlp.down_proj
    model = get_peft_model(network, LoraConfig(target_modules=["down_proj"], modules_to_save=["up_proj"]))
    mlp = model.base_model.model.model.layers[0].mlp
    assert unwrapped(model) is network
    assert mlp.down_proj is not before
    assert linear_in(mlp.down_proj) is before
    assert size_of(mlp.down_proj) == (tiny.WIDTH, tiny.HIDDEN)
    # PEFT trains a copy of what is to be saved, and goes back to the original when adapters are off.
    assert acting(mlp.up_proj) is mlp.up_proj.modules_to_save["default"]
    with model.disable_adapter():
        assert acting(mlp.up_proj) is mlp.up_proj.original_module
