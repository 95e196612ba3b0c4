"""How alike two neuron sets of one model are: as a whole, by layer, against chance, and in their rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.rankings import Ranking


class LayerOverlap(NamedTuple):
    """One layer's part of a comparison: how many neurons each set has there, how many both have, and their Jaccard."""

    layer: int
    first: int
    second: int
    both: int
    jaccard: float


@dataclass(frozen=True)
class Comparison:
    """Two sets held against each other.

    ``chance`` is how many neurons two random sets with as many in every layer would share on average. ``correlation``
    is Spearman's of the two rankings over all neurons, ``None`` where there are no rankings or one of them is constant.
    """

    first: NeuronSet
    second: NeuronSet
    both: int
    jaccard: float
    chance: float
    layers: list[LayerOverlap]
    correlation: float | None = None

    def lines(self) -> list[str]:
        """The comparison in words, then one line for each layer in which either set has neurons."""
        said = [
            f"first   {self.first}",
            f"second  {self.second}",
            f"in both {self.both:,}; by chance {self.chance:,.1f}; Jaccard {self.jaccard:.3f}",
        ]
        if self.correlation is not None:
            said.append(f"rank correlation of the scores {self.correlation:.3f}")
        said += ["", f"{'layer':>5} {'first':>7} {'second':>7} {'both':>7} {'Jaccard':>8}"]
        for at in self.layers:
            if at.first or at.second:
                said.append(f"{at.layer:>5} {at.first:>7,} {at.second:>7,} {at.both:>7,} {at.jaccard:>8.3f}")
        return said


def compare(first: NeuronSet, second: NeuronSet, rankings: tuple[Ranking, Ranking] | None = None) -> Comparison:
    """Jaccard overlap of two sets, as a whole and by layer, beside what chance gives.

    With the two ``rankings`` behind the sets, also their Spearman correlation. Raises ``InputError`` for sets or
    rankings of different models.
    """
    one_model(first, second)
    for ranking in rankings or ():
        one_model(first, ranking)
    counts = zip(first.counts, second.counts, (first & second).counts, strict=True)
    layers = [
        LayerOverlap(layer, own, other, both, both / (own + other - both) if own + other else 1.0)
        for layer, (own, other, both) in enumerate(counts)
    ]
    chance = sum(at.first * at.second / width for at, width in zip(layers, first.widths, strict=True))
    correlation = None if rankings is None else rank_correlation(*rankings)
    both = sum(at.both for at in layers)
    return Comparison(first, second, both, first.jaccard(second), chance, layers, correlation)


def rank_correlation(first: Ranking, second: Ranking) -> float | None:
    """Spearman's correlation of two rankings over all neurons; ``None`` if one of them is constant."""
    from scipy.stats import spearmanr

    one_model(first, second)
    if any(bool(torch.all(ranking.values == ranking.values[0])) for ranking in (first, second)):
        return None
    return float(spearmanr(first.values.numpy(), second.values.numpy()).statistic)


def one_model(first: NeuronSet | Ranking, second: NeuronSet | Ranking) -> None:
    """Raise ``InputError`` if the two are not of one model."""
    if first.widths != second.widths:
        shapes = [f"{len(each.widths)} layers and {sum(each.widths):,} neurons" for each in (first, second)]
        raise InputError(
            f"the first is of a model with {shapes[0]}, the second of one with {shapes[1]}, so their neurons are not "
            "the same things; expected two of one model, find them on the same one"
        )
    if first.fingerprint != second.fingerprint:
        raise InputError(
            f"the two are of different models of one shape (fingerprints {first.fingerprint} and "
            f"{second.fingerprint}); expected two of one model, or of models trained from one; if a transfer is meant, "
            "say so with NeuronSet.transferred"
        )
