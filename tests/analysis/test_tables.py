"""The tables of an analysis for a terminal, of records made by hand."""

from __future__ import annotations

from safeneuron.analysis.tables import analysis_tables


def test_depth_is_shown_in_per_cent_of_the_neurons():
    record = {"sets": [{"name": "T0", "neurons": 1234, "thirds": [0.5, 0.25, 0.25], "mean_depth": 0.375}]}
    ((title, header, rows),) = analysis_tables({"depth": record})
    assert title == "Depth"
    assert rows == [["T0", "1,234", "50.0 %", "25.0 %", "25.0 %", "0.38"]]
    assert len(header) == len(rows[0])


def test_a_table_without_rows_is_left_out():
    assert analysis_tables({"depth": {"sets": []}, "scale": {"scale": [], "iterations": []}}) == []
