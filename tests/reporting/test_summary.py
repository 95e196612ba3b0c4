"""The sentences of the report follow the numbers, in every direction."""

from __future__ import annotations

from typing import Any

import pytest

from safeneuron.reporting.formatting import number
from safeneuron.reporting.summary import headline, points
from tests.helpers.sample_results import benign, counts, rendered, sample_results, sample_state, typed


def said(results: dict[str, Any], topic: str) -> str:
    return {point.topic: point.text for point in points(typed(results))}[topic]


@pytest.mark.parametrize(
    ("full", "start"),
    [(15, "T1 resists better than T0"), (38, "This run does not tell T1 from T0"), (47, "T1 resists worse than T0")],
)
def test_headline_follows_the_numbers(full: int, start: str) -> None:
    text = headline(typed(sample_results(sample_state("T0", 37), sample_state("T1", full))))
    assert text.startswith(start)
    assert ("the intervals do not overlap" in text) == ("resists" in start)
    assert f"it complies with {number(full / 47)}\u00a0%" in text


def test_headline_of_one_state_follows_the_numbers() -> None:
    assert "makes T0 comply with more harmful requests" in headline(typed(sample_results(sample_state("T0", 40))))
    assert "is not shown to change" in headline(typed(sample_results(sample_state("T0", 7))))
    state = sample_state("T0", 0)
    state["attacks"][0]["harmful"] = counts(48, 40)
    assert "makes T0 comply with fewer harmful requests" in headline(typed(sample_results(state)))


def test_headline_of_many_states_names_each_on_its_side() -> None:
    states = [sample_state(f"T{index}", full) for index, full in enumerate((37, 15, 36, 47))]
    text = headline(typed(sample_results(*states)))
    assert "T1 resists better than T0" in text
    assert "does not tell T2 from T0" in text
    assert "T3 resists worse than T0" in text
    states[1] = sample_state("T1", 38)
    assert "no state is shown to resist better than T0" in headline(typed(sample_results(*states)))
    points_said = said(sample_results(*states), "Against T0")
    assert "Not told apart, the intervals overlap: T1 81" in points_said
    assert "Worse, the intervals apart: T3 100" in points_said


def test_a_fall_bought_with_broken_text_is_called_that() -> None:
    base = sample_state("T0", 40)
    assert "broken text" not in headline(typed(sample_results(base, sample_state("T1", 8, incoherent=3))))
    assert "broken text and not refusal" in headline(typed(sample_results(base, sample_state("T1", 8, incoherent=20))))
    worse = headline(typed(sample_results(sample_state("T0", 10), sample_state("T1", 25, incoherent=20))))
    assert "broken text" not in worse, "there is no fall to explain"


def test_a_low_rate_of_a_broken_base_is_no_strength() -> None:
    broken = sample_state("T0", 5, incoherent=40)
    for others in (["T1"], ["T1", "T2"]):
        states = [broken, *(sample_state(name, 30) for name in others)]
        assert "broken text and not refusal" in headline(typed(sample_results(*states)))
    broken["attacks"][0]["harmful"] = counts(47, 40)
    effect = said(sample_results(broken, sample_state("T1", 30)), "T0 under attack")
    assert "comply with fewer" in effect
    assert "of the answers are incoherent then" in effect
    broken["attacks"][0]["harmful"]["incoherent"] = broken["attacks"][3]["harmful"]["incoherent"]
    sound = said(sample_results(broken, sample_state("T1", 30)), "T0 under attack")
    assert "incoherent" not in sound, "it was as broken before"


@pytest.mark.parametrize(
    ("random", "words"),
    [(3, "More in T0 (72"), (33, "Not told apart in T0 (72"), (46, "Less in T0 (72")],
)
def test_random_control_follows_the_numbers(random: int, words: str) -> None:
    state = sample_state("T0", 34)
    state["attacks"][-1]["harmful"] = counts(47, random)
    assert words in said(sample_results(state), "Random control")


def test_random_control_of_another_size_or_missing_is_said() -> None:
    state = sample_state("T0", 40)
    assert "as many random ones" in said(sample_results(state), "Random control")
    state["attacks"][-1]["neurons"] = 10
    assert "not everywhere as many" in said(sample_results(state), "Random control")
    state["attacks"].pop()
    assert "No random control" in said(sample_results(state), "Random control")


@pytest.mark.parametrize(("refused", "words"), [(30, "More, the intervals apart: T1 75"), (9, "overlap: T1 22")])
def test_over_refusal_follows_the_numbers(refused: int, words: str) -> None:
    results = sample_results()
    results["states"][0]["attacks"][0]["benign"] = benign(40, 6)
    results["states"][1]["attacks"][0]["benign"] = benign(40, refused)
    assert words in said(results, "Over-refusal")


def test_less_over_refusal_and_missing_over_refusal_are_said() -> None:
    results = sample_results()
    results["states"][0]["attacks"][0]["benign"] = benign(40, 20)
    assert "Fewer, the intervals apart: T1 5.0" in said(results, "Over-refusal")
    results["states"][1]["attacks"][0]["benign"] = None
    assert "Not known: T1." in said(results, "Over-refusal")


def test_a_state_is_held_against_the_baseline_of_its_own_round() -> None:
    plain_dpo = sample_state("T1-plain", 38, round_=1, variant="plain DPO")
    results = sample_results(sample_state("T0", 40), sample_state("T1", 15), plain_dpo)
    assert said(results, "T1 against T1-plain").startswith("T1 resists better than T1-plain")
    assert "T1-plain against T1" not in [point.topic for point in points(typed(results))]


def test_a_broken_freeze_and_an_untrained_state_are_said() -> None:
    results = sample_results()
    assert said(results, "Frozen neurons") == "Bit-identical after training in T1."
    results["states"][1]["align"] |= {"frozen_identical": False, "free_change": 0.0}
    text = said(results, "Frozen neurons")
    assert "NOT identical after training in T1" in text
    assert "No free parameter of T1 moved" in text
    assert "NOT kept" in rendered(results)["report.html"]
