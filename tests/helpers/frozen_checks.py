"""What every test of freezing asks, by names and plain tensors, so that state dicts can be asked too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safeneuron.neurons.layout import fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import tiny

Weights = nn.Module | Mapping[str, Tensor]
# The first and the last channel are among them, and one layer has none.
CHANNELS = {0: [0, 7, tiny.WIDTH - 1], 2: [3]}


def network_with_noise(family: str = "llama", **changes: object) -> nn.Module:
    """A tiny network in which no weight is zero, so that weight decay alone moves every one."""
    return add_noise(tiny.network(family, **changes)).train()


def add_noise(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def some_neurons(network: nn.Module) -> NeuronSet:
    """The neurons of ``CHANNELS``."""
    return NeuronSet.of(CHANNELS, widths_of(network), fingerprint(network))


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def weights_of(what: Weights) -> Mapping[str, Tensor]:
    """The parameters of a network, or a state dict as it is."""
    return dict(what.named_parameters()) if isinstance(what, nn.Module) else what


def frozen_entries(what: Weights) -> dict[str, Tensor]:
    """Which entries of each weight the neurons of ``CHANNELS`` own, the slow and obvious way."""
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights_of(what).items()}
    for layer, channels in CHANNELS.items():
        for channel in channels:
            for name, mask in masks.items():
                if f"layers.{layer}.mlp." not in name:
                    continue
                if "down_proj.weight" in name:
                    mask[:, channel] = True
                elif "gate_up_proj" in name:
                    mask[channel] = mask[len(mask) // 2 + channel] = True
                elif "gate_proj" in name or "up_proj" in name:
                    mask[channel] = True
    return masks


def assert_frozen_stayed(before: Weights, after: Weights) -> None:
    """Every frozen entry is bit-identical (and there are frozen entries)."""
    was, now, masks = weights_of(before), weights_of(after), frozen_entries(before)
    assert sum(bool(mask.any()) for mask in masks.values()) >= 4
    for name, mask in masks.items():
        assert torch.equal(now[name][mask], was[name][mask]), f"{name}: a frozen entry moved"


def assert_only_frozen_stayed(before: Weights, after: Weights, every_entry: bool = True) -> None:
    """Every frozen entry is bit-identical; every free entry moved, or else something in every parameter.

    Every entry moves where the loss or weight decay reaches each; without decay unused embeddings, for one, stay.
    Among so many, one may by chance be back where it was, so two in a parameter are let pass: a neuron has more.
    """
    assert_frozen_stayed(before, after)
    was, now = weights_of(before), weights_of(after)
    for name, mask in frozen_entries(before).items():
        moved = (now[name] != was[name])[~mask]
        stayed = int((~moved).sum())
        assert stayed <= 2 if every_entry else moved.any(), f"{name}: {stayed} free entries did not move"
