"""A score for every neuron of a model, by whatever selector, and the neuron sets that it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import load_tensors, save_tensors


@dataclass(frozen=True, eq=False)
class Ranking:
    """How much each neuron matters, the largest first: ``values`` is ``[neuron]``, float64, layers laid end to end.

    ``label`` names the selector; sets made from the ranking carry it.
    """

    values: Tensor
    widths: tuple[int, ...]
    fingerprint: str
    label: str = ""

    def above(self, threshold: float) -> NeuronSet:
        """The neurons whose score exceeds the threshold, strictly."""
        return self._set(self.values > threshold)

    def top(self, density: float, avoid: NeuronSet | None = None) -> NeuronSet:
        """The share ``density`` of all neurons with the largest scores; of equals the first.

        Always as many as that, so that sets of different selectors compare.

        Args:
            density: How many of all neurons, between 0 and 1; at least one.
            avoid: Neurons that are passed over.

        Returns:
            The set, labelled like the ranking.

        Raises:
            InputError: For a density out of range, or where fewer neurons are left outside of ``avoid``.
        """
        return self._set(self._highest(self.values, round(density * len(self.values)), density, self._allowed(avoid)))

    def top_of_layers(self, share: float, avoid: NeuronSet | None = None) -> NeuronSet:
        """The same share of each layer, as selectors do that rank within a layer.

        What matters for safety and not for utility, as SNIP and Wanda are used by Wei et al. (2402.05162, section 3.2),
        is ``safety.top_of_layers(q) - utility.top_of_layers(p)``.

        Args:
            share: How many neurons of each layer, between 0 and 1; at least one.
            avoid: Neurons that are passed over.

        Returns:
            The set, labelled like the ranking.

        Raises:
            InputError: For a share out of range, or where fewer neurons are left outside of ``avoid``.
        """
        layers = zip(
            torch.split_with_sizes(self.values, self.widths),
            torch.split_with_sizes(self._allowed(avoid), self.widths),
            strict=True,
        )
        masks = [self._highest(values, round(share * len(values)), share, allowed) for values, allowed in layers]
        return self._set(torch.cat(masks))

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        header = {"kind": "ranking", "widths": list(self.widths), "fingerprint": self.fingerprint, "label": self.label}
        save_tensors(Path(path), {"values": self.values}, header)

    @staticmethod
    def load(path: str | Path) -> Ranking:
        """Read a ranking written by ``save``; ``InputError`` for a missing or foreign file."""
        tensors, header = load_tensors(Path(path), "ranking", ("values",))
        return Ranking(tensors["values"], tuple(header["widths"]), header["fingerprint"], header["label"])

    def _set(self, mask: Tensor) -> NeuronSet:
        return NeuronSet.of_mask(mask, self.widths, self.fingerprint, self.label)

    def _allowed(self, avoid: NeuronSet | None) -> Tensor:
        allowed = torch.ones(len(self.values), dtype=torch.bool)
        if avoid is not None:
            allowed[avoid.require(self.fingerprint, self.widths).flat] = False
        return allowed

    def _highest(self, values: Tensor, count: int, share: float, allowed: Tensor) -> Tensor:
        """A mask of the ``count`` highest values among those allowed."""
        if not 0 < share < 1:
            raise InputError(f"density must lie between 0 and 1, found {share}; 0.01 selects one neuron in a hundred")
        count = max(1, count)
        candidates = allowed.nonzero().flatten()
        if len(candidates) < count:
            raise InputError(
                f"{self.label or 'the ranking'} should give {count} of {len(values)} neurons, but only "
                f"{len(candidates)} are not avoided; use a smaller density, or avoid fewer"
            )
        order = values[candidates].sort(descending=True, stable=True).indices
        return torch.zeros(len(values), dtype=torch.bool).index_fill(0, candidates[order[:count]], True)


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
        lines = [
            f"first   {self.first}",
            f"second  {self.second}",
            f"in both {self.both:,}; by chance {self.chance:,.1f}; Jaccard {self.jaccard:.3f}",
        ]
        if self.correlation is not None:
            lines.append(f"rank correlation of the scores {self.correlation:.3f}")
        lines += ["", f"{'layer':>5} {'first':>7} {'second':>7} {'both':>7} {'Jaccard':>8}"]
        for at in self.layers:
            if at.first or at.second:
                lines.append(f"{at.layer:>5} {at.first:>7,} {at.second:>7,} {at.both:>7,} {at.jaccard:>8.3f}")
        return lines


def compare(first: NeuronSet, second: NeuronSet, rankings: tuple[Ranking, Ranking] | None = None) -> Comparison:
    """Jaccard overlap of two sets, as a whole and by layer, beside what chance gives.

    Args:
        first: A set.
        second: Another one of the same model.
        rankings: Those behind the sets, for their Spearman correlation.

    Returns:
        The numbers, which ``lines`` puts in words.

    Raises:
        InputError: For sets or rankings of different models.
    """
    one_model(first, second)
    for ranking in rankings or ():
        one_model(first, ranking)
    counts = zip(first.counts, second.counts, (first & second).counts, strict=True)
    layers = [
        LayerOverlap(layer, count, other, both, both / (count + other - both) if count + other else 1.0)
        for layer, (count, other, both) in enumerate(counts)
    ]
    correlation = math.nan if rankings is None else rank_correlation(rankings[0].values, rankings[1].values)
    known = None if math.isnan(correlation) else correlation
    both = sum(at.both for at in layers)
    return Comparison(first, second, both, first.jaccard(second), expected_overlap(first, second), layers, known)


def expected_overlap(first: NeuronSet, second: NeuronSet) -> float:
    """How many neurons two random sets with as many in every layer share on average.

    Args:
        first: A set.
        second: Another one of the same model.

    Returns:
        The sum over the layers of n_first n_second / width.
    """
    counts = zip(first.counts, second.counts, first.widths, strict=True)
    return sum(count * other / width for count, other, width in counts)


def expected_jaccard(first: NeuronSet, second: NeuronSet) -> float:
    """The Jaccard overlap that goes with ``expected_overlap``, over the union that is then left; 1 for empty sets."""
    both = expected_overlap(first, second)
    union = len(first) + len(second) - both
    return both / union if union else 1.0


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two scores of the same neurons.

    Args:
        first: ``[neuron]``.
        second: The same of another score.

    Returns:
        Between -1 and 1; nan if one of them is constant.
    """
    from scipy.stats import spearmanr

    if bool((first == first[0]).all() or (second == second[0]).all()):
        return math.nan
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


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
