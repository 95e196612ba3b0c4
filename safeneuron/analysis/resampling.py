"""Sets of resampled prompts: bootstrap, disjoint samples, and how many prompts a set needs to be found again.

Sets and scores in, numbers out; the statistics of resampled prompts come from one pass (``measure_groups``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safeneuron.analysis.records import Number
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments
from safeneuron.selection.ranking import expected_jaccard, rank_correlation
from safeneuron.selection.scores import criteria, effect_size

ALWAYS = 0.95
"""A neuron is always in if at least this share of the resampled sets hold it."""
FARTHEST = 100
"""A sample size is extrapolated to so many times the prompts that there are, and not farther."""

Find = Callable[[ActivationStats], NeuronSet]


@dataclass(frozen=True)
class Spread:
    """A mean with the smallest and largest of the values behind it, and how many they are."""

    mean: Number
    low: Number
    high: Number
    values: int


class Resampled(NamedTuple):
    """Sets of resampled prompts against the set of all prompts, and how often each neuron was found, ``[neuron]``."""

    jaccard: Spread
    correlation: Spread
    frequency: Tensor
    always: NeuronSet
    ever: int


class Halves(NamedTuple):
    """Sets of two samples of prompts that share none, over several draws: what a second study would find."""

    jaccard: Spread
    correlation: Spread
    chance: float


@dataclass(frozen=True)
class Needed:
    """How many prompts of each class give sets whose mean Jaccard with one another is ``goal``.

    ``prompts`` is None where the curve does not get there: ``reached`` says whether it is within the data, by the
    curve's course beyond it (``extrapolated``), or ``not reached``. 1 - Jaccard is taken as a n**-b; ``exponent`` is b.
    """

    goal: float
    prompts: int | None
    reached: str
    exponent: Number


def spread(values: Sequence[float]) -> Spread:
    """The mean and the range of some values; nan for none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(sum(known) / len(known), min(known), max(known), len(known))


def stats_of(whole: ActivationStats, unsafe: GroupMoments, safe: GroupMoments, number: int) -> ActivationStats:
    """Statistics of the model in ``whole``, but of the prompts of one group of each class."""
    return ActivationStats(unsafe.group(number), safe.group(number), whole.widths, whole.fingerprint, whole.pooling)


def resampled(whole: ActivationStats, unsafe: GroupMoments, safe: GroupMoments, find: Find) -> Resampled:
    """Bootstrap: each sample's set against that of all prompts, Spearman's correlation of d, and who is always in."""
    reference, scores = find(whole), criteria(whole).d
    jaccards, correlations = [], []
    frequency = torch.zeros(reference.total, dtype=torch.float64)
    for number in range(len(unsafe)):
        stats = stats_of(whole, unsafe, safe, number)
        neurons = find(stats)
        frequency[neurons.flat] += 1 / len(unsafe)
        jaccards.append(reference.jaccard(neurons))
        correlations.append(rank_correlation(scores, effect_size(stats.unsafe, stats.safe)))
    # Sums of 1/n are a little off, and 19 of 20 are 95 %.
    always = NeuronSet.of_mask(frequency >= ALWAYS - 1e-9, reference.widths, reference.fingerprint, "always in")
    return Resampled(spread(jaccards), spread(correlations), frequency, always, int((frequency > 0).sum()))


def halves(whole: ActivationStats, unsafe: GroupMoments, safe: GroupMoments, find: Find) -> Halves:
    """Groups 2i and 2i + 1 are a pair, such as the two halves of a split; ``chance`` is random sets' mean Jaccard."""
    jaccards, correlations, by_chance = [], [], []
    for number in range(0, len(unsafe), 2):
        pair = [stats_of(whole, unsafe, safe, number + side) for side in (0, 1)]
        first, second = map(find, pair)
        jaccards.append(first.jaccard(second))
        by_chance.append(expected_jaccard(first, second))
        correlations.append(rank_correlation(*(effect_size(stats.unsafe, stats.safe) for stats in pair)))
    return Halves(spread(jaccards), spread(correlations), spread(by_chance).mean)


def prompts_needed(curve: Sequence[tuple[int, float]], goal: float = 0.9) -> Needed:
    """How many prompts give a mean Jaccard of ``goal``, from points (prompts, mean Jaccard of independent samples).

    Within the data the answer lies on the straight line between two points; beyond it, on 1 - J = a n**-b, fitted to
    the logarithms. Where that would need more than ``FARTHEST`` times the prompts that there are, where the curve does
    not rise, and with fewer than 3 points, the answer is "not reached".
    """
    points = sorted((size, value) for size, value in curve if not math.isnan(value))
    for (size, value), (larger, better) in zip([(0, 0.0), *points], points, strict=False):
        if better >= goal:
            share = (goal - value) / (better - value) if better > value else 1.0
            reached = math.ceil(size + share * (larger - size)) if size else larger
            return Needed(goal, reached, "within the data", _exponent(points)[1])
    if len(points) < 3:
        return Needed(goal, None, "not reached", math.nan)
    scale, exponent = _exponent(points)
    wanted = math.exp((scale - math.log(1 - goal)) / exponent) if exponent > 0.02 else math.inf
    if wanted > FARTHEST * points[-1][0]:
        return Needed(goal, None, "not reached", exponent)
    # The fit may pass above the last points; it cannot be fewer than have been seen not to be enough.
    return Needed(goal, max(math.ceil(wanted), points[-1][0] + 1), "extrapolated", exponent)


def _exponent(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """log a and b of 1 - J = a n**-b by least squares; nan with fewer than two points below 1."""
    known = [(math.log(size), math.log(1 - value)) for size, value in points if value < 1]
    if len(known) < 2:
        return math.nan, math.nan
    sizes, distances = zip(*known, strict=True)
    slope, start = np.polyfit(sizes, distances, 1)
    return float(start), -float(slope)
