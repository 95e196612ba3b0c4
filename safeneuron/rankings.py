"""A score for every neuron of a model, by whatever selector, and the neuron sets that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.selecting import shift_zscore
from safeneuron.statistics import load_tensors, save_tensors


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
        """The share ``density`` of all neurons with the largest scores, at least one; of equals the first.

        Always as many as that, so that sets of different selectors compare. Raises ``InputError`` for a density that
        does not lie between 0 and 1, or where fewer neurons are left outside of ``avoid``.
        """
        return self._set(self._highest(self.values, round(density * len(self.values)), density, self._allowed(avoid)))

    def top_of_layers(self, share: float, avoid: NeuronSet | None = None) -> NeuronSet:
        """The same share of each layer, at least one neuron of each, as selectors do that rank within a layer."""
        layers = zip(
            torch.split_with_sizes(self.values, self.widths),
            torch.split_with_sizes(self._allowed(avoid), self.widths),
            strict=True,
        )
        masks = [self._highest(values, round(share * len(values)), share, allowed) for values, allowed in layers]
        return self._set(torch.cat(masks))

    def zscores(self) -> Ranking:
        """How far each score stands out among those of its own layer, in standard deviations."""
        return Ranking(shift_zscore(self.values, self.widths), self.widths, self.fingerprint, self.label)

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


def set_difference(safety: Ranking, utility: Ranking, safety_share: float, utility_share: float) -> NeuronSet:
    """What matters for safety and not for utility, as SNIP and Wanda are used by Wei et al. (2402.05162, section 3.2).

    In each layer the top ``safety_share`` (their q) by ``safety`` that are not among the top ``utility_share`` (their
    p) by ``utility``. Raises ``InputError`` for rankings of different models.
    """
    chosen = safety.top_of_layers(safety_share)
    return (chosen - utility.top_of_layers(utility_share)).labelled(safety.label)


def fractions(ranking: Ranking, shares: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)) -> list[NeuronSet]:
    """The sets of a fraction curve: the top shares of one ranking, each holding the smaller ones."""
    return [ranking.top(share).labelled(f"{ranking.label} {share:.1%}".strip()) for share in shares]
