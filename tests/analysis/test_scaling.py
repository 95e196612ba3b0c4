"""Attack success by preference pairs, and round by round, of results made by hand."""

from __future__ import annotations

import pytest

from safeneuron.analysis.scaling import RoundRecord, ScaleRecord, data_scale, iterations, required_results
from safeneuron.errors import InputError
from tests.helpers.sample_results import attack, counts, sample_results, sample_state, typed


def state(name: str, pairs: int | None, **rates: float):
    """A state whose attacks succeeded on so many of ten requests."""
    made = sample_state(name, 20)
    attacks = [
        {**attack(*key.split("_"), 0, 0, 0), "harmful": counts(10, round(10 * rate))} for key, rate in rates.items()
    ]
    align = made["align"] and {**made["align"], "pairs": pairs, "frozen": 7}
    capability = {"ORI": {"gsm8k": {"value": 0.4, "stderr": 0.1, "n": 10}}}
    neurons = {**made["neurons"], "FULL": 5}
    made |= {"label": "dpo", "align": align, "attacks": attacks, "neurons": neurons, "capability": capability}
    return made


def run(name: str, *states):
    return typed({**sample_results(*states), "name": name})


SMALL = run("small", state("T0", None, ORI_none=0.9, FULL_static=0.8), state("T1", 5, ORI_none=0.5))
LARGE = run("large", state("T1", 20, ORI_none=0.1))


def test_data_scale_by_hand():
    points = data_scale([LARGE, SMALL])
    assert [(point.run, point.pairs, point.share, point.rate) for point in points] == [
        ("small", 5, 0.25, 0.5),
        ("large", 20, 1.0, 0.1),
    ]


def test_a_share_is_of_the_most_pairs_of_its_label():
    other = state("T1", 80, ORI_none=0.3)
    points = data_scale([SMALL, run("other", {**other, "label": "freeze"})])
    assert {point.label: point.share for point in points} == {"dpo": 1, "freeze": 1}


def test_an_attack_that_was_not_run_is_no_point():
    trained = state("T1", 5, ORI_none=0.5, FULL_static=0.4, other_set=0.2)
    trained["attacks"][1]["harmful"] = None
    (point,) = data_scale([run("run", trained)])
    assert (point.set, point.knowledge, point.n) == ("ORI", "none", 10)


def test_rounds_by_hand():
    first, second = iterations(SMALL)
    assert first.rates == {"ORI": 0.9, "FULL static": 0.8, "FULL adaptive": 0.8, "FULL iterated": None}
    assert first.complied["FULL adaptive"] == 8, "T0's static and adaptive attackers are one"
    assert second.rates == {"ORI": 0.5, "FULL static": None, "FULL adaptive": None, "FULL iterated": None}
    assert (first.frozen, second.frozen, second.neurons, second.capability) == (None, 7, 5, {"gsm8k": 0.4})


def test_variants_are_no_rounds():
    variant = {**state("T1", 5, ORI_none=0.5), "variant": "dpo"}
    assert [each.state for each in iterations(run("run", state("T0", None), variant))] == ["T0"]


def test_a_round_is_one_row_and_read_back():
    record = ScaleRecord(data_scale([SMALL, LARGE]), iterations(SMALL))
    row = record.to_json()["iterations"][1]
    assert list(row)[:5] == ["state", "neurons", "frozen", "ASR ORI", "complied ORI"]
    assert (row["ASR ORI"], row["complied ORI"], row["gsm8k"]) == (0.5, 5, 0.4)
    assert RoundRecord.of_row(row) == record.iterations[1]
    assert ScaleRecord.from_json(record.to_json()) == record


def test_a_run_without_results_has_to_be_finished_first(tmp_path):
    with pytest.raises(InputError, match="report"):
        required_results(tmp_path)
