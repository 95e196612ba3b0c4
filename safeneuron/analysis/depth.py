"""Where in a model its neurons lie: density over relative depth, which models of any depth share, and its thirds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from safeneuron.analysis.records import Number, PartRecord, TableRow
from safeneuron.neurons.neuron_set import NeuronSet


class Thirds(NamedTuple):
    """Shares of a set, 0 to 1, in the first, middle and last third of the depth; all 0 for an empty set."""

    early: float
    middle: float
    late: float


@dataclass(frozen=True)
class SetDepth:
    """Where one set lies: the density of each layer, that of equal parts of the depth, its thirds and mean depth."""

    name: str
    neurons: int
    layers: list[float]
    density: list[float]
    thirds: Thirds
    mean_depth: Number


@dataclass(frozen=True)
class DepthRecord(PartRecord):
    """The numbers of the part ``depth``: one set a state, or a run."""

    sets: list[SetDepth]

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a set."""
        rows = [
            {"name": placed.name, "neurons": placed.neurons, "mean_depth": placed.mean_depth, **placed.thirds._asdict()}
            for placed in self.sets
        ]
        return {"depth": rows}


def layer_depths(layers: int) -> list[float]:
    """The relative depth of each layer, 0 to 1: the middle of its part, (layer + 1/2) / layers."""
    return [(layer + 0.5) / layers for layer in range(layers)]


def layer_densities(neurons: NeuronSet) -> list[float]:
    """The chosen share of each layer's neurons."""
    return [count / width for count, width in zip(neurons.counts, neurons.widths, strict=True)]


def density_over_depth(neurons: NeuronSet, points: int = 20) -> list[float]:
    """The chosen share of the neurons in each of ``points`` equal parts of the depth (Fig. 4), for models that differ.

    A layer that lies in several parts counts in each with the share of it that lies there, so that every neuron counts
    once in all.
    """
    layers = len(neurons.widths)
    edges = torch.linspace(0, layers, points + 1, dtype=torch.float64)
    starts = torch.arange(layers, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], starts)
    high = torch.minimum(edges[1:, None], starts + 1)
    share = (high - low).clamp(min=0)
    chosen = share @ torch.tensor(neurons.counts, dtype=torch.float64)
    return (chosen / (share @ torch.tensor(neurons.widths, dtype=torch.float64))).tolist()


def thirds(neurons: NeuronSet) -> Thirds:
    """How the set is spread over the thirds of the depth; a layer on a border counts in both, each with its part."""
    if not len(neurons):
        return Thirds(0.0, 0.0, 0.0)
    layers, shares = len(neurons.widths), []
    for third in range(3):
        low, high = layers * third / 3, layers * (third + 1) / 3
        inside = [max(0.0, min(high, layer + 1) - max(low, layer)) for layer in range(layers)]
        shares.append(sum(count * part for count, part in zip(neurons.counts, inside, strict=True)) / len(neurons))
    return Thirds(*shares)


def mean_depth(sets: Sequence[NeuronSet]) -> list[float]:
    """The mean relative depth of the neurons of each set; nan for an empty one."""
    return [
        sum(count * depth for count, depth in zip(neurons.counts, layer_depths(len(neurons.widths)), strict=True))
        / len(neurons)
        if len(neurons)
        else float("nan")
        for neurons in sets
    ]


def depth_record(named: Sequence[tuple[str, NeuronSet]]) -> DepthRecord:
    """Where each of the sets lies.

    Args:
        named: The sets with the names of their states or runs.
    """
    return DepthRecord(
        [
            SetDepth(
                name,
                len(neurons),
                layer_densities(neurons),
                density_over_depth(neurons),
                thirds(neurons),
                mean_depth([neurons])[0],
            )
            for name, neurons in named
        ]
    )
