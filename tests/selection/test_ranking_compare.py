"""Comparisons of neuron sets: overlap against plain set operations, chance by simulation, ranks against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.ranking import Ranking, compare, expected_jaccard, expected_overlap, rank_correlation

WIDTHS = (4, 6, 10)
FLAT = st.sets(st.integers(0, 19))


def neurons(flat: set[int], fingerprint: str = "f", widths: tuple[int, ...] = WIDTHS) -> NeuronSet:
    return NeuronSet(torch.tensor(sorted(flat), dtype=torch.int64), widths, fingerprint)


@settings(max_examples=60, deadline=None)
@given(FLAT, FLAT)
def test_overlap_is_that_of_sets(first, second):
    found = compare(neurons(first), neurons(second))
    assert found.both == len(first & second)
    assert found.jaccard == (len(first & second) / len(first | second) if first | second else 1.0)
    for at, (low, high) in zip(found.layers, ((0, 4), (4, 10), (10, 20)), strict=True):
        own, other = ({one for one in each if low <= one < high} for each in (first, second))
        assert (at.first, at.second, at.both) == (len(own), len(other), len(own & other))
        assert at.jaccard == (len(own & other) / len(own | other) if own | other else 1.0)
    assert found.correlation is None


def test_chance_is_what_random_sets_share():
    first, second = neurons({0, 1, *range(4, 12)}), neurons({1, *range(6, 18)})
    found = compare(first, second)
    shared = [len(first.random_like(2 * seed) & second.random_like(2 * seed + 1)) for seed in range(400)]
    assert found.chance == pytest.approx(sum(shared) / len(shared), abs=0.3)


def test_rank_correlation_is_spearmans():
    values = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (Ranking(row, WIDTHS, "f") for row in values)
    expected = spearmanr(*values.numpy()).statistic
    assert rank_correlation(*values) == pytest.approx(expected)
    assert compare(first.top(0.2), second.top(0.2), (first, second)).correlation == pytest.approx(expected)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 400])) == pytest.approx(1)
    constant = Ranking(torch.zeros(20).double(), WIDTHS, "f")
    assert math.isnan(rank_correlation(first.values, constant.values))
    assert compare(first.top(0.2), second.top(0.2), (first, constant)).correlation is None


def test_the_expected_jaccard_is_the_expected_overlap_over_the_union_that_is_left():
    first, second = neurons({0, 1, 19}), neurons({2, 3, 18})
    shared = sum(one * other / width for one, other, width in zip(first.counts, second.counts, WIDTHS, strict=True))
    assert expected_overlap(first, second) == pytest.approx(shared)
    assert expected_jaccard(first, second) == pytest.approx(shared / (6 - shared))
    assert expected_jaccard(neurons(set()), neurons(set())) == 1


def test_in_words():
    said = compare(neurons({0, 5, 6}), neurons({5, 6, 7})).lines()
    assert "in both 2; by chance" in said[2]
    assert "Jaccard 0.500" in said[2]
    assert said[-1].split() == ["1", "2", "3", "2", "0.667"]
    assert [line.split()[0] for line in said[4:]] == ["layer", "0", "1"]


def test_sets_of_different_models():
    with pytest.raises(InputError, match=r"different models of one shape \(fingerprints f and g\)"):
        compare(neurons({1}), neurons({1}, "g"))
    with pytest.raises(InputError, match="3 layers and 20 neurons, the second of one with 1 layers and 20 neurons"):
        compare(neurons({1}), neurons({1}, widths=(20,)))
    with pytest.raises(InputError, match="different models"):
        compare(
            neurons({1}), neurons({1}), (Ranking(torch.zeros(20), WIDTHS, "f"), Ranking(torch.zeros(20), WIDTHS, "g"))
        )
