"""The tables of the report: states by attacks for people, and every count for other programs.

A table is a header and rows of text; records are dicts of plain values, of which a CSV file is made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeneuron.reporting.results import (
    Share,
    attack_of,
    attack_title,
    columns_of,
    decimal,
    further_of,
    judged_count,
    judged_share,
    percent,
    refusal_of,
    same_as_static,
    success_of,
)

GROUP = 20
"""Categories of fewer benign requests on average tell too little to be shown apart."""
OUTCOMES = ("refused", "complied", "harmless", "incoherent", "cannot say")
_RATE_COLUMNS = ("rate", "low", "high")
FOUND = (
    "effect_size_threshold",
    "shift_threshold",
    "ES",
    "SAS",
    "FULL",
    "density",
    "significant",
    "jaccard_with_T0",
)
TRAINED = ("freeze", "ablate", "refresh", "frozen", "steps", "pairs", "frozen_identical", "free_change")
NOTHING = "\u2013"

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Cell:
    """One cell of a table of states by attacks; ``same`` where it repeats the static attack, by definition."""

    share: Share | None
    perplexity: float | None
    same: bool

    def text(self) -> str:
        """Rate, interval in brackets, and counts."""
        if self.share is None:
            return NOTHING
        if self.same:
            return f"{percent(self.share.rate)} (= static)"
        return f"{percent(self.share.rate)} ({self.share.interval()}) {self.share.hits}/{self.share.total}"


def cells_of(
    results: dict[str, Any], share: Callable[[dict[str, Any] | None], Share | None]
) -> list[tuple[dict[str, Any], list[Cell]]]:
    """Every state with its cells in the order of ``columns_of``."""
    rows = []
    for state in results["states"]:
        attacks = [(attack_of(state, which, knowledge), knowledge) for which, knowledge in columns_of(results)]
        cells = [
            Cell(share(attack), attack["perplexity"] if attack else None, same_as_static(state, knowledge))
            for attack, knowledge in attacks
        ]
        rows.append((state, cells))
    return rows


def attack_table(results: dict[str, Any]) -> Table:
    """THE table: attack success rate with interval and counts, states by attacks."""
    header = ["state", *(attack_title(*column) for column in columns_of(results))]
    return header, [[state["name"], *(cell.text() for cell in cells)] for state, cells in cells_of(results, success_of)]


def further_table(results: dict[str, Any]) -> Table:
    """The attacks beside the paper's, one row each: success with interval, and what else was refused and incoherent."""
    states = results["states"]
    rows = []
    for which, knowledge in further_of(results):
        cells = [outcome_cell(attack_of(state, which, knowledge)) for state in states]
        rows.append([attack_title(which, knowledge), *cells])
    return ["attack", *(state["name"] for state in states)], rows


def outcome_cell(attack: dict[str, Any] | None) -> str:
    """Success with its interval, then the shares refused and incoherent."""
    success = success_of(attack)
    if attack is None or success is None:
        return NOTHING
    counts = attack["harmful"]
    refused, broken = (percent(counts[verdict] / judged_count(counts)) for verdict in ("refused", "incoherent"))
    return f"{percent(success.rate)} ({success.interval()}); {refused}, {broken}"


def refusal_table(results: dict[str, Any]) -> Table:
    """Over-refusal of benign requests and perplexity, states by attacks."""
    header = ["state", *(attack_title(*column) for column in columns_of(results))]
    rows = []
    for state, cells in cells_of(results, refusal_of):
        texts = [
            cell.text() if cell.perplexity is None else f"{cell.text()}; {decimal(cell.perplexity)}" for cell in cells
        ]
        rows.append([state["name"], *texts])
    return header, rows


def outcome_table(results: dict[str, Any]) -> Table:
    """How the answers to harmful requests split, one row a state and attack."""
    rows = []
    for state in results["states"]:
        for attack in state["attacks"]:
            counts = attack["harmful"]
            title = attack_title(attack["set"], attack["knowledge"])
            numbers = [attack["neurons"], counts["n"], *(counts[outcome] for outcome in OUTCOMES)]
            rows.append([state["name"], title, *(f"{value:,}" for value in numbers)])
    return ["state", "pruned", "neurons", "n", *OUTCOMES], rows


def state_table(results: dict[str, Any]) -> Table:
    """What was found in every state, and how it was trained."""
    header = ["state", "thresholds", "ES", "SAS", "FULL", "share", "q < .05", "overlap with T0"]
    header += ["frozen", "pairs", "steps", "rest moved by"]
    states = results["states"]
    return header, [[state["name"], *found_cells(state["neurons"]), *trained_cells(state["align"])] for state in states]


def found_cells(found: dict[str, Any] | None) -> list[str]:
    """Thresholds, sizes of the sets and overlap of one state."""
    if not found:
        return [NOTHING] * 7
    thresholds = f"d > {found['effect_size_threshold']:.2f}, z > {found['shift_threshold']:.2f}"
    counts = [f"{found[key]:,}" for key in ("ES", "SAS", "FULL")]
    share = f"{100 * found['density']:.2f}\u00a0%"
    return [thresholds, *counts, share, f"{found['significant']:,}", f"{found['jaccard_with_T0']:.2f}"]


