"""The seam, held against hand-edited weights for every family: recording, pruning, ownership, fingerprints."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import LINEAGE, config_of, feed_forwards, fingerprint, network_of, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny

IDS = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 5]])
CHOSEN = {0: [3, 17], 2: [0, 47]}


def neurons_of(network: nn.Module, layers: dict[int, list[int]] = CHOSEN) -> NeuronSet:
    return NeuronSet.of(layers, widths_of(network), fingerprint(network))


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def activations(network: nn.Module) -> dict[int, torch.Tensor]:
    with torch.no_grad(), recorded(network) as recording:
        network(input_ids=IDS)
    return recording.layers


def hooks_in(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def down_column(network: nn.Module, layer: int) -> nn.Parameter:
    return network.get_decoder().layers[layer].mlp.down_proj.weight


def input_rows(network: nn.Module, layer: int, channel: int) -> list[tuple[nn.Parameter, int]]:
    """Where neuron ``channel`` is computed, written down again from the modelling code: gate first, then up."""
    mlp = network.get_decoder().layers[layer].mlp
    if hasattr(mlp, "gate_up_proj"):
        return [(mlp.gate_up_proj.weight, channel), (mlp.gate_up_proj.weight, tiny.WIDTH + channel)]
    return [(mlp.gate_proj.weight, channel), (mlp.up_proj.weight, channel)]


def test_finds_the_ffn_of_every_layer(family):
    network = tiny.network(family)
    blocks = feed_forwards(network)
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert widths_of(network) == (tiny.WIDTH,) * tiny.LAYERS
    assert [block.output.weight is down_column(network, block.layer) for block in blocks] == [True] * 3
    assert len(blocks[0].inputs) == 2
    assert (blocks[0].inputs[0].module is blocks[0].inputs[1].module) == (family == "phi3")


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


def test_own_rows_change_own_activation_only(family):
    network = tiny.network(family)
    before = activations(network)[0]
    with torch.no_grad():
        for weight, row in input_rows(network, 0, 17):
            weight[row] += 0.5
    changed = (activations(network)[0] != before).any(dim=0).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [17]


def test_owned_slices_are_rows_and_columns(family):
    network = tiny.network(family)
    slices = owned_slices(network, neurons_of(network, {1: [3, 17]}))
    found = {(piece.name, piece.dim, tuple(piece.index.tolist())) for piece in slices}
    mlp = next(name for name, _ in network.named_modules() if name.endswith("layers.1.mlp"))
    if family == "phi3":
        rows = {(f"{mlp}.gate_up_proj.weight", 0, (3, 17, tiny.WIDTH + 3, tiny.WIDTH + 17))}
    else:
        rows = {(f"{mlp}.{name}_proj.weight", 0, (3, 17)) for name in ("gate", "up")}
    assert found == rows | {(f"{mlp}.down_proj.weight", 1, (3, 17))}
    for piece in slices:
        assert piece.parameter is network.get_parameter(piece.name)


def test_owned_slices_are_all_that_a_neuron_is(family):
    """What a neuron owns at zero leaves nothing of it: the same output as pruning it, wherever else weights lie."""
    network = tiny.network(family)
    neurons = neurons_of(network)
    with pruned(network, neurons):
        expected = logits(network)
    with torch.no_grad():
        for piece in owned_slices(network, neurons):
            piece.parameter.index_fill_(piece.dim, piece.index, 0)
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-6)
    for layer, channels in CHOSEN.items():
        assert not activations(network)[layer][..., channels].any()


def test_owned_slices_hold_input_biases_but_not_the_output_bias():
    network = tiny.network("llama", mlp_bias=True)
    names = [piece.name for piece in owned_slices(network, neurons_of(network, {2: [5]}))]
    mlp = "model.layers.2.mlp"
    assert sorted(names) == sorted(
        [f"{mlp}.{side}_proj.{kind}" for side in ("gate", "up") for kind in ("weight", "bias")]
        + [f"{mlp}.down_proj.weight"]
    )
    biases = [piece for piece in owned_slices(network, neurons_of(network, {2: [5]})) if piece.name.endswith("bias")]
    assert [(piece.dim, piece.index.tolist()) for piece in biases] == [(0, [5])] * 2


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


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (transformers.MambaConfig(**SMALL, state_size=4), r"no layer of MambaModel has an FFN.*MambaBlock with mixer"),
        (transformers.FalconMambaConfig(**SMALL, state_size=4), "no layer of FalconMambaModel has an FFN"),
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
    with pytest.raises(InputError, match=r"layer 1 of LlamaModel has an FFN of no known form.*mlp.*table \(4, 6, 32\)"):
        feed_forwards(network)


def test_a_module_that_is_no_transformer_is_refused():
    with pytest.raises(InputError, match=r"found 0 \(Linear\)"):
        feed_forwards(nn.Sequential(nn.Linear(2, 2)))


def test_ffn_of_sizes_that_do_not_fit_is_refused():
    network = tiny.network()
    network.model.layers[1].mlp.up_proj = nn.Linear(tiny.HIDDEN, tiny.WIDTH - 1)
    with pytest.raises(InputError, match=r"layer 1 .*fitting sizes in mlp \(LlamaMLP\).*up_proj.weight \(47, 32\)"):
        feed_forwards(network)


def test_an_ffn_that_serves_two_layers_is_refused():
    network = tiny.network()
    network.model.layers[0].second = network.model.layers[1].mlp
    with pytest.raises(InputError, match=r"layers 0 and 1 of LlamaModel share one FFN"):
        feed_forwards(network)


def test_vision_tower_is_not_the_decoder():
    network = tiny.network()
    network.model.tower = tiny.network(layers=2, seed=5).model
    assert len(feed_forwards(network)) == tiny.LAYERS
    assert decoder_of(network) is network.model


def test_bare_network_and_model_are_the_same(tiny_model):
    assert network_of(tiny_model) is tiny_model.network
    assert network_of(tiny_model.network) is tiny_model.network
    assert fingerprint(tiny_model) == fingerprint(tiny_model.network) == tiny_model.fingerprint
    assert widths_of(tiny_model) == tiny_model.widths


def test_neurons_of_the_language_model_are_those_of_its_classifier(family, tmp_path):
    network = tiny.network(family)
    network.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert fingerprint(classifier) == fingerprint(network)
    names = [piece.name for piece in owned_slices(network, neurons_of(network))]
    assert [piece.name for piece in owned_slices(classifier, neurons_of(network))] == names


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
    with pytest.raises(InputError, match=r"ValueHead has no text decoder.*model \(Llama\w+\), head \(Linear\), second"):
        decoder_of(wrapper)


@pytest.mark.parametrize("how", [torch.compile, compile_regions])
def test_compiled_model_is_seen_through(how):
    network = tiny.network()
    compiled = how(network)
    assert fingerprint(compiled) == fingerprint(network)
    pieces = zip(owned_slices(compiled, neurons_of(network)), owned_slices(network, neurons_of(network)), strict=True)
    assert all(found.parameter is piece.parameter for found, piece in pieces)


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
        with pytest.raises(InputError, match=r"compiled model.*use and call that one"), use:
            pass
    with pruned(compiled, None):
        assert hooks_in(network) == 0


@pytest.mark.parametrize("use", [owned_slices, lambda network, neurons: pruned(network, neurons).__enter__()])
def test_set_of_another_model_is_refused(use):
    network, twin, wider = tiny.network(seed=0), tiny.network(seed=1), tiny.network(intermediate_size=56)
    with pytest.raises(InputError, match=r"3 layers and 168 neurons.*3 layers and 144"):
        use(network, neurons_of(wider))
    with pytest.raises(InputError, match="another model of the same shape"):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_is_the_same_in_every_precision(family, dtype):
    network = tiny.network(family)
    known = fingerprint(network)
    assert fingerprint(network.to(dtype)) == known
    assert fingerprint(network.to(torch.float32)) == known


def test_fingerprint_ignores_signs_that_float16_cannot_hold():
    network = tiny.network()
    with torch.no_grad():
        down_column(network, 0)[0, :3] = torch.tensor([1e-9, -1e-9, 1e-30])
    known = fingerprint(network)
    assert fingerprint(network.to(torch.bfloat16)) == known
    assert fingerprint(network.to(torch.float16)) == known


def test_fingerprints_differ_by_weights_shape_and_family():
    networks = [
        tiny.network(),
        tiny.network(seed=1),
        tiny.network(layers=2),
        tiny.network(intermediate_size=56),
        *(tiny.network(family) for family in ("qwen2", "mistral", "phi3")),
    ]
    prints = [fingerprint(network) for network in networks]
    assert len(set(prints)) == len(prints)
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in prints)
    assert fingerprint(tiny.network()) == prints[0]


def test_same_weights_in_another_family_are_another_model():
    llama, mistral = tiny.network("llama"), tiny.network("mistral")
    mistral.load_state_dict(llama.state_dict())
    assert fingerprint(mistral) != fingerprint(llama)


def test_fingerprint_is_kept_through_training_by_the_lineage():
    network = tiny.network()
    known = fingerprint(network)
    setattr(network.config, LINEAGE, known)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert fingerprint(network) == known
    delattr(network.config, LINEAGE)
    assert fingerprint(network) != known
