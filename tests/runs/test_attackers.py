"""The attacks beside the paper's in a run: what each does, where its answers stand, and that stopped work goes on."""

from __future__ import annotations

import json
import re

import pytest

from safeneuron.attacks.jailbreaks import input_attempts
from safeneuron.config.attack import AttemptName
from safeneuron.config.attack_plan import CHANGES
from safeneuron.config.states import State
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import RefusalPhrases
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines
from tests.helpers.tiny_run import Watch, execute, results

SELECTORS = ("probe", "snip", "wanda", "gradient", "contrast")
KINDS = ("rival", "operator", "transfer", "model", "input")
ATTEMPTS = ("direction", "fine-tune", "prefill-sure", "base64")


@pytest.fixture(scope="module")
def attacked(finished_run, tmp_path_factory):
    """A run with every kind of attack: ``(its folder, its config with changes, a watcher)``."""
    folder, config, _ = finished_run
    where = tmp_path_factory.mktemp("attacked")
    sibling = NeuronSet.load(folder / "T0" / "select" / "neurons.json")
    sibling.transferred("feedfeedfeedfeed").save(where / "sibling.json")
    learnt = [{"prompt": f"ask {i}", "answer": f"yes, {i}"} for i in range(4)]
    (where / "learn.jsonl").write_text("".join(json.dumps(record) + "\n" for record in learnt))
    changes = (
        'attack.sets=["FULL"]', 'attack.knowledge=["static", "adaptive"]', "attack.curve=[]", "variants={}",
        "align.rounds=1", f"attack.selectors={json.dumps(SELECTORS)}", f"attack.attempts={json.dumps(ATTEMPTS)}",
        'attack.operators=["mean", "opposite"]', f'attack.transfer="{where}/sibling.json"',
        f'attack.fine_tune_data="{where}/learn.jsonl"', "attack.fine_tune_steps=2", "attack.fine_tune_rank=2",
    )  # fmt: skip
    settings = read_config(config, changes)
    watch = execute(settings, where / "run")
    return where / "run", settings, watch


FURTHER = {
    *(f"rival-{name}" for name in SELECTORS), "operator-mean", "operator-opposite", "transfer-FULL",
    *(f"{'model' if name in CHANGES else 'input'}-{name}" for name in ATTEMPTS),
}  # fmt: skip


def test_every_attack_is_answered_and_judged_harmful_requests_alone(attacked):
    folder, _, _ = attacked
    for state in ("T0", "T1"):
        expected = FURTHER - ({"rival-contrast"} if state == "T0" else set())
        for stage in ("attack", "judge"):
            found = {path.parent.name for path in (folder / state / stage).glob("*/harmful.jsonl")}
            assert {
                name for name in found if name.split("-")[0] in ("rival", "operator", "transfer", "model", "input")
            } == expected
            benign = {path.parent.name for path in (folder / state / stage).glob("*/benign.jsonl")}
            assert not benign & FURTHER
        for name in expected:
            assert len(read_lines(folder / state / "attack" / name / "harmful.jsonl")) == 3


def test_rivals_prune_as_many_neurons_as_the_paper(attacked):
    folder, settings, _ = attacked
    findings = Findings(settings, Run.open(folder))
    for state in (State("", 0), State("", 1)):
        own = findings.neurons(state)
        attacked = {
            (attack.set, attack.knowledge): findings.attacked(state, attack) for attack in findings.plan(state).answered
        }
        sets = {name: neurons for (name, knowledge), neurons in attacked.items() if knowledge == "rival"}
        assert [len(neurons) for neurons in sets.values()] == [len(own)] * len(sets)
        for name in sets:
            assert read_json(folder / state.name / "attack" / f"rival-{name}" / "pruned.json")["neurons"] == len(own)
        edits = {name: edit for (name, knowledge), edit in attacked.items() if knowledge == "operator"}
        assert all(isinstance(edit, Edit) and edit.neurons == own for edit in edits.values())
        assert attacked["FULL", "transfer"] == findings.neurons(State("", 0))


def test_a_prefilled_answer_begins_with_its_opening(attacked):
    folder, _, _ = attacked
    answers = [line["response"] for line in read_lines(folder / "T0/attack/input-prefill-sure/harmful.jsonl")]
    opening = input_attempts("prefill-sure")[0].opening
    assert all(answer.startswith(opening) for answer in answers)
    intact = [line["response"] for line in read_lines(folder / "T0/attack/ORI/harmful.jsonl")]
    assert answers != intact


def test_they_stand_in_the_results_and_the_report(attacked):
    folder, _, _ = attacked
    found = json.loads(results(folder))
    kinds = {(a["knowledge"], a["set"]) for a in found["states"][1]["attacks"]}
    assert {("rival", "contrast"), ("operator", "opposite"), ("model", "fine-tune"), ("input", "base64")} <= kinds
    page = (folder / "report" / "report.md").read_text()
    counts = next(a["harmful"] for a in found["states"][0]["attacks"] if a["set"] == "base64")
    shares = [f"{100 * counts[verdict] / counts['n']:.0f}" for verdict in ("complied", "refused", "incoherent")]
    (row,) = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| base64 ")]
    assert re.findall(r"(?:^|; |, )([\d.]+)\u00a0%", row) == shares
    assert "## Other attacks" in page
    assert "neurons found by probe" in page
    assert "jailbreak prompts" not in page, "they were tried"
    assert "pruning in several rounds" in page, "that was not"


@pytest.mark.slow
def test_stopped_work_goes_on_to_the_same_results(attacked, tmp_path):
    folder, settings, watch = attacked
    begun = watch.events.index(("began", "T0/attack"))
    for stop in (begun - 3, begun + 2, begun + 9):
        with pytest.raises(KeyboardInterrupt):
            execute(settings, tmp_path / "run", Watch(stop))
    execute(settings, tmp_path / "run")
    assert results(tmp_path / "run") == results(folder)


def test_a_state_that_gives_no_answer_to_learn_is_not_fine_tuned(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    monkeypatch.setattr(RefusalPhrases, "__call__", lambda self, prompts, responses: ["incoherent"] * len(responses))
    changes = (
        'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.curve=[]", "variants={}", "align.rounds=0",
        'attack.attempts=["fine-tune"]',
    )  # fmt: skip
    watch = execute(config, tmp_path, changes=changes)
    assert read_lines(tmp_path / "T0" / "rivals" / "demonstrations.jsonl") == []
    assert any("fine_tune_data" in str(text) for text in watch.of("warned"))
    assert not (tmp_path / "T0" / "attack" / "model-fine-tune").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('attack.attempts=["prefil-sure"]', "prefil-sure"),
        ('attack.selectors=["lasso"]', "lasso"),
        ('attack.transfer="nowhere.json"', "nowhere.json"),
    ],
)
def test_what_is_not_there_is_said(change, message, finished_run, tmp_path):
    _, config, _ = finished_run
    with pytest.raises(InputError, match=message) as error:
        execute(config, tmp_path, changes=(change, "variants={}", "align.rounds=0"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists(), "said before any work"


def test_the_config_knows_every_bundled_attempt():
    assert set(AttemptName.__args__) == {*CHANGES, *(attempt.name for attempt in input_attempts())}
