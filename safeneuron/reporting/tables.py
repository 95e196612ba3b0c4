"""The tables of the report: states by attacks for people, and every count for other programs.

A table is a header and rows of text; records are dicts of plain values, of which a CSV file is made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from safeneuron.evaluation.rates import Rate
from safeneuron.reporting.details import Provenance, StrongNeuron
from safeneuron.reporting.formatting import NOTHING, Table, attack_title, decimal, interval, p_value, percent
from safeneuron.reporting.records import CapabilityScore, SelectionResult, StateDifference, TrainingResult
from safeneuron.reporting.results import INTACT, OUTCOMES, AttackResult, Counts, RunResults, StateResults

GROUP = 20
"""Categories of fewer benign requests on average tell too little to be shown apart."""
CsvRecord = dict[str, object]


@dataclass(frozen=True)
class Cell:
    """One cell of a table of states by attacks; ``same`` where it repeats the static attack, by definition."""

    share: Rate | None
    perplexity: float | None = None
    same: bool = False

    def text(self) -> str:
        """Rate, interval in brackets, and counts."""
        if self.share is None:
            return NOTHING
        if self.same:
            return f"{percent(self.share.rate)} (= static)"
        return f"{percent(self.share.rate)} ({interval(self.share)}) {self.share.count}/{self.share.n}"


def cells_of(
    results: RunResults, share: Callable[[StateResults, str, str], Rate | None]
) -> list[tuple[StateResults, list[Cell]]]:
    """Every state with its cells in the order of the run's columns.

    Args:
        results: The results of a run.
        share: What a cell shows: ``StateResults.success`` or ``StateResults.over_refusal``.
    """
    return [
        (
            state,
            [
                Cell(share(state, *column), state.perplexity(*column), state.repeats_static(column[1]))
                for column in results.columns()
            ],
        )
        for state in results.states
    ]


def success_cells(results: RunResults) -> list[tuple[StateResults, list[Cell]]]:
    """The cells of the attack success rates."""
    return cells_of(results, StateResults.success)


def refusal_cells(results: RunResults) -> list[tuple[StateResults, list[Cell]]]:
    """The cells of the over-refusal."""
    return cells_of(results, StateResults.over_refusal)


def attack_table(results: RunResults) -> Table:
    """THE table: attack success rate with interval and counts, states by attacks.

    Args:
        results: The results of a run.

    Returns:
        A row for each state, a column for each attack.
    """
    header = ["state", *(attack_title(*column) for column in results.columns())]
    return Table(header, [[state.name, *(cell.text() for cell in cells)] for state, cells in success_cells(results)])


def further_table(results: RunResults) -> Table:
    """The attacks beside the paper's, one row each: success with interval, and what else was refused and incoherent."""
    rows = [
        [attack_title(*attack), *(outcome_cell(state.attack(*attack)) for state in results.states)]
        for attack in results.further()
    ]
    return Table(["attack", *(state.name for state in results.states)], rows)


def outcome_cell(attack: AttackResult | None) -> str:
    """Success with its interval, then the shares refused and incoherent."""
    success = attack.success if attack else None
    if attack is None or success is None or attack.harmful is None:
        return NOTHING
    shares = (attack.harmful.share(verdict) for verdict in ("refused", "incoherent"))
    refused, broken = (NOTHING if share is None else percent(share) for share in shares)
    return f"{percent(success.rate)} ({interval(success)}); {refused}, {broken}"


def refusal_table(results: RunResults) -> Table:
    """Over-refusal of benign requests and perplexity, states by attacks.

    Args:
        results: The results of a run.

    Returns:
        A row for each state, a column for each attack; the perplexity stands after a semicolon.
    """
    header = ["state", *(attack_title(*column) for column in results.columns())]
    rows = []
    for state, cells in refusal_cells(results):
        texts = [
            cell.text() if cell.perplexity is None else f"{cell.text()}; {decimal(cell.perplexity)}" for cell in cells
        ]
        rows.append([state.name, *texts])
    return Table(header, rows)


