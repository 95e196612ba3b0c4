"""Streaming mean and variance of every neuron, in float64, that merge exactly in any order of arrival."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of ``count`` vectors, one entry a neuron.

    ``mean`` and ``m2`` have the same shape, usually ``[neuron]``, and are float64: float32 sums of squares were seen to
    give negative variances.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @staticmethod
    def zero(shape: tuple[int, ...]) -> Moments:
        """Moments of no vectors at all: the neutral element of ``merge``."""
        return Moments(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @staticmethod
    def of(vectors: Tensor) -> Moments:
        """Moments of a batch ``[vector, ...]``, at least one vector."""
        values = vectors.to(torch.float64)
        mean = values.mean(dim=0)
        return Moments(len(values), mean, (values - mean).square_().sum(dim=0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979), as if they had been seen at once."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        m2 = self.m2 + other.m2 + gap.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Unbiased sample variance, the ``s**2`` of Eq. 6; needs two vectors or more."""
        assert self.count >= 2, "a variance needs at least two vectors"
        return self.m2 / (self.count - 1)
