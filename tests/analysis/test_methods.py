"""Agreement of methods and the false-discovery view, against small sets worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from safeneuron.analysis.methods import Discoveries, agreements, discoveries, volcano
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.scores import Scores

WIDTHS = (4, 4)


def neurons(label: str, *flat: int) -> NeuronSet:
    return NeuronSet(torch.tensor(flat, dtype=torch.int64), WIDTHS, "f", label)


def scores(q: list[float]) -> Scores:
    d = torch.arange(8, dtype=torch.float64)
    return Scores(d, -d, d, WIDTHS, "f", t=d, q=torch.tensor(q, dtype=torch.float64))


def test_agreement_by_hand():
    first, *_ = found = agreements([neurons("ES", 0, 1, 4), neurons("SAS", 1, 2, 4, 5), neurons("probe")])
    assert [(one.first, one.second) for one in found] == [("ES", "SAS"), ("ES", "probe"), ("SAS", "probe")]
    assert (first.first_size, first.second_size, first.both) == (3, 4, 2)
    assert first.layers == [1, 1]
    assert first.chance == pytest.approx(2 * 2 / 4 + 1 * 2 / 4)
    assert first.jaccard == pytest.approx(2 / 5)


def test_discoveries_by_hand():
    """Of neurons 0, 1 and 2, two survive; neuron 7 survives too and was not taken; q of exactly .05 does not."""
    found = discoveries(scores([0.01, 0.05, 0.04, 1, 1, 1, 1, 0.001]), neurons("FULL", 0, 1, 2))
    assert found == Discoveries("FULL", 3, 2, 3, 1, 0.05)
    assert math.isnan(discoveries(scores([1] * 8), neurons("FULL")).largest_q)


def test_a_volcano_shows_the_whole_set_and_some_of_the_rest():
    found = volcano(scores([0.01, 0.5, *[0.01] * 6]), neurons("FULL", 0, 1), most=3)
    assert len(found.neuron) == 5
    assert found.neuron.tolist()[:2] == [0, 1]
    assert found.kind.tolist() == [2, 1, 0, 0, 0]
    assert torch.equal(found.d, found.neuron.double())
    assert torch.equal(found.shift, -found.d)
    assert found.rows()[1] == {"d": 1.0, "shift": -1.0, "q": 0.5, "kind": 1, "neuron": 1}
