"""The tables of an analysis for a terminal, of records made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from safeneuron.analysis.depth import DepthRecord
from safeneuron.analysis.portraits import PortraitRecord, PortraitsRecord
from safeneuron.analysis.scaling import ScaleRecord
from safeneuron.analysis.tables import MASKED, analysis_tables
from tests.helpers import hand_made

PORTRAIT = PortraitRecord(1, 5, ["N"], [], ["how to break a lock"], {"harm": 1.0, "none": -1.0}, 2.5)
RECORDS = {
    "topics": hand_made.topics(),
    "depth": hand_made.depth("T0", "T1"),
    "stability": hand_made.stability(10, 20, 24),
    "states": hand_made.states(hand_made.changed("T0", moved=False), hand_made.changed("T1")),
    "redundancy": hand_made.redundancies(),
    "methods": hand_made.methods()[0],
    "neurons": PortraitsRecord("T0", [PORTRAIT]),
    "scale": ScaleRecord([], hand_made.rounds()),
}


def rows(name: str, show_text: bool = False) -> list[dict[str, str]]:
    ((_, header, cells),) = analysis_tables({name: RECORDS[name]}, show_text)
    return [dict(zip(header, row, strict=True)) for row in cells]


def test_every_part_has_a_table_with_a_cell_a_column_and_the_neurons_are_last():
    tables = analysis_tables(RECORDS)
    assert len(tables) == len(RECORDS)
    assert all(len(row) == len(header) for _, header, cells in tables for row in cells)
    assert tables[-1][0] == "Neurons"


def test_depth_is_shown_in_per_cent_of_the_neurons():
    assert rows("depth")[0] == {
        "set": "T0", "neurons": "461", "early": "50.0 %", "middle": "30.0 %", "late": "20.0 %", "mean depth": "0.40",
    }  # fmt: skip


def test_what_is_undefined_is_a_dash():
    assert rows("states")[0]["moved in"] == "–"
    assert rows("states")[1]["moved in"] == "0.0000"
    assert rows("scale")[0]["frozen"] == "–"
    assert rows("scale")[0]["ASR FULL iterated"] == "–"


def test_other_prompts_stand_with_their_wording_if_it_was_measured():
    words = [row["sets"] for row in rows("stability")]
    assert "  of the same 9 requests" in words
    also = RECORDS["stability"].also[0]
    few = replace(also, wording=replace(also.wording, jaccard=math.nan), fewer=replace(also.fewer, jaccard=math.nan))
    ((_, _, cells),) = analysis_tables({"stability": replace(RECORDS["stability"], also=[few])})
    assert [row[0] for row in cells][-1] == "prompts of de"


@pytest.mark.parametrize(("show_text", "prompt"), [(False, MASKED), (True, "how to break a lock")])
def test_prompts_are_masked_unless_they_are_to_be_shown(show_text, prompt):
    (row,) = rows("neurons", show_text)
    assert (row["category"], row["promotes"], row["excited by"]) == ("harm", "'N'", prompt)


def test_a_table_without_rows_is_left_out():
    assert analysis_tables({"depth": DepthRecord([]), "scale": ScaleRecord([], [])}) == []