def outcome_table(results: RunResults) -> Table:
    """How the answers to harmful requests split.

    Args:
        results: The results of a run.

    Returns:
        A row for each state and attack: the neurons pruned, the number of answers, and the count of each verdict.
    """
    rows = []
    for state in results.states:
        for attack in state.attacks:
            title, counts = attack_title(attack.set, attack.knowledge), attack.harmful
            numbers = [counts.n, *(counts.count(outcome) for outcome in OUTCOMES)] if counts else []
            cells = [f"{value:,}" for value in (attack.neurons, *numbers)]
            rows.append([state.name, title, *cells, *[NOTHING] * (2 + len(OUTCOMES) - len(cells))])
    return Table(["state", "pruned", "neurons", "n", *OUTCOMES], rows)


def state_table(results: RunResults) -> Table:
    """What was found in every state, and how it was trained."""
    header = ["state", "thresholds", "ES", "SAS", "FULL", "share", "q < .05", "overlap with T0"]
    header += ["frozen", "pairs", "steps", "rest moved by"]
    return Table(
        header,
        [[state.name, *selection_cells(state.neurons), *training_cells(state.align)] for state in results.states],
    )


def selection_cells(selection: SelectionResult | None) -> list[str]:
    """Thresholds, sizes of the sets and overlap of one state."""
    if selection is None:
        return [NOTHING] * 7
    thresholds = f"d > {selection.effect_size_threshold:.2f}, z > {selection.shift_threshold:.2f}"
    counts = [f"{count:,}" for count in (selection.es, selection.sas, selection.full)]
    share = f"{100 * selection.density:.2f}\u00a0%"
    return [thresholds, *counts, share, f"{selection.significant:,}", f"{selection.jaccard_with_t0:.2f}"]


def training_cells(training: TrainingResult | None) -> list[str]:
    """What was frozen, the size of the training, and how far the rest moved."""
    if training is None:
        return [NOTHING] * 4
    extras = [name for name, used in (("ablate", training.ablate), ("refresh", training.refresh)) if used]
    variant = " + ".join([training.freeze, *extras])
    kept = "" if training.frozen_identical or not training.frozen else ", NOT kept"
    moved = f"{100 * training.free_change:.2g}\u00a0%"
    return [f"{training.frozen:,} ({variant}{kept})", f"{training.pairs:,}", f"{training.steps:,}", moved]


def difference_table(differences: Sequence[StateDifference]) -> Table:
    """Paired differences, one row each; where runs are compared, the state of both stands first."""
    header = ["compared", "share of requests", "n", "first", "second", "difference (points)"]
    header += ["only first", "only second", "p", "p, corrected"]
    across_runs = any(difference.state is not None for difference in differences)
    rows = []
    for record in differences:
        shares = [f"{record.n:,}", percent(record.first_rate), percent(record.second_rate), difference_points(record)]
        tests = [f"{record.lost:,}", f"{record.gained:,}", p_value(record.p), p_value(record.p_corrected)]
        what = f"{record.verdict}, {attack_title(record.set, record.knowledge)}"
        names = [record.state or NOTHING] if across_runs else []
        rows.append([*names, f"{record.first}, {record.second}", what, *shares, *tests])
    return Table(["state", *header] if across_runs else header, rows)


def difference_points(record: StateDifference) -> str:
    """A difference with its interval, in points."""
    value, low, high = (f"{100 * end:+.0f}" for end in (record.difference, record.low, record.high))
    return f"{value} ({low} to {high})"


def category_table(results: RunResults) -> Table:
    """Over-refusal with nothing pruned by category of the requests; no rows where that would be too few in each."""
    groups: list[Mapping[str, Counts]] = [state.refusals_by_category or {} for state in results.states]
    sizes = {category: counts.n for by_category in groups for category, counts in by_category.items()}
    header = ["category", *(state.name for state in results.states)]
    if len(sizes) < 2 or sum(sizes.values()) < GROUP * len(sizes):
        return Table(header, [])
    rows = []
    for category in sizes:
        known = [by_category.get(category) for by_category in groups]
        cells = [Cell(counts.counted("refused") if counts else None).text() for counts in known]
        rows.append([category or "(none)", *cells])
    return Table(header, rows)


