"""Resampled sets against small sets worked out by hand, planted signals, and curves whose course is known."""

from __future__ import annotations

import math

import pytest
import torch

from safeneuron.analysis.resampling import (
    Spread,
    halves,
    prompts_needed,
    resampled,
    spread,
)
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, Moments, bootstrap_weights, pair_weights
from safeneuron.selection.scores import select

WIDTHS = (30, 30)


def neurons(*flat: int) -> NeuronSet:
    return NeuronSet(torch.tensor(flat, dtype=torch.int64), WIDTHS, "f")


def data(signal: float, planted: int = 3, prompts: int = 40):
    torch.manual_seed(0)
    unsafe, safe = torch.randn(prompts, 60), torch.randn(prompts, 60)
    unsafe[:, :planted] += signal
    return unsafe, safe, ActivationStats(Moments.of(unsafe), Moments.of(safe), WIDTHS, "f", "last")


def find(stats: ActivationStats) -> NeuronSet:
    return select(stats, density=3 / 60)


def test_what_is_there_is_always_in():
    unsafe, safe, whole = data(signal=6)
    weights = bootstrap_weights(40, 20, 0), bootstrap_weights(40, 20, 1)
    found = resampled(whole, GroupMoments.of(unsafe, weights[0]), GroupMoments.of(safe, weights[1]), find)
    assert found.always == neurons(0, 1, 2)
    # With so few neurons ES and SAS cannot always share the places evenly, and one is left out.
    assert found.jaccard.mean > 0.95
    assert found.jaccard.values == 20
    assert found.ever <= 5
    assert found.frequency[:3].min() >= 0.95
    assert 0.5 < found.correlation.mean < 1


def test_noise_is_not_stable_and_halves_say_so_more_than_the_bootstrap():
    unsafe, safe, whole = data(signal=0)
    pair = [pair_weights(40, 20, 10, seed) for seed in (0, 1)]
    split = halves(whole, GroupMoments.of(unsafe, pair[0]), GroupMoments.of(safe, pair[1]), find)
    boot = [bootstrap_weights(40, 20, seed) for seed in (0, 1)]
    again = resampled(whole, GroupMoments.of(unsafe, boot[0]), GroupMoments.of(safe, boot[1]), find)
    assert split.jaccard.mean < 0.2 < again.jaccard.mean
    assert abs(split.correlation.mean) < 0.2
    assert len(again.always) < 3 < again.ever


def test_halves_of_a_signal_agree():
    unsafe, safe, whole = data(signal=6)
    pair = [pair_weights(40, 20, 5, seed) for seed in (0, 1)]
    found = halves(whole, GroupMoments.of(unsafe, pair[0]), GroupMoments.of(safe, pair[1]), find)
    assert found.jaccard.mean > 0.85
    assert found.chance < 0.06


def test_small_sets_by_hand():
    assert spread([1 / 3, 1.0, 1 / 3]) == Spread(pytest.approx(5 / 9), 1 / 3, 1, 3)
    assert spread([math.nan, 1, 3]) == Spread(2, 1, 3, 2)
    assert math.isnan(spread([]).mean)


def test_the_prompts_needed_within_the_data():
    found = prompts_needed([(10, 0.5), (20, 0.8), (40, 1.0)])
    assert (found.prompts, found.reached) == (30, "within the data")


def test_the_prompts_needed_beyond_the_data_follow_a_known_course():
    """1 - J = 2 / sqrt(n): .1 at n = 400."""
    found = prompts_needed([(n, 1 - 2 / n**0.5) for n in (10, 20, 50, 100)])
    assert (found.prompts, found.reached) == (pytest.approx(400, abs=1), "extrapolated")
    assert found.exponent == pytest.approx(0.5)


@pytest.mark.parametrize(
    "curve",
    [
        [(10, 0.3), (20, 0.3), (50, 0.3), (100, 0.3)],
        [(10, 0.4), (20, 0.3), (50, 0.2)],
        [(n, 1 - 0.9 / n**0.1) for n in (10, 20, 50)],
        [(10, 0.3), (20, 0.5)],
        [],
    ],
    ids=["flat", "falling", "too far", "too few", "none"],
)
def test_a_course_that_does_not_get_there_is_not_reached(curve):
    found = prompts_needed(curve)
    assert (found.prompts, found.reached) == (None, "not reached")
