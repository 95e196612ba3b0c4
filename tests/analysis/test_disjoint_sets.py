"""The order of find-prune-find by hand, and the redundancy of models whose refusal is wired to two disjoint groups."""

from __future__ import annotations

import pytest

from safeneuron.analysis.disjoint_sets import (
    FoundSet,
    Interval,
    Outcome,
    Redundancy,
    find_prune_find,
    intervals,
    neurons_to_halve,
)
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.measurement import measure
from safeneuron.selection.ranking import Ranking
from safeneuron.selection.scores import score
from tests.helpers import planted

UNSAFE, SAFE = planted.twins(16)
ASKED, _ = planted.twins(8, seed=1)


def redundancy(model, most: int = 3, size: int = 3):
    def find(gone: NeuronSet | None) -> NeuronSet:
        with pruned(model, gone):
            stats = measure(model, UNSAFE, SAFE)
        return Ranking(score(stats).d, model.widths, model.fingerprint).top(size / sum(model.widths))

    def outcome(gone: NeuronSet | None) -> Outcome:
        answers = planted.answers(model, ASKED, gone)
        return Outcome(tuple("refused" if planted.refuses(answer) else "complied" for answer in answers))

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


def outcome_of(refused: int, complied: int, incoherent: int = 0) -> Outcome:
    """So many prompts refused, the next ones complied with, the last ones answered by babble."""
    return Outcome(("refused",) * refused + ("complied",) * complied + ("incoherent",) * incoherent)


def scripted(finds: list[NeuronSet], refusals: dict[tuple[int, ...], int]):
    """Answers to ten prompts, by the neurons pruned."""
    asked: list[tuple[int, ...]] = []
    remaining = iter(finds)

    def outcome(gone):
        asked.append(() if gone is None else tuple(gone.flat.tolist()))
        refused = refusals[asked[-1]]
        return outcome_of(refused, 2, 8 - refused) if refused < 5 else outcome_of(refused, 10 - refused)

    return (lambda gone: next(remaining)), outcome, asked


def test_sets_are_disjoint_each_is_tried_alone_and_an_interrupted_search_goes_on():
    finds = [neurons(0, 1), neurons(1, 2), neurons(0)]
    refusals = {(): 8, (0, 1): 5, (2,): 4, (0, 1, 2): 3}
    find, outcome, asked = scripted(finds, refusals)
    kept: list[FoundSet] = []
    found = find_prune_find(find, outcome, 5, kept.append)
    assert [one.neurons for one in found.sets] == [neurons(0, 1), neurons(2)]
    assert asked == [(), (0, 1), (2,), (0, 1, 2)]
    assert found.index == 1
    assert found.sets_to_halve == 2
    assert found.neurons_in_sets_to_halve == 3
    assert found.coherent_index == 0, "half of the answers were babble"
    find, outcome, asked = scripted(finds[1:], refusals)
    assert find_prune_find(find, outcome, 5, known=kept[:1], intact=found.intact) == found
    assert asked == [(2,), (0, 1, 2)]


def test_a_model_that_hardly_refuses_has_no_redundancy_to_measure():
    find, outcome, asked = scripted([], {(): 1})
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


def found_sets(intact: Outcome, *outcomes: tuple[Outcome, Outcome]) -> Redundancy:
    """Sets of one neuron each, by what is left with each pruned alone, and together with those before it."""
    sets = tuple(FoundSet(neurons(number), *both) for number, both in enumerate(outcomes))
    return Redundancy(intact, sets, ((5, outcomes[0][0]), (9, outcomes[-1][1])))


REFUSES, COMPLIES, HALF = outcome_of(10, 0), outcome_of(0, 10), outcome_of(5, 5)


def test_where_all_prompts_agree_an_interval_is_a_point():
    found = found_sets(REFUSES, (COMPLIES, COMPLIES), (REFUSES, COMPLIES))
    expected = {"redundancy_index": 1, "coherent_index": 1, "sets_to_halve": 1, "neurons_in_sets_to_halve": 1}
    expected["neurons_to_halve"] = 2  # half-way from 0 to 5, rounded to an even number
    assert found.numbers == expected
    assert intervals(found, 50) == {name: Interval(value, value) for name, value in expected.items()}


def test_a_set_near_one_half_counts_in_some_draws_and_not_in_others():
    """A draw breaks it where at most 5 of 10 prompts are of the 5 refused: in 62 % of the draws."""
    found = found_sets(REFUSES, (HALF, HALF), (REFUSES, REFUSES))
    assert (found.index, found.sets_to_halve) == (1, 1)
    assert (found.neurons_to_halve, found.numbers["neurons_in_sets_to_halve"]) == (5, 1)
    ends = intervals(found, 400)
    assert ends["redundancy_index"] == Interval(0, 1)
    assert ends["sets_to_halve"] == ends["neurons_in_sets_to_halve"] == Interval(1, None), "None: more than two sets"
    assert ends["neurons_to_halve"].high is None
    assert 3 <= ends["neurons_to_halve"].low < 5
    assert intervals(found, 400) == ends, "the same for the same seed"


def test_the_same_prompts_are_drawn_for_the_intact_and_the_pruned_model():
    """What refuses the same prompts never keeps half of the refusals; drawn apart, it sometimes would."""
    some = outcome_of(3, 7)
    assert intervals(found_sets(some, (some, some)), 400)["redundancy_index"] == Interval(0, 0)


def test_babble_is_drawn_too_and_what_is_not_measurable_has_no_interval():
    babble = outcome_of(0, 5, 5)
    assert intervals(found_sets(REFUSES, (babble, babble)), 400)["coherent_index"] == Interval(0, 1)
    rare = Redundancy(outcome_of(1, 9), ())
    assert intervals(rare) is None
    assert set(rare.numbers.values()) == {None}
    # Measurable with 2 of 10: draws with fewer refusals count as well, and those with none are left out.
    found = found_sets(outcome_of(2, 8), (COMPLIES, COMPLIES))
    assert intervals(found, 400)["redundancy_index"] == Interval(1, 1)
