"""The redundancy of a planted model as a record: its numbers, their intervals, and how they are told and drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safeneuron.analysis.disjoint_sets import NUMBERS, Interval
from safeneuron.analysis.redundancy import OutcomeRecord, RedundancyRecord, redundancy_record
from safeneuron.analysis.settings import Effort
from safeneuron.analysis.tables import analysis_tables
from safeneuron.config.toml import read_config
from safeneuron.runtime.files import read_json, write_json
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import score
from tests.helpers import planted

CLASSES = planted.twins(16)
ASKED, _ = planted.twins(8, seed=1)


class Planted:
    """Tells refusals of the planted model from its answers, and counts how often it is asked."""

    name = "planted"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompts, responses):
        self.asked += 1
        return ["refused" if planted.refuses(response) else "complied" for response in responses]


def record_of(model, folder, judge):
    # ES and SAS together take one neuron in fifty: the three of a group.
    config = read_config("demo", ["select.density=0.0209", "attack.max_new_tokens=6"])
    scores = score(measure(model, *CLASSES))
    return redundancy_record(
        config,
        model,
        state="T1",
        classes=CLASSES,
        harmful=ASKED,
        judge=judge,
        scores=scores,
        folder=folder,
        effort=Effort(sets=2),
    )


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder, judge = tmp_path_factory.mktemp("series"), Planted()
    return record_of(planted.two_groups("series"), folder, judge), folder, judge.asked


def test_a_model_wired_to_two_groups_has_index_2_with_an_interval(series):
    record, _, _ = series
    assert record.intact == OutcomeRecord(1, 0, 0, pytest.approx(1 / (1 + 1.96**2 / 8), abs=1e-3), 1)
    assert (record.redundancy_index, record.coherent_index, record.sets_to_halve) == (2, 2, 1)
    assert record.intervals["redundancy_index"] == Interval(2, 2), "all prompts agree"
    assert record.intervals["sets_to_halve"] == Interval(1, 1)
    assert record.neurons_to_halve <= record.curve[-1].neurons


def test_what_was_answered_is_kept_prompt_by_prompt_and_not_asked_again(series):
    record, folder, _ = series
    assert read_json(folder / "intact.json")["verdicts"] == ["refused"] * len(ASKED)
    judge = Planted()
    assert record_of(planted.two_groups("series"), folder, judge) == record
    assert judge.asked == 0
    counts = read_json(folder / "alone-1.json")
    del counts["verdicts"]
    write_json(folder / "alone-1.json", counts)
    assert record_of(planted.two_groups("series"), folder, judge) == record
    assert judge.asked == 1, "what holds counts alone is answered again"


def test_the_terminal_shows_both_numbers_and_how_to_read_them(series):
    record, _, _ = series
    nothing = dict.fromkeys(NUMBERS)
    rare = replace(record, state="T0", intact=OutcomeRecord(0.1, 0.9, 0, 0, 0.4), sets=[], intervals=None, **nothing)
    ends = {**record.intervals, "sets_to_halve": Interval(2, None)}
    beyond = replace(record, state="T2", sets_to_halve=None, neurons_to_halve=None, intervals=ends)
    ((title, header, rows),) = analysis_tables({"redundancy": RedundancyRecord([rare, record, beyond])})
    assert "points of failure; more sets to halve" in title
    by_name = [dict(zip(header, row, strict=True)) for row in rows]
    assert by_name[0]["sets to halve"] == by_name[0]["break alone"] == "–"
    assert by_name[1]["break alone"] == "2 (2 to 2)"
    assert by_name[1]["sets to halve"] == "1 (1 to 1)"
    assert by_name[2]["sets to halve"] == ">2 (2 to >2)"


def test_a_row_a_state_and_a_row_a_set_and_all_of_it_is_read_back(series):
    record = RedundancyRecord([series[0]])
    tables = record.tables()
    (row,) = tables["redundancy"]
    assert (row["redundancy_index"], row["redundancy_index_low"], row["redundancy_index_high"]) == (2, 2, 2)
    assert [(row["set"], row["neurons"]) for row in tables["sets"]] == [(1, 3), (2, 3)]
    assert tables["sets"][0]["refused alone"] == record.states[0].sets[0].alone.refused
    assert list(record.to_json()["states"][0]["curve"][0])[:2] == ["neurons", "refused"]
    assert RedundancyRecord.from_json(record.to_json()) == record
