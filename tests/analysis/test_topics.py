"""Roles and overlaps against sets worked out by hand and by enumeration; the baseline against its expectation."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import combinations

import numpy as np
import pytest
import torch

from safeneuron.analysis.topics import (
    Roles,
    chance_overlaps,
    core_of,
    expected_core,
    overlaps,
    patterns,
    roles,
    sets_of,
)
from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, Moments, TopicStats
from safeneuron.selection.scores import SelectionSettings, select

WIDTHS = (6, 4)


def neurons(*flat: int, widths=WIDTHS) -> NeuronSet:
    return NeuronSet(torch.tensor(sorted(flat), dtype=torch.int64), widths, "f")


A, B, C = neurons(0, 1, 2, 6), neurons(0, 1, 3), neurons(0, 4, 6, 7)


def test_roles_and_patterns_by_hand():
    """Neuron 0 is in all; 1 (A, B) and 6 (A, C) in two; 2, 3, 4, 7 in one."""
    assert patterns([A, B, C]).tolist() == [7, 3, 1, 2, 4, 0, 5, 4, 0, 0]
    assert roles([A, B, C]) == Roles([1, 0], [1, 1], [3, 1])
    assert core_of([A, B, C]) == neurons(0)
    assert roles([A, B]) == Roles([2, 0], [0, 0], [2, 1])


def test_overlaps_by_hand():
    """A and B: 2 of 5; A and C: 2 of 6; B and C: 1 of 6. All three: 1 of 7, mean size 11 / 3."""
    two, three = overlaps([A, B, C])
    assert two.topics == 2
    assert two.jaccard == pytest.approx((2 / 5 + 2 / 6 + 1 / 6) / 3)
    assert two.shared == pytest.approx((2 / 3.5 + 2 / 4 + 1 / 3.5) / 3)
    assert astuple(three) == (3, pytest.approx(1 / 7), pytest.approx(3 / 11))


def test_counting_agrees_with_enumerating_sets():
    torch.manual_seed(0)
    sets = [neurons(*torch.randperm(40)[: 10 + 2 * k].tolist(), widths=(40,)) for k in range(7)]
    members = [set(one.flat.tolist()) for one in sets]
    for found in overlaps(sets):
        chosen = list(combinations(members, found.topics))
        jaccard = [len(set.intersection(*some)) / len(set.union(*some)) for some in chosen]
        shared = [len(set.intersection(*some)) / np.mean([len(one) for one in some]) for some in chosen]
        assert len(chosen) == math.comb(7, found.topics)
        assert astuple(found)[1:] == (pytest.approx(np.mean(jaccard)), pytest.approx(np.mean(shared)))


def test_empty_sets_count_in_no_mean():
    empty = neurons()
    assert overlaps([A, empty, empty])[0].jaccard == 0
    assert all(math.isnan(found.jaccard) for found in overlaps([empty, empty]))


def test_the_permutation_baseline_is_right_in_expectation():
    """Of two random sets with 3 and 2 of 6, 1 and 2 of 4, 3 * 2 / 6 + 1 * 2 / 4 = 1.5 are expected in both."""
    first, second = neurons(0, 1, 2, 6), neurons(3, 4, 7, 8)
    assert expected_core([first, second]) == pytest.approx(1.5)
    (found,) = chance_overlaps([first, second], draws=3000)
    assert found.shared == pytest.approx(1.5 / 4, abs=0.02)
    assert found.shared_low <= found.shared <= found.shared_high
    assert overlaps([first, second])[0].jaccard == 0


def test_the_baseline_keeps_the_sizes_of_the_layers():
    """Sets that fill their layers cannot but overlap there."""
    full = neurons(0, 1, 2, 3, 4, 5)
    (overlap,) = chance_overlaps([full, full], draws=5)
    assert astuple(overlap)[1:] == (1, 1, 1, 1, 1, 1)


def test_sets_of_topics_are_those_that_each_topic_alone_would_give():
    torch.manual_seed(0)
    one, other, safe = (torch.randn(20, 10, dtype=torch.float64) for _ in range(3))
    one[:, 3] += 5
    other[:, 8] += 5
    weights = torch.eye(2, dtype=torch.float64).repeat_interleave(20, dim=0)
    groups = GroupMoments.of(torch.cat([one, other]), weights)
    stats = TopicStats(("one", "other"), groups, Moments.of(safe), WIDTHS, "f", "last")
    found = sets_of(stats, SelectionSettings(density=0.2))
    for vectors, neurons_found in zip((one, other), found, strict=True):
        alone = ActivationStats(Moments.of(vectors), stats.safe, WIDTHS, "f", "last")
        assert neurons_found == select(alone, density=0.2)
    assert 3 in found[0].flat
    assert 8 in found[1].flat
    assert [neurons_found.label for neurons_found in found] == ["one", "other"]


def test_too_few_and_too_many_topics_are_refused():
    for count in (1, 17):
        with pytest.raises(InputError, match=f"2 to 16 topics, found {count}"):
            overlaps([A] * count)
    with pytest.raises(InputError, match="of a model with"):
        overlaps([A, neurons(0, widths=(10,))])
