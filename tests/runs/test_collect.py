"""From a run's files to the comparisons and groups in its results: against the verdicts, counted by hand."""

from __future__ import annotations

import json

import pytest

from safeneuron.config.states import BASE, State, states_of
from safeneuron.config.toml import read_config
from safeneuron.evaluation.rates import corrected, mcnemar
from safeneuron.reporting.results import RunResults
from safeneuron.runs.collect import state_differences
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run


def write(run, state, name, verdicts, kind="harmful"):
    """The verdicts on a state's answers to prompts 0, 1, ...; a space leaves one out."""
    words = {"c": "complied", "r": "refused", "i": "incoherent", "?": "cannot say"}
    path = run / state / "judge" / name / f"{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"index": i, "verdict": words[letter]} for i, letter in enumerate(verdicts) if letter != " "]
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))


@pytest.fixture
def verdicts(tmp_path):
    """The judge's files of T0, T1 and a variant; T0 has no adaptive attack of its own."""
    for state, intact, attacked in (
        ("T0", "rrrrrr", "cccccc"),
        ("T1", "rrrrr?", "rrrrrc"),
        ("dpo-T1", "rrcrrr", "ccccir"),
    ):
        write(tmp_path, state, "ORI", intact)
        write(tmp_path, state, "static-FULL" if state == "T0" else "adaptive-FULL", attacked)
        write(tmp_path, state, "ORI", "ccc" if state == "T0" else "rrr", "benign")
    return tmp_path


def test_states_are_compared_prompt_by_prompt(verdicts):
    found = state_differences(Findings(read_config("demo"), Run(verdicts)), [BASE, State("", 1), State("dpo", 1)])
    names = [(record.first, record.second) for record in found]
    # Each with T0 in three respects (nobody iterated), and the main training with the variant.
    assert names == [("T0", "T1")] * 3 + [("T0", "dpo-T1")] * 3 + [("dpo-T1", "T1")] * 3
    intact, attacked, benign = found[:3]
    assert (intact.n, intact.gained, intact.lost, intact.p) == (5, 0, 0, 1.0), "one was not judged"
    assert (attacked.n, attacked.gained, attacked.lost) == (6, 0, 5)
    assert (attacked.set, attacked.knowledge, attacked.verdict) == ("FULL", "adaptive", "complied")
    assert attacked.difference == pytest.approx(-5 / 6)
    assert (benign.kind, benign.verdict, benign.gained, benign.p) == ("benign", "refused", 3, mcnemar(3, 0))
    # Incoherent is not complied: the variant lost two prompts to T0, and T1 wins one from it and loses four.
    assert (found[4].lost, found[7].gained, found[7].lost) == (2, 1, 4)
    assert [record.p_corrected for record in found] == corrected([record.p for record in found])


def test_a_run_with_one_state_compares_nothing(verdicts):
    assert state_differences(Findings(read_config("demo"), Run(verdicts)), [BASE]) == ()


def test_prompts_that_only_one_state_has_answered_are_left_out(verdicts):
    write(verdicts, "T1", "ORI", "c  c")
    found = state_differences(Findings(read_config("demo"), Run(verdicts)), [BASE, State("", 1)])
    assert (found[0].n, found[0].gained) == (2, 2)


def test_results_of_a_run_hold_groups_and_comparisons(finished_run):
    folder, config, _ = finished_run
    results = RunResults.load(folder / "report" / "results.json")
    states = states_of(read_config(config))
    assert results.differences == state_differences(Findings(read_config(config), Run(folder)), states)
    iterated = [record for record in (results.differences or ()) if record.knowledge == "iterated"]
    assert {record.second for record in iterated} == {state.name for state in states} - {"T0"}
    for state in results.states:
        assert state.refusals_by_category is not None
        assert sum(counts.n for counts in state.refusals_by_category.values()) == 3
        assert state.capability == {}
