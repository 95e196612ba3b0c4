"""Density over relative depth and thirds, against small sets worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from safeneuron.analysis.depth import density_over_depth, layer_densities, layer_depths, mean_depth, thirds
from safeneuron.neurons.neuron_set import NeuronSet

SET = NeuronSet.of({0: [0], 2: [0, 1, 2]}, (4, 4, 4, 8), "f")


def test_layers_by_hand():
    assert layer_depths(4) == [0.125, 0.375, 0.625, 0.875]
    assert layer_densities(SET) == [0.25, 0, 0.75, 0]


def test_density_over_depth_by_hand():
    """Two parts: layers 0 and 1 with 1 of 8, layers 2 and 3 with 3 of 12. Eight parts: each layer twice."""
    assert density_over_depth(SET, 2) == pytest.approx([1 / 8, 3 / 12])
    assert density_over_depth(SET, 8) == pytest.approx([0.25, 0.25, 0, 0, 0.75, 0.75, 0, 0])


def test_a_layer_between_two_parts_counts_in_both():
    """Three parts of four layers: the second holds two thirds of layer 1 and of layer 2."""
    assert density_over_depth(SET, 3)[1] == pytest.approx((3 * 2 / 3) / (4 * 2 / 3 + 4 * 2 / 3))


def test_thirds_by_hand_and_in_all_one():
    """Layer 2 reaches from 2 to 3; the border of the last third is at 8/3: two thirds of it are in the middle."""
    assert thirds(SET) == pytest.approx((1 / 4, 3 * (2 / 3) / 4, 3 * (1 / 3) / 4))
    assert sum(thirds(SET)) == pytest.approx(1)
    assert thirds(SET - SET) == (0, 0, 0)


def test_mean_depth():
    even = NeuronSet(torch.arange(20), SET.widths, "f")
    found = mean_depth([SET, even, SET - SET])
    assert found[0] == pytest.approx((0.125 + 3 * 0.625) / 4)
    assert found[1] == pytest.approx((4 * (0.125 + 0.375 + 0.625) + 8 * 0.875) / 20)
    assert math.isnan(found[2])
