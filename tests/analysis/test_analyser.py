"""An analysis of a finished run on a tiny model: every part, resumed where it stopped, and its terminal text."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest

from safeneuron.analysis.analyser import ANALYSIS_PARTS, Analyser
from safeneuron.analysis.settings import Effort
from safeneuron.analysis.tables import MASKED, analysis_tables
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.runs.run import Run
from tests.helpers.tiny_run import Watch

EFFORT = Effort(samples=2, pairs=2, prompts=6, sets=2, neurons=2, draws=5)
FIGURES = {"topics", "depth", "stability", "states", "methods", "scale"}


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A copy of the finished run whose unsafe prompts have two topics."""
    folder, _, _ = finished_run
    copy = tmp_path_factory.mktemp("analysed") / "run"
    shutil.copytree(folder, copy)
    path = copy / "data" / "unsafe.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    many = [{**one, "text": f"{one['text']} {topic}", "category": topic} for topic in "xy" for one in records]
    path.write_text("".join(json.dumps(one) + "\n" for one in many))
    return Run.open(copy)


def analyser(run: Run, watch: Watch, **changes: object) -> Analyser:
    return Analyser(read_config(str(run.folder / "config.toml"), []), run, watch, effort=EFFORT, **changes)


@pytest.fixture(scope="module")
def analysis(run):
    return analyser(run, Watch()).analyse()


def prompts_of(run: Run) -> list[list[dict[str, str]]]:
    """The records of the run's unsafe and safe prompts."""
    files = (run.folder / "data" / f"{role}.jsonl" for role in ("unsafe", "safe"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_every_part_leaves_numbers_tables_and_figures(run, analysis):
    assert tuple(analysis) == ANALYSIS_PARTS
    for part in ANALYSIS_PARTS:
        folder = run.folder / "analysis" / part
        assert json.loads((folder / "numbers.json").read_text()) == analysis[part].to_json()
        assert list(folder.glob("*.csv"))
        if part in FIGURES:
            assert (folder / f"{part}.svg").read_text().startswith("<svg")
            assert (folder / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((run.folder / "analysis" / "states" / "states.csv").open()))
    assert len(rows) == 4 * 3
    assert rows[0]["moved_inside"] == ""
    assert float(rows[3]["moved_outside"]) > 0


def test_frozen_neurons_have_not_moved_and_the_rest_has(analysis):
    by_name = {state.state: state for state in analysis["states"].states}
    inside = [layer.inside for layer in by_name["T1"].moved if not math.isnan(layer.inside)]
    assert inside
    assert set(inside) == {0.0}
    assert all(layer.outside > 0 for layer in by_name["T1"].moved)
    assert any(layer.inside > 0 for layer in by_name["dpo-T1"].moved), "plain DPO freezes nothing"
    assert by_name["T0"].turnover.lost == by_name["T0"].turnover.new == [0, 0, 0]
    assert by_name["T0"].cka_unsafe[1:] == pytest.approx([1, 1])


def test_what_is_done_is_skipped_and_other_settings_are_told(run, analysis):
    watch = Watch()
    assert analyser(run, watch).analyse(["depth", "scale"]) == {name: analysis[name] for name in ("depth", "scale")}
    assert watch.of("skipped") == ["analysis/depth", "analysis/scale"]
    with pytest.raises(InputError, match="made with other settings"):
        analyser(run, Watch(), state="T1").analyse(["depth"])


def test_stability_measures_other_prompts_too_and_notices_when_they_change(run, analysis, tmp_path):
    """The same requests, word for word, give the same set; others are told apart by their ids."""
    rows = [
        {"id": f"{number}", "harmful": one["text"], "harmless": other["text"]}
        for number, (one, other) in enumerate(zip(*prompts_of(run), strict=False))
    ]
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = run.folder / "analysis" / "stability"
    with pytest.raises(InputError, match="also was None"):
        analyser(run, Watch(), also=[str(path)]).analyse(["stability"])
    shutil.copytree(numbers, tmp_path / "kept")
    again = analyser(run, Watch(), also=[str(path)]).analyse(["stability"], redo=["analysis/stability"])
    (also,) = again["stability"].also
    assert also.prompts == [len(rows), len(rows)]
    assert 0 <= also.jaccard <= 1
    assert also.same_requests == 0
    assert math.isnan(also.wording.jaccard)
    assert math.isnan(also.fewer.correlation)
    (row,) = csv.DictReader((numbers / "also.csv").open())
    assert row["prompts_of"] == str(path)
    path.write_text(path.read_text().replace("how", "why"))
    with pytest.raises(InputError, match="made with other settings: also"):
        analyser(run, Watch(), also=[str(path)]).analyse(["stability"])
    shutil.rmtree(numbers)
    shutil.copytree(tmp_path / "kept", numbers)


def test_a_stopped_redundancy_goes_on_and_answers_nothing_twice(run, analysis):
    folder = run.folder / "analysis" / "redundancy"
    answers = sorted(folder.glob("T0/*.json"))
    stamps = [path.stat().st_mtime_ns for path in answers]
    (folder / "done.json").unlink()
    assert analyser(run, Watch()).analyse(["redundancy"])["redundancy"] == analysis["redundancy"]
    assert [path.stat().st_mtime_ns for path in answers] == stamps


def test_a_part_or_state_that_is_not_there_is_one_sentence(run):
    with pytest.raises(InputError, match="no part 'nothing'; expected some of topics"):
        analyser(run, Watch()).analyse(["nothing"])
    with pytest.raises(InputError, match="state 'T9'; expected one of T0, T1, T2, dpo-T1"):
        analyser(run, Watch(), state="T9")


def test_nothing_but_parts_of_the_analysis_can_be_made_again(run):
    with pytest.raises(InputError, match=r"no part '\.\./T1'"):
        analyser(run, Watch()).analyse(["depth"], redo=["../T1"])
    assert (run.folder / "T1" / "select" / "done.json").exists()


def test_the_terminal_masks_prompts_unless_they_are_asked_for(analysis):
    (neurons,) = [table for table in analysis_tables(analysis) if table[0] == "Neurons"]
    assert {row[-1] for row in neurons[2]} == {MASKED}
    (shown,) = [table for table in analysis_tables(analysis, show_text=True) if table[0] == "Neurons"]
    assert all("break" in row[-1] for row in shown[2])
    assert all(len(row) == len(header) for _, header, rows in analysis_tables(analysis) for row in rows)
