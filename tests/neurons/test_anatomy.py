"""What is found of a network's layers and FFNs, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.layout import config_of, feed_forwards, fingerprint, layers, widths_of
from safeneuron.neurons.verification import prove
from safeneuron.neurons.weights import owned_slices
from tests.helpers import shrunken, tiny, tiny_experts
from tests.helpers.pruning import down_column, neurons_of
from tests.helpers.tiny_experts import EXPERTS, WIDTH

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}


def test_finds_the_ffn_of_every_layer(family):
    network = tiny.network(family)
    blocks = feed_forwards(network)
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert widths_of(network) == (tiny.WIDTH,) * tiny.LAYERS
    assert [block.output.weight is down_column(network, block.layer) for block in blocks] == [True] * 3
    assert len(blocks[0].inputs) == 2
    assert (blocks[0].inputs[0].module is blocks[0].inputs[1].module) == (family == "phi3")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (transformers.MambaConfig(**SMALL, state_size=4), "MambaBlock"),
        (transformers.FalconMambaConfig(**SMALL, state_size=4), "FalconMambaModel"),
    ],
)
def test_unknown_anatomy_says_what_was_found(config, found):
    network = transformers.AutoModelForCausalLM.from_config(config)
    for use in (feed_forwards, widths_of, fingerprint):
        with pytest.raises(InputError, match=found):
            use(network)
    with pytest.raises(InputError, match=found), recorded(network):
        pass


def test_experts_of_an_unknown_form_are_not_passed_over():
    network = tiny.network()
    network.model.layers[1].mlp.register_parameter("table", nn.Parameter(torch.ones(4, 6, tiny.HIDDEN)))
    with pytest.raises(InputError, match="table"):
        feed_forwards(network)


def test_a_module_that_is_no_transformer_is_refused():
    with pytest.raises(InputError, match="decoder"):
        feed_forwards(nn.Sequential(nn.Linear(2, 2)))


def test_ffn_of_sizes_that_do_not_fit_is_refused():
    network = tiny.network()
    network.model.layers[1].mlp.up_proj = nn.Linear(tiny.HIDDEN, tiny.WIDTH - 1)
    with pytest.raises(InputError, match="LlamaMLP"):
        feed_forwards(network)


def test_an_ffn_that_serves_two_layers_is_refused():
    network = tiny.network()
    network.model.layers[0].second = network.model.layers[1].mlp
    with pytest.raises(InputError, match="share"):
        feed_forwards(network)


def test_vision_tower_is_not_the_decoder():
    network = tiny.network()
    network.model.tower = tiny.network(layers=2, seed=5).model
    assert len(feed_forwards(network)) == tiny.LAYERS
    assert decoder_of(network) is network.model


class ValueHead(nn.Module):
    """A module of somebody's own around a model, without its methods."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner
        self.head = nn.Linear(tiny.HIDDEN, 1)


@pytest.mark.parametrize("part", ["language model", "decoder"])
def test_model_within_a_module_of_somebody_else(part):
    network = tiny.network()
    wrapper = ValueHead(network if part == "language model" else network.model)
    assert decoder_of(wrapper) is network.model
    assert fingerprint(wrapper) == fingerprint(network)
    assert config_of(wrapper) is network.config
    (first, *_) = owned_slices(wrapper, neurons_of(network))
    assert wrapper.get_parameter(first.name) is first.parameter
    wrapper.second = tiny.network(seed=1)
    with pytest.raises(InputError, match="ValueHead"):
        decoder_of(wrapper)


def test_layers_without_an_ffn_have_no_neurons():
    network = shrunken.network(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["nemotron_h"]])
    widths = widths_of(network)
    assert 0 in widths
    assert max(widths) > 0
    assert [layer.width for layer in layers(network)] == list(widths)


def test_every_expert_is_found(mixture):
    network = tiny_experts.network(mixture)
    (*_, last) = layers(network)
    (stack,) = (block for block in last.blocks if block.is_mixture)
    assert (stack.count, stack.width, stack.first) == (EXPERTS, WIDTH, 0)
    shared = {"qwen2-moe": tiny_experts.SHARED, "deepseek-v3": WIDTH, "llama4": WIDTH}.get(mixture, 0)
    assert last.width == EXPERTS * WIDTH + shared
    assert prove(network).unproved == ()
