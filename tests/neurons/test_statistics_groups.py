"""Moments of groups: each is what the group alone would have, however the prompts come, and weights are as told."""

from __future__ import annotations

import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.neurons.statistics import (
    GroupMoments,
    Moments,
    TopicStats,
    bootstrap_weights,
    label_weights,
    pair_weights,
)
from safeneuron.selection.measurement import measure, measure_groups
from tests.helpers import tiny


def test_a_group_has_the_moments_of_its_prompts_alone_each_as_often_as_it_counts():
    torch.manual_seed(0)
    vectors = torch.randn(7, 5, dtype=torch.float64) + 1000
    weights = torch.tensor([[1, 0, 2], [1, 0, 0], [0, 0, 1], [1, 0, 3], [0, 0, 0], [1, 0, 1], [0, 0, 1]])
    found = GroupMoments.zero(3, 5)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        found = found.merge(GroupMoments.of(vectors[rows], weights[rows]))
    for number in (0, 2):
        expected = Moments.of(vectors.repeat_interleave(weights[:, number], dim=0))
        got = found.group(number)
        assert got.count == expected.count
        torch.testing.assert_close(got.mean, expected.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(got.m2, expected.m2, rtol=1e-9, atol=1e-9)
    empty = found.group(1)
    assert empty.count == 0
    assert not empty.m2.any()


def test_one_pass_gives_what_measuring_each_category_gives():
    model = tiny.model()
    unsafe = [Prompt(text, category) for text, category in zip("abcdefgh", "xyxyxyxx", strict=True)]
    safe = [Prompt(text * 3) for text in "pqrs"]
    found = measure_groups(model, unsafe, label_weights([prompt.category for prompt in unsafe], ["x", "y"]))
    for number, name in enumerate("xy"):
        alone = measure(model, [prompt for prompt in unsafe if prompt.category == name], safe).unsafe
        assert found.group(number).count == alone.count
        torch.testing.assert_close(found.group(number).mean, alone.mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.group(number).m2, alone.m2, rtol=1e-5, atol=1e-8)


def test_weights_that_do_not_fit_the_prompts_are_refused():
    with pytest.raises(InputError, match="weights"):
        measure_groups(tiny.model(), [Prompt("a"), Prompt("b")], torch.ones(3, 1))
    with pytest.raises(InputError, match="subsets"):
        pair_weights(5, 3, 1, seed=0)


def test_weights_are_samples_and_pairs():
    samples = bootstrap_weights(50, 20, seed=1)
    assert samples.shape == (50, 20)
    assert bool((samples.sum(dim=0) == 50).all())
    assert samples.max() > 1
    assert torch.equal(samples, bootstrap_weights(50, 20, seed=1))
    pairs = pair_weights(9, 4, 3, seed=1)
    assert pairs.sum(dim=0).tolist() == [4] * 6
    assert bool((pairs[:, 0::2] + pairs[:, 1::2] <= 1).all())
    assert label_weights(["b", "", "a"], ["a", "b"]).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_statistics_by_topic_are_kept_exactly(tmp_path):
    torch.manual_seed(0)
    groups = GroupMoments.of(torch.randn(6, 4), torch.ones(6, 2))
    stats = TopicStats(("a", "b"), groups, Moments.of(torch.randn(3, 4)), (2, 2), "f", "last")
    stats.save(tmp_path / "topics.safetensors")
    back = TopicStats.load(tmp_path / "topics.safetensors")
    assert (back.topics, back.widths, back.fingerprint, back.pooling) == (("a", "b"), (2, 2), "f", "last")
    assert torch.equal(back.unsafe.m2, groups.m2)
    assert torch.equal(back.safe.mean, stats.safe.mean)
    assert back.unsafe.group(1).count == 6