def capability_table(results: RunResults) -> Table:
    """Scores of the capability benchmarks with their standard errors, one row a state and pruning."""
    states = [(state.name, state.capability or {}) for state in results.states]
    tasks = list(dict.fromkeys(task for _, by_pruning in states for scores in by_pruning.values() for task in scores))
    rows = []
    for name, by_pruning in states:
        for pruned, scores in sorted(by_pruning.items(), key=lambda item: item[0] != INTACT[0]):
            rows.append([name, pruned, *(score_cell(scores[task]) if task in scores else NOTHING for task in tasks)])
    return Table(["state", "pruned", *tasks], rows)


def score_cell(score: CapabilityScore) -> str:
    """A score in per cent, its standard error, and the number of questions."""
    return f"{100 * score.value:.1f} ± {100 * score.stderr:.1f} (n = {score.n:,})"


def stage_table(provenance: Provenance) -> Table:
    """Seconds and peak memory of every stage."""
    rows = []
    for cost in provenance.stages:
        memory = NOTHING if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:,.0f}"
        rows.append([cost.stage, f"{cost.seconds:,.1f}", memory])
    return Table(["stage", "seconds", "peak memory (MB)"], rows)


# -- for other programs -----------------------------------------------------------------------------------------------


def attack_records(results: RunResults) -> list[CsvRecord]:
    """One record a state and attack with all counts and rates."""
    records = []
    for state in results.states:
        for attack in state.attacks:
            record = _state_names(state)
            record |= {"set": attack.set, "knowledge": attack.knowledge, "neurons": attack.neurons}
            for kind, rate, counts in (
                ("harmful", "attack_success", attack.harmful),
                ("benign", "over_refusal", attack.benign),
            ):
                record[f"{kind}_n"] = counts.n if counts else None
                for outcome in OUTCOMES:
                    record[f"{kind}_{outcome.replace(' ', '_')}"] = counts.count(outcome) if counts else None
                ends = (counts.rate, counts.low, counts.high) if counts else (None, None, None)
                record |= dict(zip((f"{rate}_rate", f"{rate}_low", f"{rate}_high"), ends, strict=True))
            record["perplexity"] = attack.perplexity
            records.append(record)
    return records


def state_records(results: RunResults) -> list[CsvRecord]:
    """One record a state: neurons, alignment and the last training step."""
    records = []
    for state in results.states:
        neurons, align, last = state.neurons, state.align, state.training[-1] if state.training else None
        record = _state_names(state)
        for key, name in _SELECTION_COLUMNS.items():
            record[key] = asdict(neurons)[name] if neurons else None
        for key in _TRAINING_COLUMNS:
            record[key] = asdict(align)[key] if align else None
        for key in ("loss", "accuracy", "margin"):
            record[f"last_{key}"] = asdict(last)[key] if last else None
        records.append(record)
    return records


_SELECTION_COLUMNS = {
    "effect_size_threshold": "effect_size_threshold",
    "shift_threshold": "shift_threshold",
    "ES": "es",
    "SAS": "sas",
    "FULL": "full",
    "density": "density",
    "significant": "significant",
    "jaccard_with_T0": "jaccard_with_t0",
}
_TRAINING_COLUMNS = ("freeze", "ablate", "refresh", "frozen", "steps", "pairs", "frozen_identical", "free_change")


def _state_names(state: StateResults) -> CsvRecord:
    return {"state": state.name, "label": state.label, "round": state.round, "variant": state.variant}


def difference_records(differences: Sequence[StateDifference]) -> list[CsvRecord]:
    """One record a paired difference; its state only where runs are compared."""
    records = [asdict(difference) for difference in differences]
    return [{key: value for key, value in record.items() if value is not None} for record in records]


def neuron_records(neurons: Mapping[str, Sequence[StrongNeuron]]) -> list[CsvRecord]:
    """One record for each of the strongest neurons of every state."""
    return [
        {
            "state": state,
            "layer": neuron.layer,
            "neuron": neuron.channel,
            "d": neuron.d,
            "z": neuron.z,
            "ES": neuron.criteria & 1,
            "SAS": neuron.criteria >> 1,
        }
        for state, strongest in neurons.items()
        for neuron in strongest
    ]


def as_csv(records: Sequence[Mapping[str, object]]) -> str:
    """Records as CSV with a header; None is empty.

    Args:
        records: All with the keys of the first, which are the header.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
