"""The redundancy of refusal in a model: disjoint sets found and pruned, the curve of pruning, and the record of both.

Every outcome that costs answers is kept in a folder, so that a stopped search goes on; the measure itself is in
``disjoint_sets``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safeneuron.analysis.disjoint_sets import (
    NUMBERS,
    FoundSet,
    Interval,
    Outcome,
    Redundancy,
    find_prune_find,
    intervals,
)
from safeneuron.analysis.records import Number, PartRecord, TableRow
from safeneuron.analysis.settings import DENSITY_MULTIPLES, Classes, Effort, finder
from safeneuron.attacks.pruning import respond
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.evaluation.judge import Judge
from safeneuron.evaluation.rates import verdict_rates, wilson
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.inputs import measurement_of
from safeneuron.runtime.files import read_json, write_json
from safeneuron.runtime.progress import Progress
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import Scores, choose, thresholds_for


@dataclass(frozen=True)
class OutcomeRecord:
    """The shares of answers by verdict, 0 to 1, and the 95 % Wilson interval of the share refused."""

    refused: Number
    complied: Number
    incoherent: Number
    refused_low: Number
    refused_high: Number


@dataclass(frozen=True)
class _Pruned:
    neurons: int


@dataclass(frozen=True)
class CurvePoint(OutcomeRecord, _Pruned):
    """What is left with so many ``neurons`` from the top of the ranking pruned."""


@dataclass(frozen=True)
class SetRecord:
    """One of the disjoint sets: its size, and what is left when it is pruned alone, and with all found before it."""

    neurons: int
    alone: OutcomeRecord
    together: OutcomeRecord


@dataclass(frozen=True)
class StateRedundancy:
    """The redundancy of one state: its numbers as ``Redundancy.numbers`` has them, with their 95 % intervals.

    ``prompts`` counts the harmful prompts. ``intervals`` are by the number's name, None where there are no numbers to
    have them. ``curve`` begins with the intact model.
    """

    state: str
    prompts: int
    intact: OutcomeRecord
    redundancy_index: int | None
    coherent_index: int | None
    sets_to_halve: int | None
    neurons_in_sets_to_halve: int | None
    neurons_to_halve: int | None
    intervals: dict[str, Interval] | None
    sets: list[SetRecord]
    curve: list[CurvePoint]

    @property
    def numbers(self) -> dict[str, int | None]:
        """All numbers by name."""
        values = (
            self.redundancy_index, self.coherent_index, self.sets_to_halve, self.neurons_in_sets_to_halve,
            self.neurons_to_halve,
        )  # fmt: skip
        return dict(zip(NUMBERS, values, strict=True))

    def row(self) -> TableRow:
        """Each number and both ends of its interval, empty where it is beyond what was tried."""
        row: TableRow = {"state": self.state, "refused": self.intact.refused}
        for name, number in self.numbers.items():
            interval = (self.intervals or {}).get(name, Interval(None, None))
            row |= {name: number, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return row


@dataclass(frozen=True)
class RedundancyRecord(PartRecord):
    """The numbers of the part ``redundancy``, state by state."""

    states: list[StateRedundancy]

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a state, and one a set that was found."""
        sets = [
            {"state": state.state, "set": number, "neurons": each.neurons}
            | {f"{share} alone": value for share, value in asdict(each.alone).items()}
            | {f"{share} together": value for share, value in asdict(each.together).items()}
            for state in self.states
            for number, each in enumerate(state.sets, start=1)
        ]
        return {"redundancy": [state.row() for state in self.states], "sets": sets}


