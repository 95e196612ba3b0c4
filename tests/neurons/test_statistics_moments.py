"""Streaming moments against numpy on the whole sample at once, in any split and order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from safeneuron.neurons.statistics import Moments

quick = settings(max_examples=60, deadline=None)


@st.composite
def split_samples(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """A sample ``[vector, neuron]`` around some offset, and where it is cut into parts (empty parts included)."""
    shape = (draw(st.integers(2, 12)), draw(st.integers(1, 3)))
    values = draw(arrays(np.float64, shape, elements=st.floats(-100, 100)))
    cuts = sorted(draw(st.lists(st.integers(0, shape[0]), max_size=4)))
    return values + draw(st.sampled_from([0.0, 1e6, -1e6])), cuts


def of_parts(parts: list[np.ndarray]) -> Moments:
    merged = Moments.zero(parts[0].shape[1:])
    for part in parts:
        merged = merged.merge(Moments.of(torch.from_numpy(part)) if len(part) else Moments.zero(part.shape[1:]))
    return merged


def assert_moments(moments: Moments, values: np.ndarray) -> None:
    assert moments.count == len(values)
    offset = np.abs(values).max() + 1
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(axis=0), rtol=0, atol=1e-14 * offset)
    # numpy's own two-pass variance carries an error of this order, too.
    np.testing.assert_allclose(
        moments.variance.numpy(), values.var(axis=0, ddof=1), rtol=1e-9, atol=(1e-13 * offset) ** 2 + 1e-12
    )


@quick
@given(split_samples(), st.randoms(use_true_random=False))
def test_any_split_in_any_order_is_the_whole(sample, random):
    values, cuts = sample
    parts = np.split(values, cuts)
    assert_moments(of_parts(parts), values)
    random.shuffle(parts)
    assert_moments(of_parts(parts), values)


@quick
@given(split_samples())
def test_merge_does_not_depend_on_the_grouping(sample):
    values, cuts = sample
    parts = [torch.from_numpy(part) for part in np.split(values, cuts) if len(part)]
    right = Moments.of(parts[-1])
    for part in reversed(parts[:-1]):
        right = Moments.of(part).merge(right)
    assert_moments(right, values)


def test_offset_does_not_change_the_variance():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 4))
    plain = of_parts(np.array_split(values, 20)).variance
    shifted = of_parts(np.array_split(values + 1e6, 20)).variance
    np.testing.assert_allclose(shifted.numpy(), plain.numpy(), rtol=1e-8)


def test_one_at_a_time_equals_all_at_once_in_half_precision():
    values = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    merged = Moments.zero((5,))
    for row in values:
        merged = merged.merge(Moments.of(row[None]))
    assert merged.mean.dtype == merged.m2.dtype == torch.float64
    assert_moments(merged, values.double().numpy())


def test_variance_is_never_negative_and_a_constant_has_none():
    constant = torch.full((1, 3), 0.1)
    merged = Moments.of(constant)
    for size in (1, 2, 5, 7):
        merged = merged.merge(Moments.of(constant.expand(size, 3)))
    assert merged.count == 16
    assert torch.equal(merged.variance, torch.zeros(3, dtype=torch.float64))
    noisy = torch.full((1000, 1), 1e8) + torch.tensor([0.0, 8.0]).repeat(500)[:, None]
    assert Moments.of(noisy).variance.item() == pytest.approx(16.0 * 1000 / 999)


def test_zero_is_neutral():
    some = Moments.of(torch.randn(3, 2))
    for merged in (some.merge(Moments.zero((2,))), Moments.zero((2,)).merge(some)):
        assert merged.count == 3
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.m2, some.m2)


@pytest.mark.parametrize("count", [0, 1])
def test_variance_needs_two_vectors(count):
    moments = Moments.of(torch.ones(1, 2)) if count else Moments.zero((2,))
    with pytest.raises(ValueError, match="at least two"):
        _ = moments.variance


def test_vectors_that_say_nothing_of_some_neurons_merge_as_exactly():
    vectors = torch.randn(9, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors[torch.rand(9, 40, generator=torch.Generator().manual_seed(4)) < 0.3] = torch.nan
    together = Moments.of(vectors[:4]).merge(Moments.of(vectors[4:5])).merge(Moments.of(vectors[5:]))
    whole = Moments.of(vectors)
    torch.testing.assert_close(together.mean, whole.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(together.m2, whole.m2, rtol=0, atol=1e-13)
    assert torch.equal(together.per_neuron, whole.per_neuron)
