"""FFNs of linear layers: where rows and columns lie, in the forms that models give them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitNetConfig, GPT2Config

from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import feed_forwards, fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny

SMALL = {"vocab_size": 260, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(**SMALL, n_embd=32, n_inner=48, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


def bitnet() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(BitNetConfig(**SMALL, **sizes, num_key_value_heads=2)).eval()


@pytest.mark.parametrize(
    ("network", "form", "inputs"),
    [
        (tiny.network, "gated, separate", [(0, 1), (0, 1)]),
        (lambda: tiny.network("phi3"), "gated, fused", [(0, 1), (tiny.WIDTH, 1)]),
        (gpt2, "plain, Conv1D", [(0, 1)]),
        (bitnet, "gated, separate", [(0, 1), (0, 1)]),
    ],
    ids=["llama", "phi3", "gpt2", "bitnet"],
)
def test_the_form_is_said_and_the_rows_are_named(network, form, inputs):
    block = feed_forwards(network())[0]
    assert block.form == form
    assert [(rows.first, rows.step) for rows in block.inputs] == inputs
    assert block.has_open_order == ("fused" in form)
    assert block.packed == ""
    assert block.modules()[-1] is block.hooked is block.output


def test_a_transposed_matrix_has_its_rows_in_columns():
    network = gpt2()
    block = feed_forwards(network)[1]
    mlp = network.transformer.h[1].mlp
    assert torch.equal(block.rows(5)[0], mlp.c_fc.weight[:, 5])
    assert torch.equal(block.biases(5)[0], mlp.c_fc.bias[5])
    assert torch.equal(block.column(5), mlp.c_proj.weight[5])
    shapes = {id(parameter): shape for parameter, shape in block.parameters()}
    assert shapes[id(mlp.c_fc.weight)] == (32, 48)
    assert shapes[id(mlp.c_proj.weight)] == (48, 32)
    assert shapes[id(mlp.c_proj.bias)] == (32,)


def test_a_norm_before_the_output_belongs_to_the_neurons():
    network = bitnet()
    (layer, *_) = feed_forwards(network)
    assert layer.norm is network.model.layers[0].mlp.ffn_sub_norm
    neurons = NeuronSet.of({0: [3, 17]}, widths_of(network), fingerprint(network))
    pieces = {piece.name: piece for piece in owned_slices(network, neurons)}
    assert pieces["model.layers.0.mlp.ffn_sub_norm.weight"].index.tolist() == [3, 17]
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        with pruned(network, neurons):
            expected = network(input_ids=ids).logits
        network.model.layers[0].mlp.ffn_sub_norm.weight[[3, 17]] = 0
        torch.testing.assert_close(network(input_ids=ids).logits, expected)


def test_rows_of_a_fused_matrix_come_together():
    block = feed_forwards(tiny.network("phi3"))[0]
    ((module, rows),) = block.rows_of(torch.tensor([2, 40]))
    assert module is block.inputs[0].module
    assert rows.tolist() == [2, 40, tiny.WIDTH + 2, tiny.WIDTH + 40]


@pytest.mark.parametrize("network", [tiny.network, gpt2], ids=["llama", "gpt2"])
def test_a_sample_is_the_first_rows_of_the_output_projection(network):
    block = feed_forwards(network())[0]
    ((shape, sample),) = block.samples("down", torch.float32)
    assert shape == (32, 48)
    weight = block.output.weight
    assert torch.equal(sample[:, :48], (weight.T if shape != tuple(weight.shape) else weight)[:16])
