"""The result table for a terminal: every attack in its column, every rate with its interval."""

from __future__ import annotations

from typing import Any

from safeneuron.reporting.terminal import result_lines, terminal_table
from tests.helpers.sample_results import attack, counts, sample_results, sample_state, typed


def tried(which: str, knowledge: str, complied: int) -> dict[str, Any]:
    return {**attack(which, knowledge, 1, 0, 0), "harmful": counts(10, complied)}


def two_states() -> dict[str, Any]:
    base, aligned = sample_state("T0", 4), sample_state("T1", 6)
    base["attacks"] = [tried("ORI", "none", 1), *(tried(*a) for a in (("ES", "static", 2), ("SAS", "static", 3)))]
    base["attacks"].append(tried("FULL", "static", 4))
    aligned["attacks"] = [tried("ORI", "none", 0), tried("FULL", "static", 5), tried("FULL", "adaptive", 6)]
    aligned["attacks"].append(tried("random", "control", 7))
    aligned["label"] = "mine"
    return {**sample_results(base, aligned), "model": "tiny"}


def test_the_lines_put_every_attack_in_its_column() -> None:
    lines = list(result_lines(typed(two_states())))
    assert lines[2].split() == ["ORI", "ES", "SAS", "FULL", "ES", "SAS", "FULL", "random"]
    assert lines[3].split()[:6] == ["base", "model", "10", "20", "30", "40"]
    assert lines[4].split() == ["mine", "0", "-", "-", "50", "-", "-", "60", "70"]
    assert {len(line) for line in lines[2:5]} == {len(lines[2])}, "numbers stand under their heading"
    assert max(map(len, lines)) <= 100


def test_further_attacks_have_a_line_each() -> None:
    record = two_states()
    record["states"][1]["attacks"].append(tried("probe", "rival", 2))
    (line,) = (line for line in result_lines(typed(record)) if "probe" in line)
    assert line.split()[-2:] == ["-", "20"]


def test_the_table_has_a_row_for_each_attack_that_was_run() -> None:
    table = terminal_table(typed(two_states()))
    assert table.header == ["pruned", "T0", "T1"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == [
        "ORI",
        "ES static",
        "SAS static",
        "FULL static",
        *(f"{s} adaptive" for s in ("ES", "SAS", "FULL")),
        "random",
    ]
    assert rows["random"][0] == "-"
    assert rows["FULL adaptive"][1].startswith("60 (")
    assert "mine" in table.note
