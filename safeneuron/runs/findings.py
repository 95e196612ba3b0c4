"""The states of a run, the attacks on each, and what has been found on them so far, read from the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safeneuron.config.align import AlignTable
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, selectors_for, states_of
from safeneuron.data.types import Prompt
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines
from safeneuron.selection.scores import Scores, choose, thresholds_for


@dataclass(frozen=True)
class Pruning:
    """One attack on a state: which set of neurons is pruned, and what the attacker knew when finding it.

    Beside the paper's attackers ``knowledge`` is ``rival`` (the set is named by its selector), ``operator`` (the FULL
    set of the state itself, named by what becomes of it), ``transfer``, and ``model`` or ``input`` (an attempt without
    pruning, by name).
    """

    set: str
    knowledge: str
    neurons: NeuronSet | Edit | None

    @property
    def folder(self) -> str:
        """The attack's folder inside the state's attack stage."""
        return self.set if self.knowledge in ("none", "control") else f"{self.knowledge}-{self.set}"


CHANGES = ("direction", "fine-tune")
"""The attempts that change the model; the others change the request, or how the answer begins."""


class Findings:
    """What the stages of a run have written, as values; nothing is computed that needs a model."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config = config
        self.run = run

    def chain(self, state: State) -> list[State]:
        """T0 and the states of this training before ``state``: where neurons have been found so far."""
        return [BASE, *(State(state.variant, number) for number in range(1, state.round))]

    def prompts(self, role: str) -> list[Prompt]:
        """The prompts of a role, from the records of this run."""
        folder = self.run.folder / "data"
        return [Prompt.from_record(record, folder) for record in read_lines(folder / f"{role}.jsonl")]

    def classes(self) -> tuple[list[Prompt], list[Prompt]]:
        """The unsafe and the safe prompts on which neurons are found."""
        return self.prompts("unsafe"), self.prompts("safe")

    def neurons(self, state: State, file: str = "neurons") -> NeuronSet:
        """A set found on the state: ``neurons`` (the union), ``ES`` or ``SAS``."""
        return NeuronSet.load(self.run.folder / state.name / "select" / f"{file}.json")

    def iterated(self, state: State) -> NeuronSet:
        """All neurons that the iterated attacker has found on the state."""
        return NeuronSet.load(self.run.folder / state.name / "iterate" / f"search-{self.config.attack.searches}.json")

    def states(self) -> list[State]:
        """The states of the run: all that its config leads to, but for the rounds after one that stopped early."""
        kept: list[State] = []
        stopped: set[str] = set()
        for state in states_of(self.config):
            if state.round > 0 and state.variant in stopped:
                continue
            kept.append(state)
            if state.round > 0 and self.config.variant(state.variant).stop_early and self.withstands(state):
                stopped.add(state.variant)
        return kept

    def withstands(self, state: State) -> bool:
        """Whether the strongest adaptive attack run on the state gains nothing: its interval holds the unpruned rate.

        False as long as it has not been attacked.
        """
        folder = self.run.folder / state.name / "judge"
        attacks = [folder / name / "harmful.json" for name in ("iterated-FULL", "adaptive-FULL")]
        known = [path for path in attacks if path.exists()]
        if not known or not (folder / "done.json").exists():
            return False
        intact = read_json(folder / "ORI" / "harmful.json")
        strongest = max((read_json(path) for path in known), key=lambda counts: float(counts["rate"]))
        return float(strongest["low"]) <= float(intact["rate"])

    def found(self, chain: Sequence[State]) -> NeuronSet:
        """All safety neurons found on these states: the frozen set only grows (Eq. 13)."""
        union, *later = (self.neurons(state) for state in chain)
        for neurons in later:
            union = union | neurons
        return union

    def frozen(self, table: AlignTable, found: NeuronSet) -> NeuronSet | None:
        """What a training freezes."""
        if table.freeze == "none":
            return None
        if table.freeze == "all-but-safety":
            return found.complement()
        return found if table.freeze == "safety" else found.random_like(self.config.seed, avoid=found)

    def prunings(self, state: State) -> list[Pruning]:
        """Every attack on the state; T0's static and adaptive attackers are the same, so static stands for both."""
        table = self.config.attack
        attacks = [Pruning("ORI", "none", None)]
        for knowledge in table.knowledge:
            if knowledge == "iterated":
                attacks.append(Pruning("FULL", knowledge, self.iterated(state)))
                continue
            if knowledge == "adaptive" and state == BASE and "static" in table.knowledge:
                continue
            attacked = BASE if knowledge == "static" else state
            attacks += [
                Pruning(name, knowledge, self.neurons(attacked, "neurons" if name == "FULL" else name))
                for name in table.sets
            ]
        if table.random:
            own = self.neurons(state)
            attacks.append(Pruning("random", "control", own.random_like(self.config.seed, avoid=own)))
        if table.curve:
            scores = Scores.load(self.run.folder / state.name / "select" / "scores.safetensors")
            attacks += [
                Pruning(f"{density:g}", "curve", choose(scores, thresholds_for(scores, density)).union)
                for density in table.curve
            ]
        return [*attacks, *self.further(state)]

    def further(self, state: State) -> list[Pruning]:
        """The attacks beside the paper's: rival selectors, other operators, a sibling's neurons, other attempts."""
        table = self.config.attack
        folder = self.run.folder / state.name
        found = [
            Pruning(name, "rival", NeuronSet.load(folder / "rivals" / f"{name}.json"))
            for name in selectors_for(self.config, state)
        ]
        if table.operators:
            own, stats = self.neurons(state), ActivationStats.load(folder / "measure" / "stats.safetensors")
            edits = {"mean": Edit.mean, "opposite": Edit.opposite}
            found += [Pruning(name, "operator", edits[name](own, stats)) for name in table.operators]
        if table.transfer:
            own = self.neurons(state)
            found.append(
                Pruning("FULL", "transfer", NeuronSet.load(table.transfer).transferred(own.fingerprint, own.widths))
            )
        changes = [name for name in table.attempts if name in ("direction", "fine-tune")]
        if "fine-tune" in changes and not self.demonstrations(state):
            changes.remove("fine-tune")
        found += [Pruning(name, "model", None) for name in changes]
        return found + [
            Pruning(name, "input", None) for name in table.attempts if name not in ("direction", "fine-tune")
        ]

    def demonstrations(self, state: State) -> list[dict[str, Any]]:
        """What the fine-tuning attack on the state learns: records with ``request`` and ``answer``."""
        return read_lines(self.run.folder / state.name / "rivals" / "demonstrations.jsonl")
