"""Rankings: sets of exact sizes, thresholds, layers, set differences, files; against sorting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.ranking import Ranking

WIDTHS = (4, 6, 10)


def ranking(values: list[float], label: str = "test", fingerprint: str = "f") -> Ranking:
    return Ranking(torch.tensor(values, dtype=torch.float64), WIDTHS, fingerprint, label)


SCORES = st.lists(st.integers(-5, 5).map(float), min_size=20, max_size=20).map(ranking)


def best(values: torch.Tensor, count: int, avoid: set[int] = frozenset()) -> list[int]:
    order = sorted(set(range(len(values))) - avoid, key=lambda place: (-values[place].item(), place))
    return sorted(order[:count])


@settings(max_examples=60, deadline=None)
@given(SCORES, st.sampled_from([0.001, 0.1, 0.26, 0.5, 0.6]), st.sets(st.integers(0, 19), max_size=6))
def test_top_is_the_head_of_the_sorted_list(scores, density, avoided):
    avoid = NeuronSet(torch.tensor(sorted(avoided), dtype=torch.int64), WIDTHS, "f")
    found = scores.top(density, avoid)
    assert found.flat.tolist() == best(scores.values, max(1, round(density * 20)), avoided)
    assert found.label == "test"


@settings(max_examples=40, deadline=None)
@given(SCORES, st.sampled_from([0.01, 0.25, 0.5]))
def test_top_of_layers_is_the_top_of_each(scores, share):
    found = scores.top_of_layers(share)
    for layer, values in enumerate(scores.values.split(WIDTHS)):
        assert found.layer(layer).tolist() == best(values, max(1, round(share * len(values))))


@settings(max_examples=40, deadline=None)
@given(SCORES, SCORES)
def test_a_difference_of_tops_is_what_matters_for_one_alone(safety, utility):
    found = safety.top_of_layers(0.5) - utility.top_of_layers(0.25)
    for layer, (own, other) in enumerate(zip(safety.values.split(WIDTHS), utility.values.split(WIDTHS), strict=True)):
        expected = set(best(own, round(0.5 * len(own)))) - set(best(other, max(1, round(0.25 * len(other)))))
        assert set(found.layer(layer).tolist()) == expected


@given(SCORES, st.integers(-5, 5))
def test_above_is_strict(scores, threshold):
    assert scores.above(threshold).flat.tolist() == [
        place for place, value in enumerate(scores.values.tolist()) if value > threshold
    ]


def test_larger_shares_hold_the_smaller_ones_and_the_label():
    scores = ranking([float(number) for number in range(20)], "SNIP")
    found = [scores.top(share) for share in (0.1, 0.5)]
    assert [len(each) for each in found] == [2, 10]
    assert len(found[0] - found[1]) == 0
    assert [each.label for each in found] == ["SNIP", "SNIP"]


def test_file_and_back(tmp_path):
    scores = ranking([number / 7 for number in range(20)])
    scores.save(tmp_path / "ranking.safetensors")
    again = Ranking.load(tmp_path / "ranking.safetensors")
    assert torch.equal(again.values, scores.values)
    assert (again.widths, again.fingerprint, again.label) == (WIDTHS, "f", "test")
    with pytest.raises(InputError, match="does not exist"):
        Ranking.load(tmp_path / "nothing.safetensors")


def test_mistakes():
    scores = ranking([0.0] * 20)
    for density in (0, 1, -0.1):
        with pytest.raises(InputError, match="between 0 and 1"):
            scores.top(density)
    everything = NeuronSet(torch.arange(15), WIDTHS, "f")
    with pytest.raises(InputError, match="should give 10 of 20 neurons, but only 5 are not avoided"):
        scores.top(0.5, everything)
    with pytest.raises(InputError, match="another model"):
        _ = scores.top_of_layers(0.5) - ranking([0.0] * 20, fingerprint="other").top_of_layers(0.5)
