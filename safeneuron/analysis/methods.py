"""How selectors agree, layer by layer, and how many of a set's neurons chance could have selected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeneuron.analysis.records import Number, PartRecord, TableRow, rows_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.ranking import compare
from safeneuron.selection.scores import Scores

FALSE_DISCOVERIES = 0.05
"""The rate of false discoveries at which a neuron counts as significant."""


@dataclass(frozen=True)
class Agreement:
    """Two methods' sets: sizes, intersection by layer and in all, what chance gives, and Jaccard."""

    first: str
    second: str
    first_size: int
    second_size: int
    both: int
    chance: float
    jaccard: float
    layers: list[int]


@dataclass(frozen=True)
class Discoveries:
    """Of a set: how many neurons there are and survive q < .05; of the model: how many survive, and were not taken."""

    label: str
    selected: int
    significant: int
    significant_in_all: int
    missed: int
    largest_q: Number


@dataclass(frozen=True)
class MethodsRecord(PartRecord):
    """The numbers of the part ``methods``: every two of the sets, and the false discoveries of each."""

    agreements: list[Agreement]
    discoveries: list[Discoveries]

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a pair of sets, and one a set."""
        pairs = [asdict(agreement) for agreement in self.agreements]
        for row in pairs:
            del row["layers"]
        return {"agreements": pairs, "discoveries": rows_of(self.discoveries)}


class Volcano(NamedTuple):
    """Points ``[neuron]`` of d against shift: ``kind`` is 0 not selected, 1 selected and q >= .05, 2 selected."""

    d: Tensor
    shift: Tensor
    q: Tensor
    kind: Tensor
    neuron: Tensor

    def rows(self) -> list[TableRow]:
        """One row a neuron."""
        columns = [column.tolist() for column in self]
        return [dict(zip(self._fields, values, strict=True)) for values in zip(*columns, strict=True)]


def agreements(sets: Sequence[NeuronSet]) -> list[Agreement]:
    """Every two of the sets held against each other (Fig. 7), by their labels."""
    pairs = []
    for first, second in itertools.combinations(sets, 2):
        overlap = compare(first, second)
        pairs.append(
            Agreement(
                first=first.label,
                second=second.label,
                first_size=len(first),
                second_size=len(second),
                both=overlap.both,
                chance=overlap.chance,
                jaccard=overlap.jaccard,
                layers=[layer.both for layer in overlap.layers],
            )
        )
    return pairs


def discoveries(scores: Scores, neurons: NeuronSet) -> Discoveries:
    """How many neurons of the set are more active on unsafe prompts at a false-discovery rate of 5 %.

    q-values are those of one-sided t-tests over all neurons of the model, corrected after Benjamini and Hochberg.
    """
    q = scores.q[neurons.flat]
    significant, in_all = int((q < FALSE_DISCOVERIES).sum()), int((scores.q < FALSE_DISCOVERIES).sum())
    largest = float(q.max()) if len(q) else float("nan")
    return Discoveries(neurons.label, len(neurons), significant, in_all, in_all - significant, largest)


def volcano(scores: Scores, neurons: NeuronSet, most: int = 4000, seed: int = 0) -> Volcano:
    """Points of a volcano plot: all of the set, and of the rest at most ``most``, drawn evenly.

    ``neuron`` numbers them with the layers laid end to end.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(scores.d), dtype=torch.bool).index_fill(0, neurons.flat, True)
    rest = (~chosen).nonzero().flatten()
    rest = rest[torch.randperm(len(rest), generator=draw)[:most]]
    shown = torch.cat([neurons.flat, rest]).sort().values
    kind = chosen[shown].long() + (chosen[shown] & (scores.q[shown] < FALSE_DISCOVERIES)).long()
    return Volcano(scores.d[shown], scores.shift[shown], scores.q[shown], kind, shown)
