"""Streaming mean and variance of every neuron, in float64, that merge exactly in any order of arrival."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of ``count`` vectors, one entry a neuron.

    ``mean`` and ``m2`` have the same shape, usually ``[neuron]``, and are float64: float32 sums of squares were seen to
    give negative variances. Where some vectors say nothing about some neurons, as those of prompts that were not routed
    to an expert do about its neurons, ``counts`` has the shape of ``mean`` and says how many speak about each.
    """

    count: int
    mean: Tensor
    m2: Tensor
    counts: Tensor | None = None

    @staticmethod
    def zero(shape: tuple[int, ...]) -> Moments:
        """Moments of no vectors at all: the neutral element of ``merge``."""
        return Moments(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @staticmethod
    def of(vectors: Tensor) -> Moments:
        """Moments of a batch ``[vector, ...]``, at least one vector; NaN is a vector's silence about a neuron."""
        values = vectors.to(torch.float64)
        speaks = ~values.isnan()
        if not bool(speaks.all()):
            counts = speaks.sum(dim=0)
            mean = values.nansum(dim=0) / counts.clamp(min=1)
            return Moments(len(values), mean, (values - mean).square_().nansum(dim=0), counts)
        mean = values.mean(dim=0)
        return Moments(len(values), mean, (values - mean).square_().sum(dim=0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979), as if they had been seen at once."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        gap = other.mean - self.mean
        if self.counts is not None or other.counts is not None:
            own, others = self.per_neuron, other.per_neuron
            counts = own + others
            # Whole numbers by whole numbers would be float32.
            share = others.double() / counts.clamp(min=1)
            m2 = self.m2 + other.m2 + gap.square() * own * share
            return Moments(count, self.mean + gap * share, m2, counts)
        mean = self.mean + gap * (other.count / count)
        m2 = self.m2 + other.m2 + gap.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def per_neuron(self) -> Tensor:
        """How many vectors speak about each neuron, in the shape of ``mean``."""
        return torch.full_like(self.mean, self.count, dtype=torch.int64) if self.counts is None else self.counts

    @property
    def variance(self) -> Tensor:
        """Unbiased sample variance, the ``s**2`` of Eq. 6; needs two vectors or more."""
        assert self.count >= 2, "a variance needs at least two vectors"
        return self.m2 / (self.count - 1 if self.counts is None else (self.counts - 1).clamp(min=1))
