"""The states of a run, the attacks on each, and what has been found on them so far, read from the run's folder."""

from __future__ import annotations

from collections.abc import Sequence

from safeneuron.attacks.finetuning import Demonstration
from safeneuron.config.align import AlignTable
from safeneuron.config.attack_plan import AttackPlan, PlannedAttack
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, states_of
from safeneuron.data.types import Prompt
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines
from safeneuron.selection.scores import Scores, choose, thresholds_for

PLAN = "plan.json"
"""The file of the attack stage with its plan."""


class Findings:
    """What the stages of a run have written, as values; nothing is computed that needs a model."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config = config
        self.run = run
        self._plans: dict[State, AttackPlan] = {}

    def chain(self, state: State) -> list[State]:
        """T0 and the states of this training before ``state``: where neurons have been found so far."""
        return [BASE, *(State(state.variant, number) for number in range(1, state.round))]

    def prompts(self, role: str) -> list[Prompt]:
        """The prompts of a role, from the records of this run.

        Args:
            role: ``unsafe``, ``safe``, ``test_unsafe`` or ``test_safe``.
        """
        folder = self.run.folder / "data"
        return [Prompt.from_record(record, folder) for record in read_lines(folder / f"{role}.jsonl")]

    def classes(self) -> tuple[list[Prompt], list[Prompt]]:
        """The unsafe and the safe prompts on which neurons are found."""
        return self.prompts("unsafe"), self.prompts("safe")

    def neurons(self, state: State, file: str = "neurons") -> NeuronSet:
        """A set found on the state.

        Args:
            state: Any state whose neurons are known.
            file: ``neurons`` (the union), ``ES`` or ``SAS``.
        """
        return NeuronSet.load(self.run.folder / state.name / "select" / f"{file}.json")

    def iterated(self, state: State) -> NeuronSet:
        """All neurons that the iterated attacker has found on the state."""
        return NeuronSet.load(self.run.folder / state.name / "iterate" / f"search-{self.config.attack.searches}.json")

    def states(self) -> list[State]:
        """The states of the run: all that its config leads to, but for the rounds after one that stopped early."""
        states: list[State] = []
        stopped: set[str] = set()
        for state in states_of(self.config):
            if state.round > 0 and state.variant in stopped:
                continue
            states.append(state)
            if state.round > 0 and self.config.variant(state.variant).stop_early and self.withstands(state):
                stopped.add(state.variant)
        return states

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

    def safety_neurons(self, chain: Sequence[State]) -> NeuronSet:
        """All safety neurons found on these states: the frozen set only grows (Eq. 13).

        Args:
            chain: One or more states, as ``chain`` gives them.
        """
        union, *later = (self.neurons(state) for state in chain)
        for neurons in later:
            union = union | neurons
        return union

    def frozen(self, table: AlignTable, safety: NeuronSet) -> NeuronSet | None:
        """What a training freezes; None for nothing.

        Args:
            table: The training.
            safety: All safety neurons found before it.
        """
        if table.freeze == "none":
            return None
        if table.freeze == "all-but-safety":
            return safety.complement()
        return safety if table.freeze == "safety" else safety.random_like(self.config.seed, avoid=safety)

    def plan(self, state: State) -> AttackPlan:
        """Every attack on the state, as its attack stage has written it, or will.

        Runs that were attacked before there was such a file have the same plan, from their config.
        """
        folder = self.run.folder / state.name / "attack"
        if state not in self._plans:
            file = folder / PLAN
            plan = AttackPlan.from_json(read_json(file)) if file.exists() else self._plan(state)
            if not (folder / "done.json").exists():
                return plan
            self._plans[state] = plan
        return self._plans[state]

    def _plan(self, state: State) -> AttackPlan:
        """The plan from the config, with the sizes of the attacks that have been made."""
        folder = self.run.folder / state.name / "attack"
        plan = AttackPlan.of(self.config.attack, state)
        tuning = plan.find("fine-tune", "model")
        if tuning is not None and not self.demonstrations(state):
            plan = plan.without(tuning)
        files = {attack.folder: folder / attack.folder / "pruned.json" for attack in plan.answered}
        return plan.sized({name: int(read_json(file)["neurons"]) for name, file in files.items() if file.exists()})

    def attacked(self, state: State, attack: PlannedAttack) -> NeuronSet | Edit | None:
        """What an attack prunes or edits on the state; None for one that leaves the neurons alone.

        Raises:
            InputError: If the neurons of a transfer are those of a model of another shape.
        """
        folder = self.run.folder / state.name
        file = "neurons" if attack.set == "FULL" else attack.set
        match attack.knowledge:
            case "static":
                return self.neurons(BASE, file)
            case "adaptive":
                return self.neurons(state, file)
            case "iterated":
                return self.iterated(state)
            case "control":
                neurons = self.neurons(state)
                return neurons.random_like(self.config.seed, avoid=neurons)
            case "curve":
                scores = Scores.load(folder / "select" / "scores.safetensors")
                return choose(scores, thresholds_for(scores, self._density(attack))).union
            case "rival":
                return NeuronSet.load(folder / "rivals" / f"{attack.set}.json")
            case "operator":
                edit = {"mean": Edit.mean, "opposite": Edit.opposite}[attack.set]
                return edit(self.neurons(state), ActivationStats.load(folder / "measure" / "stats.safetensors"))
            case "transfer":
                neurons = self.neurons(state)
                given = NeuronSet.load(self.config.attack.transfer)
                return given.transferred(neurons.fingerprint, neurons.widths)
            case _:
                return None

    def _density(self, attack: PlannedAttack) -> float:
        """The share of neurons at a point of the curve, as the config has it: its name may be rounded."""
        return next(density for density in self.config.attack.curve if f"{density:g}" == attack.set)

    def demonstrations(self, state: State) -> list[Demonstration]:
        """What the fine-tuning attack on the state learns."""
        records = read_lines(self.run.folder / state.name / "rivals" / "demonstrations.jsonl")
        return [Demonstration(record["request"], record["answer"]) for record in records]
