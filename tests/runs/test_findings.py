"""What a run has found: the frozen set that grows, the plan of attacks, and the rounds that end early."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from safeneuron.config.attack_plan import AttackPlan, PlannedAttack
from safeneuron.config.states import BASE, State
from safeneuron.config.toml import read_config
from safeneuron.models.loading import load
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json
from tests.helpers.tiny_run import SMALL, STATES, execute, results, stages_in


@pytest.fixture
def findings(finished_run):
    folder, config, _ = finished_run
    return Findings(read_config(config), Run(folder))


def test_the_prompts_are_those_that_the_run_has_kept(findings):
    assert findings.classes() == (findings.prompts("unsafe"), findings.prompts("safe"))
    assert [len(findings.prompts(role)) for role in ("unsafe", "safe", "test_unsafe", "test_safe")] == [6, 6, 3, 3]


def test_each_freeze_has_its_set(findings):
    neurons, table = findings.neurons(BASE), findings.config.align
    sets = {
        name: findings.frozen(table.model_copy(update={"freeze": name}), neurons)
        for name in ("none", "safety", "random", "all-but-safety")
    }
    assert sets["none"] is None
    assert sets["safety"] == neurons
    assert sets["all-but-safety"] == neurons.complement()
    assert len(sets["random"]) == len(neurons)
    assert sets["random"] - neurons == sets["random"]


def test_the_plan_that_a_run_has_written_is_the_one_that_older_runs_have_from_their_config(finished_run, tmp_path):
    folder, config, _ = finished_run
    shutil.copytree(folder, tmp_path / "older")
    older = Findings(read_config(config), Run(tmp_path / "older"))
    for name, state in zip(STATES, (BASE, State("", 1), State("", 2), State("dpo", 1)), strict=True):
        file = tmp_path / "older" / name / "attack" / "plan.json"
        written = AttackPlan.from_json(read_json(file))
        file.unlink()
        assert older.plan(state) == written
        assert older.plan(state) is older.plan(state), "read once"
        for attack in written.answered:
            pruned = read_json(folder / name / "attack" / attack.folder / "pruned.json")
            assert attack.size == pruned["neurons"]
            edit = older.attacked(state, attack)
            assert attack.size == (0 if edit is None else len(edit))


def test_an_attack_prunes_what_its_attacker_knows(findings):
    state = State("", 1)
    assert findings.attacked(state, PlannedAttack("FULL", "static")) == findings.neurons(BASE)
    assert findings.attacked(state, PlannedAttack("ES", "adaptive")) == findings.neurons(state, "ES")
    assert findings.attacked(state, PlannedAttack("FULL", "iterated")) == findings.iterated(state)
    assert findings.attacked(state, PlannedAttack("ORI", "none")) is None
    control = findings.attacked(state, PlannedAttack("random", "control"))
    assert len(control) == len(findings.neurons(state))
    assert control - findings.neurons(state) == control
    curve = findings.attacked(state, PlannedAttack("0.02", "curve"))
    assert 0 < len(curve) < len(findings.neurons(state))


def test_the_frozen_set_grows_and_what_it_freezes_stays(finished_run):
    folder, config, _ = finished_run
    findings = Findings(read_config(config), Run(folder))
    first, second = (findings.safety_neurons(findings.chain(State("", number))) for number in (1, 2))
    assert len(first) < len(second)
    assert first - second == NeuronSet.of({}, first.widths, first.fingerprint)
    records = {state: read_json(folder / state / "align" / "frozen.json") for state in STATES[1:]}
    assert [records[state]["frozen"] for state in STATES[1:]] == [len(first), len(second), 0]
    assert all(record["frozen_identical"] and record["free_change"] > 0 for record in records.values())
    models = {"T0": load(config.parent / "model", "float32")}
    models |= {state: load(folder / state / "align" / "model", "float32") for state in STATES[1:]}

    def slices(state: str, neurons: NeuronSet) -> list[torch.Tensor]:
        return [one.parameter.index_select(one.dim, one.index) for one in owned_slices(models[state], neurons)]

    def same(one: str, other: str, neurons: NeuronSet) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(slices(one, neurons), slices(other, neurons), strict=True)]

    assert all(same("T0", "T1", first))
    assert all(same("T1", "T2", second))
    assert all(same("T0", "T2", first)), "what T0's round froze stays frozen"
    assert not any(same("T0", "dpo-T1", first)), "plain DPO moves them"
    assert not any(same("T0", "T1", first.random_like(0, avoid=first))), "the others move"


def test_the_iterated_attacker_starts_where_the_adaptive_one_ends(finished_run):
    folder, config, _ = finished_run
    findings = Findings(read_config(config), Run.open(folder))
    for state in (State("", 0), State("", 2)):
        first, second = (NeuronSet.load(folder / state.name / "iterate" / f"search-{n}.json") for n in (1, 2))
        assert first == findings.neurons(state)
        assert len(second - first) > 0
        assert len(first - second) == 0
        record = read_json(folder / state.name / "attack" / "iterated-FULL" / "pruned.json")
        assert record["neurons"] == len(second)


@pytest.mark.slow
def test_rounds_end_when_the_attack_gains_nothing(finished_run, tmp_path):
    """A tiny random model is never refused by the judge's phrases, so the attack has nothing to gain."""
    _, config, _ = finished_run
    changes = (*SMALL[:2], *SMALL[3:-1], 'attack.knowledge=["adaptive"]', "align.rounds=3", "align.stop_early=true")
    watch = execute(config, tmp_path, changes=changes)
    assert [name for name in watch.of("began") if str(name).endswith("align")] == ["T1/align"]
    assert [state["name"] for state in json.loads(results(tmp_path))["states"]] == ["T0", "T1"]
    assert set(execute(config, tmp_path, changes=changes).of("skipped")) == stages_in(tmp_path)
    going_on = execute(config, tmp_path, changes=[*changes[:-1], "align.stop_early=false"], redo=["report"])
    assert "T3/judge" in going_on.of("ended")
