"""The tables of an analysis for a terminal: the numbers of each part as a title, a header and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from safeneuron.analysis.depth import DepthRecord
from safeneuron.analysis.disjoint_sets import Interval
from safeneuron.analysis.drift import StatesRecord
from safeneuron.analysis.methods import MethodsRecord
from safeneuron.analysis.portraits import PortraitsRecord
from safeneuron.analysis.records import PartRecord
from safeneuron.analysis.redundancy import RedundancyRecord
from safeneuron.analysis.scaling import ScaleRecord
from safeneuron.analysis.stability import StabilityRecord
from safeneuron.analysis.topics import TopicsRecord
from safeneuron.reporting.summary import READING

MASKED = "(masked; --show-text shows it)"
_UNDEFINED = "–"

TitledTable = tuple[str, list[str], list[list[str]]]


def analysis_tables(records: Mapping[str, PartRecord], show_text: bool = False) -> list[TitledTable]:
    """What the parts of an analysis found, for a terminal.

    Args:
        records: The record of each part, by name.
        show_text: Whether the prompts that excite a neuron are shown; otherwise they are masked.

    Returns:
        A title, a header and rows for each part that has any, the neurons last. The first column is words, the others
        are numbers.
    """
    tables = [_table(record) for record in records.values() if not isinstance(record, PortraitsRecord)]
    tables += [_neurons(record, show_text) for record in records.values() if isinstance(record, PortraitsRecord)]
    return [table for table in tables if table[2]]


def _table(record: PartRecord) -> TitledTable:
    match record:
        case TopicsRecord():
            return _topics(record)
        case DepthRecord():
            return _depth(record)
        case StabilityRecord():
            return _stability(record)
        case StatesRecord():
            return _states(record)
        case RedundancyRecord():
            return _redundancy(record)
        case MethodsRecord():
            return _methods(record)
        case ScaleRecord():
            return _rounds(record)
    raise TypeError(f"a {type(record).__name__} has no table")


def _topics(record: TopicsRecord) -> TitledTable:
    rows = []
    for index, overlap in enumerate(record.overlaps):
        dealt = _percentage(record.shuffled_topics[index].jaccard) if record.shuffled_topics else _UNDEFINED
        chance = _percentage(record.random_neurons[index].jaccard)
        rows.append([f"K = {overlap.topics}", _percentage(overlap.jaccard), dealt, chance, _percentage(overlap.shared)])
    title = (
        f"Topics: {record.core:,} neurons in all {len(record.topics)} (prompts dealt "
        f"at random: {_thousands(record.shuffled_core)}; random neurons: {record.core_by_chance:.1f})"
    )
    return title, ["overlap", "Jaccard", "dealt at random", "random neurons", "of mean size"], rows


def _depth(record: DepthRecord) -> TitledTable:
    rows = [
        [
            placed.name,
            _thousands(placed.neurons),
            *(_percentage(share) for share in placed.thirds),
            _decimals(placed.mean_depth),
        ]
        for placed in record.sets
    ]
    return "Depth", ["set", "neurons", "early", "middle", "late", "mean depth"], rows


def _stability(record: StabilityRecord) -> TitledTable:
    boot, needed = record.bootstrap, record.needed
    lines = [("bootstrap against all prompts", boot.jaccard.mean, boot.correlation.mean, math.nan)]
    lines += [
        (f"two samples of {sample.prompts}", sample.mean, sample.correlation, sample.chance)
        for sample in record.samples
    ]
    lines += [
        (f"measured with {measured.variant}", measured.jaccard, measured.correlation, math.nan)
        for measured in record.variants
    ]
    for also in record.also:
        comparisons = (
            (f"prompts of {also.prompts_of}", also.jaccard, also.correlation),
            (f"  of the same {also.same_requests} requests", also.wording.jaccard, also.wording.correlation),
            ("  these, as the run has them, against all", also.fewer.jaccard, also.fewer.correlation),
        )
        lines += [(*comparison, math.nan) for comparison in comparisons if not math.isnan(comparison[1])]
    rows = [[words, *map(_decimals, numbers)] for words, *numbers in lines]
    wanted = "not reached" if needed.prompts is None else f"{needed.prompts:,} prompts ({needed.reached})"
    title = f"Stability: {boot.always:,} of {record.neurons:,} neurons always in; Jaccard .9: {wanted}"
    return title, ["sets", "Jaccard", "rank correlation", "by chance"], rows


def _states(record: StatesRecord) -> TitledTable:
    rows = []
    for state in record.states:
        turnover, moved = state.turnover, state.moved or []
        rows.append(
            [
                state.state,
                *(_thousands(sum(counts)) for counts in (turnover.kept, turnover.lost, turnover.new)),
                _decimals(_mean([layer.inside for layer in moved]), 4),
                _decimals(_mean([layer.outside for layer in moved]), 4),
                _decimals(_mean(state.cka_unsafe)),
                _decimals(_mean(state.cka_safe)),
                _decimals(_mean(state.separability)),
                _decimals(_mean(state.separability_pruned)),
            ]
        )
    header = [
        "state", "kept", "lost", "new", "moved in", "moved out", "CKA harmful", "CKA benign", "probe", "probe pruned",
    ]  # fmt: skip
    return "States against T0 (means over layers)", header, rows


def _redundancy(record: RedundancyRecord) -> TitledTable:
    rows = []
    for state in record.states:
        tried, pruned = len(state.sets), state.curve[-1].neurons
        most = {"redundancy_index": tried, "coherent_index": tried, "sets_to_halve": tried, "neurons_to_halve": pruned}
        bounds = [_bounded(state.numbers[name], (state.intervals or {}).get(name), end) for name, end in most.items()]
        rows.append([state.state, _percentage(state.intact.refused), *bounds])
    title = f"Redundancy, with 95 % intervals over prompts. {READING}"
    return title, ["state", "refused", "break alone", "coherently", "sets to halve", "top neurons to halve"], rows


def _methods(record: MethodsRecord) -> TitledTable:
    rows = [
        [
            chosen.label,
            _thousands(chosen.selected),
            _thousands(chosen.significant),
            _thousands(chosen.missed),
            _decimals(chosen.largest_q, 3),
        ]
        for chosen in record.discoveries
    ]
    return "False discoveries", ["set", "neurons", "q < .05", "q < .05, not taken", "largest q"], rows


def _rounds(record: ScaleRecord) -> TitledTable:
    rows = [
        [state.state, _thousands(state.neurons), _thousands(state.frozen), *map(_percentage, state.rates.values())]
        for state in record.iterations
    ]
    names = [f"ASR {name}" for name in record.iterations[0].rates] if record.iterations else []
    return "Rounds", ["state", "neurons", "frozen", *names], rows


def _neurons(record: PortraitsRecord, show_text: bool) -> TitledTable:
    rows = []
    for portrait in record.neurons:
        best = max(portrait.profile, key=lambda name: portrait.profile[name])
        promoted = " ".join(repr(token) for token in portrait.promoted[:4])
        prompt = portrait.exciting[0][:60] if show_text else MASKED
        rows.append([f"{portrait.layer}/{portrait.channel}", _decimals(portrait.d), best, promoted, prompt])
    return "Neurons", ["layer/channel", "d", "category", "promotes", "excited by"], rows


def _mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _decimals(value: float, places: int = 2) -> str:
    """With so many places."""
    return _UNDEFINED if math.isnan(value) else f"{value:.{places}f}"


def _percentage(value: float | None) -> str:
    """In per cent."""
    return _UNDEFINED if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _thousands(value: int | None) -> str:
    """With a comma at each thousand."""
    return _UNDEFINED if value is None else f"{value:,}"


def _bounded(value: int | None, interval: Interval | None, most: int) -> str:
    """A number and its interval, where None is more than the ``most`` that was tried; without an interval, nothing."""
    if interval is None:
        return _UNDEFINED
    number, low, high = (f">{most:,}" if end is None else f"{end:,}" for end in (value, interval.low, interval.high))
    return f"{number} ({low} to {high})"