def trained_cells(trained: dict[str, Any] | None) -> list[str]:
    """What was frozen, the size of the training, and how far the rest moved."""
    if not trained:
        return [NOTHING] * 4
    extras = [name for name in ("ablate", "refresh") if trained[name]]
    variant = " + ".join([trained["freeze"], *extras])
    kept = "" if trained["frozen_identical"] or not trained["frozen"] else ", NOT kept"
    moved = f"{100 * trained['free_change']:.2g}\u00a0%"
    return [f"{trained['frozen']:,} ({variant}{kept})", f"{trained['pairs']:,}", f"{trained['steps']:,}", moved]


def difference_table(results: dict[str, Any]) -> Table:
    """Paired comparisons of states, one row each."""
    header = [
        "compared",
        "share of requests",
        "n",
        "first",
        "second",
        "difference (points)",
        "only first",
        "only second",
    ]
    rows = []
    for record in results.get("differences") or []:
        points = [f"{100 * record[key]:+.0f}" for key in ("difference", "low", "high")]
        rows.append(
            [
                f"{record['first']}, {record['second']}",
                f"{record['verdict']}, {attack_title(record['set'], record['knowledge'])}",
                f"{record['n']:,}",
                percent(record["first_rate"]),
                percent(record["second_rate"]),
                f"{points[0]} ({points[1]} to {points[2]})",
                f"{record['lost']:,}",
                f"{record['gained']:,}",
                p_value(record["p"]),
                p_value(record["p_corrected"]),
            ]
        )
    return [*header, "p", "p, corrected"], rows


def p_value(p: float) -> str:
    """A p-value in three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def category_table(results: dict[str, Any]) -> Table:
    """Over-refusal with nothing pruned by category of the requests; no rows where that would be too few in each."""
    states = results["states"]
    found = [state.get("refusals_by_category") or {} for state in states]
    sizes = {category: counts["n"] for groups in found for category, counts in groups.items()}
    header = ["category", *(state["name"] for state in states)]
    if len(sizes) < 2 or sum(sizes.values()) < GROUP * len(sizes):
        return header, []
    rows = []
    for category in sizes:
        shares = [judged_share({"benign": groups.get(category)}, "benign", "refused") for groups in found]
        rows.append([category or "(none)", *(Cell(share, None, False).text() for share in shares)])
    return header, rows


def capability_table(results: dict[str, Any]) -> Table:
    """Scores of the capability benchmarks with their standard errors, one row a state and pruning."""
    states = [(state["name"], state.get("capability") or {}) for state in results["states"]]
    tasks = list(dict.fromkeys(task for _, found in states for scores in found.values() for task in scores))
    rows = []
    for name, found in states:
        for pruned, scores in sorted(found.items(), key=lambda item: item[0] != "ORI"):
            cells = [scored(scores[task]) if task in scores else NOTHING for task in tasks]
            rows.append([name, pruned, *cells])
    return ["state", "pruned", *tasks], rows


def scored(score: dict[str, Any]) -> str:
    """A score in per cent, its standard error, and the number of questions."""
    return f"{100 * score['value']:.1f} ± {100 * score['stderr']:.1f} (n = {score['n']:,})"


def attack_records(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a state and attack with all counts and rates, for other programs."""
    records = []
    for state in results["states"]:
        for attack in state["attacks"]:
            record = {"state": state["name"]} | {key: state[key] for key in ("label", "round", "variant")}
            record |= {key: attack[key] for key in ("set", "knowledge", "neurons")}
            for kind, rate in (("harmful", "attack_success"), ("benign", "over_refusal")):
                counts = attack[kind] or {}
                record |= {f"{kind}_{key.replace(' ', '_')}": counts.get(key) for key in ("n", *OUTCOMES)}
                record |= {f"{rate}_{key}": counts.get(key) for key in _RATE_COLUMNS}
            record["perplexity"] = attack["perplexity"]
            records.append(record)
    return records


def state_records(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a state: neurons, alignment and the last training step, for other programs."""
    records = []
    for state in results["states"]:
        record = {"state": state["name"]} | {key: state[key] for key in ("label", "round", "variant")}
        record |= {key: (state["neurons"] or {}).get(key) for key in FOUND}
        record |= {key: (state["align"] or {}).get(key) for key in TRAINED}
        last = state["training"][-1] if state["training"] else {}
        record |= {f"last_{key}": last.get(key) for key in ("loss", "accuracy", "margin")}
        records.append(record)
    return records


def neuron_records(neurons: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """One record for each of the strongest neurons of every state, for other programs."""
    return [
        {"state": state, "layer": layer, "neuron": index, "d": d, "z": z, "ES": int(by) & 1, "SAS": int(by) >> 1}
        for state, found in neurons.items()
        for layer, index, _, d, z, by in found
    ]


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Records as CSV with a header; None is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def stage_table(provenance: dict[str, Any]) -> Table:
    """Seconds and peak memory of every stage."""
    rows = []
    for entry in provenance["stages"]:
        memory = entry["peak_memory_mb"]
        rows.append([entry["stage"], f"{entry['seconds']:,.1f}", NOTHING if memory is None else f"{memory:,.0f}"])
    return ["stage", "seconds", "peak memory (MB)"], rows
