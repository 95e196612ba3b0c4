"""Comparing states: tests against their definitions, intervals by how often they hold the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.evaluation.rates import Rate, bootstrap_interval, corrected, mcnemar, paired_difference, paired_interval


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_sign_test(gained, lost):
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_holds_its_level_and_finds_a_difference():
    # Every split of 12 coins, weighed by its probability: under the null it is called significant in 5 % at most.
    weights = [math.comb(12, k) / 2**12 for k in range(13)]
    false = sum(weight for k, weight in enumerate(weights) if mcnemar(k, 12 - k) < 0.05)
    assert 0.01 < false <= 0.05
    assert mcnemar(12, 0) < 0.001
    assert mcnemar(5, 0) > 0.05, "five pairs can never be significant"


def test_a_comparison_counts_the_pairs():
    first = [True, True, False, False, False]
    second = [True, False, True, True, False]
    found = paired_difference(first, second)
    assert found is not None
    assert (found.n, found.gained, found.lost) == (5, 2, 1)
    assert (found.first_rate, found.second_rate) == (0.4, 0.6)
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
    assert found.p == found.p_corrected == mcnemar(2, 1)
    assert paired_difference([], []) is None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_swapping_the_states_turns_the_difference_round(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there is not None
    assert back is not None
    assert there.difference == -back.difference
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    assert there.p == back.p
    assert -1 <= there.low <= there.difference <= there.high <= 1
    assert there.low < there.high, "a few prompts are never certain"


def test_the_interval_of_independent_shares_is_that_of_their_wilson_intervals():
    # Shares of .5 and .5 without correlation: the bounds of Newcombe's square-and-add.
    low, high = paired_interval(25, 25, 25, 100)
    half = 0.5 - (0.5 + 1.959964**2 / 200 - 1.959964 * math.sqrt(0.25 / 100 + 1.959964**2 / 40000)) / (
        1 + 1.959964**2 / 100
    )
    assert (low, high) == pytest.approx((-math.sqrt(2) * half, math.sqrt(2) * half), abs=1e-6)
    # Where the states agree on most prompts, the same two shares tell more.
    narrow = paired_interval(45, 5, 5, 100)
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


@pytest.mark.parametrize(("both", "gained", "lost"), [(0.3, 0.2, 0.1), (0.02, 0.03, 0.01), (0.9, 0.05, 0.02)])
def test_the_interval_holds_the_truth_in_95_of_100_samples(both, gained, lost):
    n, draws = 60, 2000
    drawn = np.random.default_rng(0).multinomial(n, [both, gained, lost, 1 - both - gained - lost], size=draws)
    counts, repeats = np.unique(drawn[:, :3], axis=0, return_counts=True)
    inside = 0
    for (a, b, c), times in zip(counts.tolist(), repeats.tolist(), strict=True):
        low, high = paired_interval(a, b, c, n)
        inside += times * (low <= gained - lost <= high)
    # For rare outcomes it is wider than it need be.
    assert inside / draws > 0.93


def test_holm_by_hand():
    assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert corrected([0.9, 0.5]) == [1.0, 1.0]
    assert corrected([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_correction_keeps_the_order_and_never_lowers(p_values):
    found = corrected(p_values)
    assert all(p <= new <= 1 for p, new in zip(p_values, found, strict=True))
    for (p, new), (q, other) in itertools.combinations(zip(p_values, found, strict=True), 2):
        assert p == q or (p < q) == (new < other) or new == other


def test_the_bootstrap_knows_the_chance_of_seeds_and_of_prompts():
    draw = np.random.default_rng(1)
    prompts = np.repeat(draw.random((1, 80)) < 0.4, 3, axis=0).astype(float)
    seeds = np.repeat(np.array([[0.1], [0.5], [0.9]]), 80, axis=1)
    for values in (prompts, seeds):
        low, high = bootstrap_interval(values, draws=500)
        assert low < values.mean() < high
        assert bootstrap_interval(values, draws=500) == (low, high)
    # Three seeds that say the same of 80 prompts leave the chance of 80 prompts, not of 240.
    low, high = bootstrap_interval(prompts, draws=2000)
    assert high - low == pytest.approx(2 * 1.96 * prompts[0].std() / math.sqrt(80), rel=0.15)


def test_touching_intervals_overlap():
    left, right = Rate(1, 4, 0.25, 0.1, 0.4), Rate(2, 4, 0.5, 0.4, 0.6)
    assert left.compared_with(right) == right.compared_with(left) == "unclear"
    apart = Rate(2, 4, 0.5, 0.41, 0.6)
    assert (left.compared_with(apart), apart.compared_with(left)) == ("lower", "higher")
