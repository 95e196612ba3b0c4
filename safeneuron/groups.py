"""Moments of many overlapping groups of prompts from one pass: categories, halves, subsets and bootstrap samples alike.

A group is a column of weights, one whole number a prompt: how often the prompt counts in the group. Categories are
columns of 0 and 1, a bootstrap sample one of counts. What is kept is two vectors a group, however many prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.moments import Moments
from safeneuron.statistics import load_tensors, save_tensors


@dataclass(frozen=True)
class GroupMoments:
    """Counts ``[group]``, means and sums of squared deviations ``[group, neuron]``, all float64."""

    counts: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def zero(groups: int, neurons: int) -> GroupMoments:
        """Moments of no vectors at all: the neutral element of ``merge``."""
        blank = torch.zeros(groups, neurons, dtype=torch.float64)
        return GroupMoments(torch.zeros(groups, dtype=torch.float64), blank, blank.clone())

    @staticmethod
    def of(vectors: Tensor, weights: Tensor) -> GroupMoments:
        """Moments of a batch ``[prompt, neuron]`` under ``weights`` ``[prompt, group]``, at least one prompt."""
        values, weights = vectors.to(torch.float64), weights.to(torch.float64)
        # Sums about the batch's own mean: the squares then have the size of deviations, and nothing cancels.
        centre = values.mean(dim=0)
        values = values - centre
        counts = weights.sum(dim=0)
        share = torch.where(counts > 0, counts, 1.0)[:, None]
        gap = weights.T @ values / share
        m2 = (weights.T @ values.square() - gap.square() * counts[:, None]).clamp_(min=0)
        return GroupMoments(counts, torch.where(counts[:, None] > 0, gap + centre, 0.0), m2)

    def merge(self, other: GroupMoments) -> GroupMoments:
        """Moments of both samples together, group by group (Chan, Golub and LeVeque 1979)."""
        counts = self.counts + other.counts
        part = (other.counts / torch.where(counts > 0, counts, 1.0))[:, None]
        gap = other.mean - self.mean
        m2 = self.m2 + other.m2 + gap.square() * (self.counts[:, None] * part)
        return GroupMoments(counts, self.mean + gap * part, m2)

    def group(self, number: int) -> Moments:
        """The moments of one group."""
        return Moments(round(float(self.counts[number])), self.mean[number], self.m2[number])

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class TopicStats:
    """Statistics by topic: the moments of each topic's unsafe prompts, and of all safe prompts, as ``measure`` has."""

    topics: tuple[str, ...]
    unsafe: GroupMoments
    safe: Moments
    widths: tuple[int, ...]
    fingerprint: str
    pooling: str

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {
            "counts": self.unsafe.counts,
            "unsafe.mean": self.unsafe.mean,
            "unsafe.m2": self.unsafe.m2,
            "safe.mean": self.safe.mean,
            "safe.m2": self.safe.m2,
        }
        header = {
            "kind": "statistics by topic",
            "topics": list(self.topics),
            "safe_count": self.safe.count,
            "widths": list(self.widths),
            "fingerprint": self.fingerprint,
            "pooling": self.pooling,
        }
        save_tensors(Path(path), tensors, header)

    @staticmethod
    def load(path: str | Path) -> TopicStats:
        """Read statistics written by ``save``; ``InputError`` for a missing or foreign file."""
        tensors, header = load_tensors(Path(path), "statistics by topic", ("safe.mean", "safe.m2"))
        return TopicStats(
            tuple(header["topics"]),
            GroupMoments(tensors["counts"], tensors["unsafe.mean"], tensors["unsafe.m2"]),
            Moments(header["safe_count"], tensors["safe.mean"], tensors["safe.m2"]),
            tuple(header["widths"]),
            header["fingerprint"],
            header["pooling"],
        )


def one_of_each(labels: Sequence[str], names: Sequence[str]) -> Tensor:
    """Weights ``[prompt, name]`` of the groups with these labels: 1 where a prompt has the label, 0 elsewhere."""
    places = {name: number for number, name in enumerate(names)}
    weights = torch.zeros(len(labels), len(names), dtype=torch.float64)
    for row, label in enumerate(labels):
        if label in places:
            weights[row, places[label]] = 1
    return weights


def bootstrap_weights(prompts: int, samples: int, seed: int) -> Tensor:
    """Weights ``[prompt, sample]`` of the ordinary bootstrap: each sample draws as many prompts, with replacement."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (samples, prompts), generator=draw)
    return torch.stack([torch.bincount(row, minlength=prompts) for row in drawn], dim=1).double()


def pair_weights(prompts: int, size: int, pairs: int, seed: int) -> Tensor:
    """Weights ``[prompt, 2 * pair]``: columns 2i and 2i + 1 are two random subsets of this size with no prompt in both.

    Raises ``InputError`` for a size of more than half of the prompts.
    """
    if 2 * size > prompts:
        raise InputError(f"two subsets of {size} prompts were asked for, but there are {prompts}; ask for fewer")
    draw = torch.Generator().manual_seed(seed)
    weights = torch.zeros(prompts, 2 * pairs, dtype=torch.float64)
    for pair in range(pairs):
        order = torch.randperm(prompts, generator=draw)
        weights[order[:size], 2 * pair] = 1
        weights[order[size : 2 * size], 2 * pair + 1] = 1
    return weights