def redundancy_record(
    config: Config,
    model: Model,
    *,
    state: str,
    classes: Classes,
    harmful: Sequence[Prompt],
    judge: Judge,
    scores: Scores,
    folder: Path,
    effort: Effort,
    progress: Progress | None = None,
) -> StateRedundancy:
    """Find, prune, find again, and the curve of pruning.

    Args:
        config: The run's config, for how activations are measured, neurons selected and answers generated.
        model: The state's model.
        state: The state's name.
        classes: The unsafe and safe prompts with which neurons are found.
        harmful: The harmful test prompts whose answers are judged.
        judge: Gives the verdicts.
        scores: The state's scores, along whose ranking the curve goes.
        folder: Every set and every outcome is kept there, and not found again.
        effort: For how many sets.
        progress: Is told of the outcomes that are known.
    """
    outcomes = _Outcomes(config, model, harmful, judge, folder, 2 * effort.sets + len(DENSITY_MULTIPLES), progress)
    settings, find = measurement_of(config), finder(config)

    def search(gone: NeuronSet | None) -> NeuronSet:
        with pruned(model, gone):
            return find(measure(model, *classes, settings))

    result = _resumed(search, outcomes.of, folder, effort.sets)
    if result.measurable:
        density = len(result.sets[0].neurons) / scores.d.numel() if result.sets else 0.01
        curve: list[tuple[int, Outcome]] = []
        for wanted in (min(density * share, 0.5) for share in DENSITY_MULTIPLES):
            neurons = choose(scores, thresholds_for(scores, wanted)).union
            curve.append((len(neurons), outcomes.of(neurons, f"density-{wanted:.4g}")))
        result = replace(result, curve=tuple(curve))
    return StateRedundancy(
        state=state,
        prompts=len(harmful),
        intact=_record_of(result.intact),
        **result.numbers,
        intervals=intervals(result, seed=config.seed),
        sets=[SetRecord(len(each.neurons), _record_of(each.alone), _record_of(each.together)) for each in result.sets],
        curve=[
            CurvePoint(neurons=count, **asdict(_record_of(left))) for count, left in [(0, result.intact), *result.curve]
        ],
    )


class _Outcomes:
    """Verdicts on the answers of a model with neurons pruned; those that the folder holds are read from it."""

    def __init__(
        self,
        config: Config,
        model: Model,
        harmful: Sequence[Prompt],
        judge: Judge,
        folder: Path,
        total: int,
        progress: Progress | None,
    ) -> None:
        self.config, self.model, self.harmful, self.judge, self.folder = config, model, harmful, judge, folder
        self.known, self.total, self.progress = 0, total, progress

    def of(self, neurons: NeuronSet | None, name: str) -> Outcome:
        """The outcome with these neurons pruned, which is kept by that name."""
        path = self.folder / f"{name}.json"
        if not path.exists() or "verdicts" not in read_json(path):
            with pruned(self.model, neurons):
                attack = self.config.attack
                batches = respond(
                    self.model, self.harmful, max_new_tokens=attack.max_new_tokens, batch_size=attack.batch_size
                )
                responses = sorted((each for batch in batches for each in batch), key=lambda each: each.index)
            verdicts = self.judge([each.prompt for each in responses], [each.response for each in responses])
            counts = {**verdict_rates(verdicts, "refused"), "neurons": 0 if neurons is None else len(neurons)}
            write_json(path, {**counts, "verdicts": verdicts})
        self.known += 1
        if self.progress is not None:
            self.progress(self.known, self.total)
        return Outcome(tuple(read_json(path)["verdicts"]))


def _record_of(outcome: Outcome) -> OutcomeRecord:
    refused = wilson(outcome.verdicts.count("refused"), len(outcome.verdicts))
    return OutcomeRecord(outcome.refused, outcome.complied, outcome.incoherent, refused.low, refused.high)


def _resumed(
    find: Callable[[NeuronSet | None], NeuronSet],
    outcome: Callable[[NeuronSet | None, str], Outcome],
    folder: Path,
    most: int,
) -> Redundancy:
    """Find-prune-find that goes on after the sets that the folder holds."""
    intact, known = outcome(None, "intact"), list[FoundSet]()

    def named(gone: NeuronSet | None) -> Outcome:
        assert gone is not None, "the intact model is known"
        number = len(known) + 1
        alone = not (folder / f"set-{number}.json").exists()
        if alone:
            gone.save(folder / f"set-{number}.json")
        return outcome(gone, f"{'alone' if alone else 'together'}-{number}")

    while (path := folder / f"set-{len(known) + 1}.json").exists() and len(known) < most:
        number, neurons = len(known) + 1, NeuronSet.load(path)
        alone = outcome(neurons, f"alone-{number}")
        gone = neurons
        for earlier in known:
            gone = gone | earlier.neurons
        known.append(FoundSet(neurons, alone, outcome(gone, f"together-{number}") if known else alone))
    return find_prune_find(find, named, most, known.append, tuple(known), intact)
