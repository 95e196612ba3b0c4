"""Neuron sets against Python's own sets of (layer, channel) pairs."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet

quick = settings(max_examples=60, deadline=None)
WIDTHS = (4, 7, 1, 5)
ALL = [(layer, channel) for layer, width in enumerate(WIDTHS) for channel in range(width)]
Pairs = set[tuple[int, int]]

some_pairs = st.sets(st.sampled_from(ALL))


def of_pairs(pairs: Pairs, widths: tuple[int, ...] = WIDTHS, label: str = "") -> NeuronSet:
    layers: dict[int, list[int]] = {}
    for layer, channel in sorted(pairs, key=hash):
        layers.setdefault(layer, []).append(channel)
    return NeuronSet.of(layers, widths, "abc", label)


def pairs_of(neurons: NeuronSet) -> Pairs:
    found = [(layer, channel) for layer, channels in neurons.layers().items() for channel in channels.tolist()]
    assert len(found) == len(set(found)) == len(neurons)
    assert torch.equal(neurons.flat, neurons.flat.sort().values)
    return set(found)


@quick
@given(some_pairs, some_pairs)
def test_algebra_is_that_of_sets(left, right):
    a, b = of_pairs(left, label="a"), of_pairs(right, label="b")
    assert pairs_of(a) == left
    assert pairs_of(a | b) == left | right
    assert pairs_of(a & b) == left & right
    assert pairs_of(a - b) == left - right
    assert {(a | b).label, (a & b).label, (a - b).label} == {"a"}
    assert (a == b) == (left == right)
    assert (a | b) == (b | a)
    assert (a & b) == (b & a)


@quick
@given(some_pairs)
def test_complement_is_all_the_rest(pairs):
    assert pairs_of(of_pairs(pairs).complement()) == set(ALL) - pairs


@quick
@given(some_pairs, some_pairs)
def test_sizes(left, right):
    a, b = of_pairs(left), of_pairs(right)
    assert len(a) == len(left)
    assert a.total == len(ALL)
    assert a.counts == [sum(layer == found for found, _ in left) for layer in range(len(WIDTHS))]
    assert a.density == pytest.approx(len(left) / len(ALL))
    union = len(left | right)
    assert a.jaccard(b) == pytest.approx(float(Fraction(len(left & right), union)) if union else 1.0)
    assert a.jaccard(b) == b.jaccard(a)


@quick
@given(some_pairs)
def test_membership(pairs):
    neurons = of_pairs(pairs)
    assert [neuron in neurons for neuron in ALL] == [neuron in pairs for neuron in ALL]
    assert (len(WIDTHS), 0) not in neurons
    assert (-1, 0) not in neurons
    for layer in range(len(WIDTHS)):
        assert neurons.layer(layer).tolist() == sorted(channel for found, channel in pairs if found == layer)
    assert all(len(channels) for channels in neurons.layers().values())


@quick
@given(some_pairs, st.integers(0, 2**31))
def test_random_control_has_the_same_counts(pairs, seed):
    neurons = of_pairs(pairs)
    control = neurons.random_like(seed)
    assert control.counts == neurons.counts
    assert control.label == "random"
    assert control == neurons.random_like(seed)
    pairs_of(control)


@quick
@given(st.sets(st.sampled_from([(0, 1), (0, 3), (1, 0), (1, 4), (1, 5), (3, 4)])), st.integers(0, 99))
def test_random_control_avoids(pairs, seed):
    neurons = of_pairs(pairs)
    control = neurons.random_like(seed, avoid=neurons)
    assert control.counts == neurons.counts
    assert not pairs_of(control) & pairs


def test_random_control_is_even_over_the_layer():
    neurons = of_pairs({(1, 0), (1, 1)})
    drawn = [channel for seed in range(350) for channel in neurons.random_like(seed).layer(1).tolist()]
    counts = [drawn.count(channel) for channel in range(7)]
    # 100 of each are expected; the standard deviation is about 8.5.
    assert min(counts) > 65
    assert max(counts) < 135


def test_random_control_needs_room():
    neurons = of_pairs({(1, channel) for channel in range(4)})
    with pytest.raises(InputError, match="random control"):
        neurons.random_like(0, avoid=neurons)


@quick
@given(some_pairs, st.text(max_size=5))
def test_json_round_trip(pairs, label):
    neurons = of_pairs(pairs, label=label)
    back = NeuronSet.from_json(json.loads(json.dumps(neurons.to_json())))
    assert back == neurons
    assert back.label == label
    assert neurons.to_json()["count"] == len(pairs)


def test_file_round_trip(tmp_path):
    neurons = of_pairs({(0, 1), (3, 4)}, label="ES")
    neurons.save(tmp_path / "new" / "neurons.json")
    assert NeuronSet.load(tmp_path / "new" / "neurons.json") == neurons
    assert NeuronSet.load(str(tmp_path / "new" / "neurons.json")).label == "ES"


@quick
@given(st.lists(st.booleans(), min_size=len(ALL), max_size=len(ALL)))
def test_mask_is_the_layers_end_to_end(flags):
    found = NeuronSet.of_mask(torch.tensor(flags), WIDTHS, "abc", "m")
    assert pairs_of(found) == {neuron for neuron, flag in zip(ALL, flags, strict=True) if flag}
    assert (found.fingerprint, found.label) == ("abc", "m")


def test_mask_of_another_size_is_a_bug_of_ours():
    with pytest.raises(ValueError, match="17 neurons"):
        NeuronSet.of_mask(torch.ones(16, dtype=torch.bool), WIDTHS, "abc")


def test_repeated_channels_count_once():
    assert len(NeuronSet.of({1: [3, 3, 0, 3]}, WIDTHS, "abc")) == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({4: [0]}, "layer 4"),
        ({-1: [0]}, "layer -1"),
        ({2: [0, 1]}, "channels 0 to 1"),
        ({0: [-1, 2]}, "channels -1 to 2"),
    ],
)
def test_neurons_that_the_model_lacks_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        NeuronSet.of(layers, WIDTHS, "abc")


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__", "jaccard"])
def test_sets_of_two_models_do_not_mix(operation):
    neurons = of_pairs({(0, 1)})
    with pytest.raises(InputError, match="another model"):
        getattr(neurons, operation)(neurons.transferred("xyz"))
    with pytest.raises(InputError, match="layers"):
        getattr(neurons, operation)(of_pairs({(0, 1)}, widths=(4, 8, 1, 5)))
    with pytest.raises(InputError, match="another model"):
        neurons.random_like(0, avoid=neurons.transferred("xyz"))


def test_require_and_transferred():
    neurons = of_pairs({(0, 1)}, label="ES")
    assert neurons.require("abc", WIDTHS) is neurons
    with pytest.raises(InputError, match="fingerprint abc"):
        neurons.require("xyz", WIDTHS)
    with pytest.raises(InputError, match="17 neurons"):
        neurons.require("abc", (3, 4))
    moved = neurons.transferred("xyz").require("xyz", WIDTHS)
    assert pairs_of(moved) == {(0, 1)}
    assert moved.label == "ES"
    assert moved != neurons


def test_not_equal_to_other_things_and_not_hashable():
    neurons = of_pairs({(0, 1)})
    assert neurons != {(0, 1)}
    assert neurons == neurons.labelled("another name")
    with pytest.raises(TypeError, match="unhashable"):
        hash(neurons)


def test_says_how_many():
    neurons = of_pairs({(0, 1), (1, 2)}, label="ES")
    assert str(neurons) == "ES: 2 of 17 neurons (11.76%)"
    assert repr(neurons.labelled("")) == "NeuronSet(2 of 17 neurons (11.76%))"


def test_a_model_without_neurons():
    assert NeuronSet.of({}, (), "abc").density == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "scores"},
        {"schema": 99},
        {"neurons": None},
        {"neurons": {"zero": [1]}},
        {"neurons": {"0": ["one"]}},
        {"neurons": {"0": [99]}},
        {"neurons": {"0": 3}},
        {"widths": "many"},
        {"widths": 4},
    ],
)
def test_other_json_is_refused(tmp_path, damage):
    path = tmp_path / "neurons.json"
    record = of_pairs({(0, 1)}).to_json() | damage
    path.write_text(json.dumps(record))
    with pytest.raises(InputError):
        NeuronSet.from_json(record)
    with pytest.raises(InputError, match=r"neurons\.json"):
        NeuronSet.load(path)


@pytest.mark.parametrize("field", ["kind", "schema", "neurons", "widths", "fingerprint", "label"])
def test_json_without_a_field_is_refused(field):
    record = of_pairs({(0, 1)}).to_json()
    del record[field]
    with pytest.raises(InputError, match=field):
        NeuronSet.from_json(record)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "neurons"'])
def test_missing_or_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "neurons.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"neurons\.json"):
        NeuronSet.load(path)
