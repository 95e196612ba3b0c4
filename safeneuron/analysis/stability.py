"""How much a neuron set owes to the prompts it was found with: resamples, halves, sample sizes, other ways to measure.

Sets and scores in, numbers out; the statistics of resampled prompts come from one pass (``groups``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from safeneuron.analysis.settings import DENSITY_MULTIPLES, LEAST, Classes, Effort, finder
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, bootstrap_weights, pair_weights
from safeneuron.runtime.progress import Progress
from safeneuron.selection.measurement import POOLINGS, measure, measure_groups
from safeneuron.selection.scores import criteria, effect_size, select

ALWAYS = 0.95
"""A neuron is always in if at least this share of the resampled sets hold it."""
FARTHEST = 100
"""A sample size is extrapolated to so many times the prompts at hand, and not farther."""

Find = Callable[[ActivationStats], NeuronSet]


class Spread(NamedTuple):
    """A mean with the smallest and largest of the values behind it, and how many they are."""

    mean: float
    low: float
    high: float
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


class Needed(NamedTuple):
    """How many prompts of each class give sets whose mean Jaccard with one another is ``goal``.

    ``prompts`` is None where the curve does not get there: ``reached`` says whether it is within the data, by the
    curve's course beyond it (``extrapolated``), or ``not reached``. 1 - Jaccard is taken as a n**-b; ``exponent`` is b.
    """

    goal: float
    prompts: int | None
    reached: str
    exponent: float


def spread(values: Sequence[float]) -> Spread:
    """The mean and the range of some values; nan for none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(sum(known) / len(known), min(known), max(known), len(known))


def score_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two scores of the same neurons; nan if one is constant."""
    if bool((first == first[0]).all() or (second == second[0]).all()):
        return math.nan
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


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
        found = find(stats)
        frequency[found.flat] += 1 / len(unsafe)
        jaccards.append(reference.jaccard(found))
        correlations.append(score_correlation(scores, effect_size(stats.unsafe, stats.safe)))
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
        by_chance.append(chance_jaccard(first, second))
        correlations.append(score_correlation(*(effect_size(stats.unsafe, stats.safe) for stats in pair)))
    return Halves(spread(jaccards), spread(correlations), spread(by_chance).mean)


def chance_jaccard(first: NeuronSet, second: NeuronSet) -> float:
    """Expected intersection of random sets with these sizes by layer, over the union that then is left."""
    both = sum(one * other / width for one, other, width in zip(first.counts, second.counts, first.widths, strict=True))
    union = len(first) + len(second) - both
    return both / union if union else 1.0


def prompts_needed(curve: Sequence[tuple[int, float]], goal: float = 0.9) -> Needed:
    """How many prompts give a mean Jaccard of ``goal``, from points (prompts, mean Jaccard of independent samples).

    Within the data the answer lies on the straight line between two points; beyond it, on 1 - J = a n**-b, fitted to
    the logarithms. Where that would need more than ``FARTHEST`` times the prompts at hand, where the curve does not
    rise, and with fewer than 3 points, the answer is "not reached".
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


SIZES = (10, 20, 40, 80, 160, 320, 640)


