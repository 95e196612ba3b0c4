"""Held-out accuracy: 1 for classes that lie apart, one half for classes that do not differ. See also test_probing."""

from __future__ import annotations

import torch

from safeneuron.selection.linear_probe import held_out_accuracy, logistic_plane

SIGNS = torch.tensor([1.0, -1.0] * 20, dtype=torch.float64)


def test_the_plane_has_the_intercept_that_its_loss_wants():
    """A column that is the class, far from zero: the plane lies in the middle of the classes."""
    vectors = (7 + SIGNS)[:, None]
    plane = logistic_plane(vectors, SIGNS, 1e-3)
    assert abs(float(-plane.intercept / plane.weights[0]) - 7) < 0.01


def test_classes_that_lie_apart_are_told_apart_wherever_they_lie_and_however_large_they_are():
    torch.manual_seed(0)
    vectors = torch.randn(40, 300, dtype=torch.float64)
    vectors[:, 5] += 20 * SIGNS
    assert held_out_accuracy(vectors, SIGNS) == 1
    assert held_out_accuracy(1e4 * vectors + 3e5, SIGNS) == 1


def test_noise_is_not_told_apart_though_the_rows_learnt_from_could_be():
    torch.manual_seed(0)
    found = [held_out_accuracy(torch.randn(40, 300, dtype=torch.float64), SIGNS, seed=seed) for seed in range(20)]
    assert abs(sum(found) / 20 - 0.5) < 0.06
