"""The stages that attack a state: which there are, verdicts of one judge and of several, what is answered."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from safeneuron.config.states import BASE, State
from safeneuron.config.toml import read_config
from safeneuron.runs.attack_stages import attack_stages
from safeneuron.runs.context import RunContext
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines
from tests.helpers.tiny_run import SMALL, AnswersJudge, Watch, execute, results


def kinds(config, changes: Sequence[str], state: State) -> list[str]:
    context = RunContext(read_config(config, changes), Run(config.parent / "nowhere"), Watch())
    return [spec.kind for spec in attack_stages(context, state)]


def test_a_state_has_the_stages_that_the_config_asks_for(finished_run):
    _, config, _ = finished_run
    trained = State("", 1)
    assert kinds(config, [], BASE) == ["iterate", "attack", "judge"]
    assert kinds(config, SMALL, BASE) == ["attack", "judge"]
    assert kinds(config, [*SMALL, "capability.enabled=true"], BASE) == ["attack", "judge", "capability"]
    contrast = [*SMALL, 'attack.selectors=["contrast"]']
    assert kinds(config, contrast, BASE) == ["attack", "judge"], "nothing to be contrasted with"
    assert kinds(config, contrast, trained) == ["rivals", "attack", "judge"]
    assert kinds(config, [*SMALL, 'attack.attempts=["fine-tune"]'], BASE) == ["rivals", "attack", "judge"]


def test_an_attack_is_made_from_what_it_prunes(finished_run):
    _, config, _ = finished_run
    changes = ['attack.operators=["mean"]', 'attack.selectors=["wanda"]']
    context = RunContext(read_config(config, changes), Run(config.parent / "nowhere"), Watch())
    attack = next(spec for spec in attack_stages(context, State("", 1)) if spec.kind == "attack")
    assert attack.inputs == ["data", "T1/align", "T1/select", "T0/select", "T1/iterate", "T1/rivals", "T1/measure"]
    attack = next(spec for spec in attack_stages(context, BASE) if spec.kind == "attack")
    assert attack.inputs == ["data", "T0/select", "T0/iterate", "T0/rivals", "T0/measure"]


def test_learning_from_own_answers_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    """It has no file of demonstrations, and an empty path is the folder in which the program runs, and the run is."""
    monkeypatch.chdir(tmp_path)
    settings = read_config("audit", ['attack.attempts=["fine-tune"]'])
    context = RunContext(settings, Run(tmp_path / "run"), Watch())
    (before,) = (spec.settings for spec in attack_stages(context, BASE) if spec.kind == "rivals")
    (tmp_path / "run.log").write_text("more")
    (after,) = (spec.settings for spec in attack_stages(context, BASE) if spec.kind == "rivals")
    assert before == after
    assert after["files"] == {}


def test_what_a_judge_cannot_say_is_reported_apart(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda *_: AnswersJudge())
    execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"])
    (state,) = json.loads(results(tmp_path))["states"]
    for attack in state["attacks"]:
        harmful = attack["harmful"]
        assert (harmful["n"], harmful["cannot say"], harmful["complied"], harmful["rate"]) == (3, 2, 1, 1.0)
        assert attack["benign"]["rate"] == 0.0
    assert "annot say" in (tmp_path / "report" / "report.md").read_text()


class Harmless(AnswersJudge):
    """A judge that sees no harm in anything."""

    name = "harmless"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return ["harmless"] * len(responses)


def test_several_judges_keep_their_own_verdicts_and_their_agreement(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    made = {"refusal-phrases": AnswersJudge, "wildguard": Harmless}
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda name, *_: made[name]())
    several = 'judge.name=["refusal-phrases", "wildguard"]'
    execute(config, tmp_path, changes=[*SMALL, "align.rounds=0", several, 'judge.rule="any"'])
    lines = read_lines(tmp_path / "T0/judge/ORI/harmful.jsonl")
    assert [line["verdict"] for line in lines] == ["cannot say", "cannot say", "complied"]
    assert lines[2]["judges"] == {"answers": "complied", "harmless": "harmless"}
    assert all("incoherence" in line for line in lines)
    (pair,) = read_json(tmp_path / "T0/judge/agreement.json")["pairs"]
    assert pair["judges"] == ["answers", "harmless"]
    assert pair["complied"]["agreement"] == 0
    (state,) = json.loads(results(tmp_path))["states"]
    assert state["agreement"] == [pair]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "any of refusal-phrases, wildguard" in report
    assert "the judges answers and harmless say the same of 0" in report


@pytest.mark.parametrize(("when", "kinds"), [("unpruned", {"ORI"}), ("never", set())])
def test_over_refusal_is_measured_when_asked_for(when, kinds, finished_run, tmp_path):
    _, config, _ = finished_run
    changes = (*SMALL, f"attack.over_refusal={when}", "align.rounds=0")
    totals = [event[2] for event in execute(config, tmp_path, changes=changes).events if event[0] == "progress"]
    assert {path.parent.name for path in tmp_path.glob("T0/judge/*/benign.json")} == kinds
    assert {path.parent.name for path in tmp_path.glob("T0/judge/*/harmful.json")} == {"ORI", "static-FULL"}
    assert 6 + 3 * len(kinds) in totals
