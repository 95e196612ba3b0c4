"""The states T0, T1, ... that a config leads to, and which of them each is trained from."""

from __future__ import annotations

from dataclasses import dataclass

from safeneuron.config.attack import AttackTable
from safeneuron.config.schema import Config


@dataclass(frozen=True)
class State:
    """One model: T0 as given, or the result of a round of a training (``variant`` is empty for the main one)."""

    variant: str
    round: int

    @property
    def name(self) -> str:
        """The state's folder."""
        return f"{self.variant}-T{self.round}" if self.variant else f"T{self.round}"


BASE = State("", 0)
"""T0, the model as given."""


def states_of(config: Config) -> list[State]:
    """All states that a config leads to, each after those it is made from: T0, the main rounds, then the variants'.

    Args:
        config: The settings of the run.
    """
    chains = [("", config.align), *((name, config.variant(name)) for name in config.variants)]
    rounds = [State(variant, number) for variant, table in chains for number in range(1, table.rounds + 1)]
    return [BASE, *rounds]


def previous(state: State) -> State:
    """The state that this one was trained from; every variant starts at T0."""
    return State(state.variant if state.round > 1 else "", state.round - 1)


def selectors_for(table: AttackTable, state: State) -> list[str]:
    """The rival selectors that attack the state; T0 has no other state to be contrasted with."""
    return [name for name in table.selectors if name != "contrast" or state != BASE]
