"""A few neurons of tiny networks, and what they own put to zero by hand."""

from __future__ import annotations

import torch
from torch import nn

from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.layout import fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from tests.helpers import tiny

IDS = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 5]])
CHOSEN = {0: [3, 17], 2: [0, 47]}


def neurons_of(network: nn.Module, layers: dict[int, list[int]] = CHOSEN) -> NeuronSet:
    return NeuronSet.of(layers, widths_of(network), fingerprint(network))


def logits(network: nn.Module) -> torch.Tensor:
    """What the network says of a batch of two rows."""
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


def some(network: nn.Module) -> NeuronSet:
    """Neurons of every expert, and of whatever else there is, in the last layer, and one in the first."""
    last = len(widths_of(network)) - 1
    width = widths_of(network)[last]
    return NeuronSet.of({0: [5], last: range(1, width, 7)}, widths_of(network), fingerprint(network))
