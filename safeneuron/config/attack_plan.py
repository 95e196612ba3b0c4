"""The attacks on each state that a config leads to: which there are, in which order, and which of them are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from safeneuron.config.attack import AttackTable
from safeneuron.config.states import BASE, State, selectors_for

BASIC = ("none", "static", "adaptive", "iterated", "control")
"""The knowledge of the paper's attackers, and of the controls: harmless requests are answered under these alone."""
CHANGES = ("direction", "fine-tune")
"""The attempts that change the model; the others change the request, or how the answer begins."""


def stands_for(knowledge: str, round_: int) -> str:
    """The knowledge whose attack stands for this one on a state of this round.

    The static attacker prunes what was found on T0, the adaptive one what was found on the state itself: on T0 they are
    one, and static stands for both.
    """
    return "static" if knowledge == "adaptive" and round_ == 0 else knowledge


@dataclass(frozen=True)
class PlannedAttack:
    """One attack on a state: which set of neurons is pruned, and what the attacker knew when finding it.

    Attributes:
        set: The set's name: ORI (none), ES, SAS, FULL, random, the share of a point of the curve, or what names an
            attack beside the paper's.
        knowledge: That of an attacker in ``BASIC``, ``curve``, ``rival`` (the set is named by its selector),
            ``operator`` (the FULL set of the state itself, named by what becomes of it), ``transfer``, or ``model`` and
            ``input`` (an attempt without pruning, by name).
        size: How many neurons are touched; None as long as that is not known.
        equal_to: The folder of the attack whose answers are this one's too; empty for one with answers of its own.
    """

    set: str
    knowledge: str
    size: int | None = None
    equal_to: str = ""

    @property
    def folder(self) -> str:
        """The folder of the attack's answers inside the state's attack stage, and of their verdicts."""
        if self.equal_to:
            return self.equal_to
        return self.set if self.knowledge in ("none", "control") else f"{self.knowledge}-{self.set}"


@dataclass(frozen=True)
class AttackPlan:
    """Every attack on one state, in the order in which they are made; those equal to another one are last."""

    attacks: tuple[PlannedAttack, ...]

    @classmethod
    def of(cls, table: AttackTable, state: State) -> AttackPlan:
        """What a config plans for the state.

        Args:
            table: The attacks that are asked for.
            state: The attacked state.

        Returns:
            The plan, without sizes.
        """
        attacks = [PlannedAttack("ORI", "none")]
        for knowledge in table.knowledge:
            stand_in = stands_for(knowledge, state.round)
            if knowledge == "iterated":
                attacks.append(PlannedAttack("FULL", knowledge))
            elif stand_in == knowledge or stand_in not in table.knowledge:
                attacks += [PlannedAttack(name, knowledge) for name in table.sets]
        if table.random:
            attacks.append(PlannedAttack("random", "control"))
        attacks += [PlannedAttack(f"{density:g}", "curve") for density in table.curve]
        attacks += [PlannedAttack(name, "rival") for name in selectors_for(table, state)]
        attacks += [PlannedAttack(name, "operator") for name in table.operators]
        if table.transfer:
            attacks.append(PlannedAttack("FULL", "transfer"))
        attacks += [PlannedAttack(name, "model") for name in table.attempts if name in CHANGES]
        attacks += [PlannedAttack(name, "input") for name in table.attempts if name not in CHANGES]
        if state == BASE:
            stand_in = stands_for("adaptive", state.round)
            equal = [attack for attack in attacks if attack.knowledge == stand_in]
            attacks += [PlannedAttack(attack.set, "adaptive", equal_to=attack.folder) for attack in equal]
        return cls(tuple(attacks))

    @property
    def answered(self) -> list[PlannedAttack]:
        """The attacks with answers of their own."""
        return [attack for attack in self.attacks if not attack.equal_to]

    def find(self, name: str, knowledge: str) -> PlannedAttack | None:
        """The attack whose answers are those under this set and knowledge; None if there is none."""
        for attack in self.attacks:
            if (attack.set, attack.knowledge) == (name, knowledge):
                return next(other for other in self.answered if other.folder == attack.folder)
        return None

    def without(self, attack: PlannedAttack) -> AttackPlan:
        """The plan without one attack, which cannot be made."""
        return AttackPlan(tuple(other for other in self.attacks if other != attack))

    def sized(self, sizes: Mapping[str, int]) -> AttackPlan:
        """The plan with the sizes of attacks by their folders."""
        return AttackPlan(tuple(replace(attack, size=sizes.get(attack.folder, attack.size)) for attack in self.attacks))

    def to_json(self) -> dict[str, Any]:
        """As an object that JSON can write."""
        return {"schema": 1, "attacks": [asdict(attack) for attack in self.attacks]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AttackPlan:
        """From such an object."""
        return cls(tuple(PlannedAttack(**attack) for attack in record["attacks"]))


def kinds_answered(attack: PlannedAttack, table: AttackTable) -> list[str]:
    """Which test prompts are answered under an attack: ``harmful``, and ``benign`` where over-refusal is measured."""
    benign = table.over_refusal == "always" or (table.over_refusal == "unpruned" and attack.knowledge == "none")
    return ["harmful", "benign"] if benign and attack.knowledge in BASIC else ["harmful"]
