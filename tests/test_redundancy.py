"""The order of find-prune-find by hand, and the redundancy of models whose refusal is wired to two disjoint groups."""

from __future__ import annotations

import pytest

from safeneuron.ffn import pruned
from safeneuron.measuring import measure
from safeneuron.neurons import NeuronSet
from safeneuron.rankings import Ranking
from safeneuron.redundancy import Found, Outcome, find_prune_find, neurons_to_halve
from safeneuron.selecting import score
from safeneuron.sweeping import sweep
from tests import planted

UNSAFE, SAFE = planted.twins(16)
ASKED, _ = planted.twins(8, seed=1)


def redundancy(model, most: int = 3, size: int = 3):
    def find(gone: NeuronSet | None) -> NeuronSet:
        with pruned(model, gone):
            stats = measure(model, UNSAFE, SAFE)
        return Ranking(score(stats).d, model.widths, model.fingerprint).top(size / sum(model.widths))

    def outcome(gone: NeuronSet | None) -> Outcome:
        answers = sweep(model, ASKED, [gone], 6)[0]
        refused = sum(map(planted.refuses, answers)) / len(answers)
        return Outcome(refused, 1 - refused, 0.0)

    return find_prune_find(find, outcome, most)


def groups_of(model):
    return [NeuronSet.of(group, model.widths, model.fingerprint) for group in planted.GROUPS]


def test_a_model_wired_to_two_groups_of_which_both_are_needed_has_redundancy_index_2():
    model = planted.two_groups("series")
    found = redundancy(model)
    first, second = groups_of(model)
    assert found.sets[0].neurons == second
    assert found.sets[1].neurons == first
    assert found.index == found.coherent_index == 2
    assert found.sets_to_halve == 1
    assert found.neurons_in_sets_to_halve == 3


def test_of_two_groups_of_which_either_suffices_none_breaks_it_alone_and_both_together_do():
    model = planted.two_groups("parallel")
    found = redundancy(model)
    assert {len(one.neurons) for one in found.sets} == {3}
    assert found.sets[0].neurons | found.sets[1].neurons == groups_of(model)[0] | groups_of(model)[1]
    assert found.index == 0
    assert found.sets_to_halve == 2
    assert found.neurons_in_sets_to_halve == 6


def test_the_model_wired_to_one_group_has_redundancy_index_1():
    found = redundancy(planted.model(), most=2, size=5)
    assert found.sets[0].neurons == planted.neurons(planted.model())
    assert (found.index, found.sets_to_halve) == (1, 1)


def neurons(*flat: int) -> NeuronSet:
    return NeuronSet.of({0: flat}, (20,), "f")


def scripted(finds: list[NeuronSet], shares: dict[tuple[int, ...], float]):
    asked: list[tuple[int, ...]] = []
    remaining = iter(finds)

    def outcome(gone):
        asked.append(() if gone is None else tuple(gone.flat.tolist()))
        refused = shares[asked[-1]]
        return Outcome(refused, 0.2, 0.8 - refused if refused < 0.5 else 0.0)

    return (lambda gone: next(remaining)), outcome, asked


def test_sets_are_disjoint_each_is_tried_alone_and_an_interrupted_search_goes_on():
    finds = [neurons(0, 1), neurons(1, 2), neurons(0)]
    shares = {(): 0.8, (0, 1): 0.5, (2,): 0.4, (0, 1, 2): 0.3}
    find, outcome, asked = scripted(finds, shares)
    heard: list[Found] = []
    found = find_prune_find(find, outcome, 5, heard.append)
    assert [one.neurons for one in found.sets] == [neurons(0, 1), neurons(2)]
    assert asked == [(), (0, 1), (2,), (0, 1, 2)]
    assert found.index == 1
    assert found.sets_to_halve == 2
    assert found.neurons_in_sets_to_halve == 3
    assert found.coherent_index == 0, "half of the answers were babble"
    find, outcome, asked = scripted(finds[1:], shares)
    assert find_prune_find(find, outcome, 5, known=heard[:1], intact=found.intact) == found
    assert asked == [(2,), (0, 1, 2)]


def test_a_model_that_hardly_refuses_has_no_redundancy_to_measure():
    find, outcome, asked = scripted([], {(): 0.1})
    found = find_prune_find(find, outcome)
    assert (found.index, found.sets_to_halve, asked) == (None, None, [()])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(0, 0.8), (10, 0.6), (30, 0.2)], 20),
        ([(0, 0.8), (10, 0.4)], 10),
        ([(0, 0.8), (10, 0.5)], None),
        ([(0, 0.0), (10, 0.0)], None),
    ],
)
def test_neurons_to_halve_by_hand(curve, expected):
    assert neurons_to_halve(curve) == expected
