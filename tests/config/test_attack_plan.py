"""The plan of attacks on a state: which there are, in which order, which are the same, and what is answered."""

from __future__ import annotations

import pytest

from safeneuron.config.attack import AttackTable
from safeneuron.config.attack_plan import AttackPlan, PlannedAttack, kinds_answered, stands_for
from safeneuron.config.states import BASE, State

TRAINED = State("", 1)


def plan(state: State, **settings: object) -> AttackPlan:
    return AttackPlan.of(AttackTable(**settings), state)


def folders(attacks) -> list[str]:
    return [attack.folder for attack in attacks]


def test_on_the_given_model_the_static_attacker_stands_for_the_adaptive_one():
    assert stands_for("adaptive", 0) == "static"
    assert {stands_for(*case) for case in (("adaptive", 1), ("adaptive", 2))} == {"adaptive"}
    assert stands_for("iterated", 0) == "iterated"
    base = plan(BASE, sets=["ES", "FULL"], curve=[])
    assert folders(base.answered) == ["ORI", "static-ES", "static-FULL", "random"]
    assert [(a.set, a.knowledge, a.equal_to) for a in base.attacks[4:]] == [
        ("ES", "adaptive", "static-ES"), ("FULL", "adaptive", "static-FULL"),
    ]  # fmt: skip
    assert base.find("FULL", "adaptive") == base.find("FULL", "static") == PlannedAttack("FULL", "static")
    trained = plan(TRAINED, sets=["FULL"], curve=[])
    assert folders(trained.attacks) == ["ORI", "static-FULL", "adaptive-FULL", "random"]


def test_alone_the_adaptive_attacker_attacks_the_given_model_herself():
    base = plan(BASE, sets=["FULL"], knowledge=["adaptive"], random=False, curve=[])
    assert base.attacks == (PlannedAttack("ORI", "none"), PlannedAttack("FULL", "adaptive"))
    assert base.find("FULL", "static") is None


def test_attacks_come_in_one_order_and_have_folders_of_their_own():
    everything = plan(
        TRAINED, sets=["FULL"], knowledge=["adaptive", "iterated"], curve=[0.02, 0.1], selectors=["contrast", "probe"],
        operators=["mean"], transfer="set.json", attempts=["base64", "direction"],
    )  # fmt: skip
    assert folders(everything.attacks) == [
        "ORI", "adaptive-FULL", "iterated-FULL", "random", "curve-0.02", "curve-0.1", "rival-contrast", "rival-probe",
        "operator-mean", "transfer-FULL", "model-direction", "input-base64",
    ]  # fmt: skip


def test_what_cannot_be_made_is_taken_out_and_sizes_are_put_in():
    full = plan(BASE, sets=["FULL"], random=False, curve=[], attempts=["fine-tune"])
    tuning = full.find("fine-tune", "model")
    left = full.without(tuning)
    assert folders(left.answered) == ["ORI", "static-FULL"]
    sized = left.sized({"ORI": 0, "static-FULL": 7})
    assert [attack.size for attack in sized.attacks] == [0, 7, 7], "equal attacks are of equal size"
    assert AttackPlan.from_json(sized.to_json()) == sized


@pytest.mark.parametrize(
    ("when", "basic", "intact"),
    [("always", ["harmful", "benign"], 2), ("unpruned", ["harmful"], 2), ("never", ["harmful"], 1)],
)
def test_over_refusal_is_measured_under_the_attacks_of_the_paper(when, basic, intact):
    table = AttackTable(over_refusal=when)
    assert kinds_answered(PlannedAttack("FULL", "static"), table) == basic
    assert kinds_answered(PlannedAttack("probe", "rival"), table) == ["harmful"]
    assert kinds_answered(PlannedAttack("base64", "input"), table) == ["harmful"]
    assert len(kinds_answered(PlannedAttack("ORI", "none"), table)) == intact