def stability_record(
    config: Config,
    model: Model,
    classes: Classes,
    variants: Sequence[tuple[str, Model]],
    effort: Effort,
    progress: Progress | None = None,
    also: Sequence[tuple[str, Classes]] = (),
) -> dict[str, Any]:
    """Bootstrap, disjoint samples of growing size, poolings, thresholds, and ``variants``: other forms of the model.

    ``also`` are other prompts by name, such as translations, whose sets are held against the model's own.
    """
    table, find = config.measure, finder(config)
    count = min(map(len, classes))
    sizes = sorted({size for size in (*SIZES, count // 2) if 2 <= size <= count // 2})
    settings = (table.pooling, table.batch_tokens, table.max_tokens)
    unsafe, safe = classes
    whole = measure(model, unsafe, safe, *settings, progress)
    boots = [
        measure_groups(model, prompts, bootstrap_weights(len(prompts), effort.samples, config.seed + side), *settings)
        for side, prompts in enumerate(classes)
    ]
    again = resampled(whole, boots[0], boots[1], find)
    curve: list[tuple[int, Halves]] = []
    thresholds: list[dict[str, Any]] = []
    density = max(len(find(whole)), 1) / sum(whole.widths)
    for number, size in enumerate(sizes):
        pairs = [
            measure_groups(
                model, prompts, pair_weights(len(prompts), size, effort.pairs, config.seed + side), *settings
            )
            for side, prompts in enumerate(classes)
        ]
        curve.append((size, halves(whole, pairs[0], pairs[1], find)))
        if progress is not None:
            progress(number + 1, len(sizes) + len(POOLINGS))
        if size == sizes[-1]:
            for wanted in (min(density * share, 0.5) for share in DENSITY_MULTIPLES):
                one = halves(whole, pairs[0], pairs[1], partial(select, density=wanted))
                thresholds.append({"density": wanted, "jaccard": one.jaccard._asdict(), "chance": one.chance})
    others = [
        (f"pooling {name}", measure(model, unsafe, safe, name, *settings[1:]))
        for name in POOLINGS
        if name != settings[0]
    ]
    others += [(name, measure(other, unsafe, safe, *settings)) for name, other in variants]
    own = find(whole)
    ranks = criteria(whole).d
    return {
        "prompts": [len(prompts) for prompts in classes],
        "neurons": len(own),
        "bootstrap": _bootstrap(again),
        "samples": [
            {"prompts": size, **one.jaccard._asdict(), "chance": one.chance, "correlation": one.correlation.mean}
            for size, one in curve
        ],
        "needed": prompts_needed([(size, one.jaccard.mean) for size, one in curve])._asdict(),
        "thresholds": thresholds,
        "variants": [
            {
                "variant": name,
                "jaccard": own.jaccard(find(stats)),
                "correlation": score_correlation(ranks, criteria(stats).d),
            }
            for name, stats in others
        ],
        "also": [also_record(config, model, classes, whole, *one) for one in also],
    }


def also_record(
    config: Config, model: Model, classes: Classes, whole: ActivationStats, name: str, others: Classes
) -> dict[str, Any]:
    """The set found with other prompts against the one of all of ``classes``, whose statistics are ``whole``.

    Where ``LEAST`` or more of them are the same requests (the same id in both classes), two more: the sets of these
    requests alone in both wordings, which differ by the wording and nothing else; and the set of these requests as
    ``classes`` word them against that of all, which is what so few prompts cost.
    """
    find, table = finder(config), config.measure

    def measured(prompts: Classes) -> ActivationStats:
        return measure(model, *prompts, table.pooling, table.batch_tokens, table.max_tokens)

    def alike(first: ActivationStats, second: ActivationStats) -> dict[str, float]:
        correlation = score_correlation(criteria(first).d, criteria(second).d)
        return {"jaccard": find(first).jaccard(find(second)), "correlation": correlation}

    record = {"prompts_of": name, "prompts": [len(prompts) for prompts in others], **alike(whole, measured(others))}
    ids = [{prompt.id for prompt in prompts if prompt.id} for prompts in (*classes, *others)]
    same = set.intersection(*ids)
    if len(same) < LEAST:
        unknown = {"jaccard": None, "correlation": None}
        return {**record, "same_requests": len(same), "wording": unknown, "fewer": unknown}
    own, worded = (measured((_with_ids(unsafe, same), _with_ids(safe, same))) for unsafe, safe in (classes, others))
    return {**record, "same_requests": len(same), "wording": alike(own, worded), "fewer": alike(whole, own)}


def _with_ids(prompts: Sequence[Prompt], ids: set[str]) -> list[Prompt]:
    """The first prompt of each of these ids."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.id in ids:
            found.setdefault(prompt.id, prompt)
    return list(found.values())


def _bootstrap(again: Resampled) -> dict[str, Any]:
    # Sums of 1/n are a little off, and one above 1.0 would be in no tenth.
    tenths = (again.frequency * 10 - 1e-6).ceil()
    return {
        "jaccard": again.jaccard._asdict(),
        "correlation": again.correlation._asdict(),
        "always": len(again.always),
        "always_neurons": again.always.to_json()["neurons"],
        "ever": again.ever,
        "frequencies": [int((tenths == tenth).sum()) for tenth in range(1, 11)],
    }
