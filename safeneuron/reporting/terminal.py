"""The result table of a run for a terminal: as lines for a pipe, or as a grid to be drawn to the terminal's width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from safeneuron.reporting.results import attack_of, attack_title, columns_of, further_of, number, success_of
from safeneuron.reporting.summary import READING


class Grid(NamedTuple):
    """A table for a terminal, which knows its own width: what it shows, its header and rows, and a last remark."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def grid_of(results: dict[str, Any]) -> Grid:
    """The result table of a run with its intervals, one row an attack."""
    states = results["states"]
    rows = []
    for column in [*columns_of(results), *further_of(results)]:
        shares = [success_of(attack_of(state, *column)) for state in states]
        cells = ["-" if s is None else f"{number(s.rate)} ({number(s.low)}-{number(s.high)})" for s in shares]
        if any(shares):
            rows.append([attack_title(*column), *cells])
    title = f"Attack success of {results['model']}: harmful requests complied with, in %, and 95 % intervals"
    note = "; ".join(f"{state['name']}: {state['label']}" for state in states)
    note += ". Over-refusal, incoherent answers and perplexity stand in the report."
    return Grid(title, ["pruned", *(state["name"] for state in states)], rows, note)


def result_table(results: dict[str, Any]) -> Iterator[str]:
    """The attack table of a run, in lines that fit a terminal: ASR in per cent, one line a state."""
    columns = columns_of(results)
    titles = {"iterated": "iterated", "control": "random"}
    names = [state["label"] for state in results["states"]]
    width = max(map(len, names)) + 2
    yield f"ASR in % of {results['model']}: harmful test prompts that are answered, by neurons pruned"
    yield f"{'':<{width}}{'':>9}{'static':^27}{'adaptive':^27}"
    yield f"{'':<{width}}" + "".join(f"{titles.get(knowledge, name):>9}" for name, knowledge in columns)
    for name, state in zip(names, results["states"], strict=True):
        cells = []
        for column in columns:
            share = success_of(attack_of(state, *column))
            cells.append(f"{'-' if share is None else format(100 * share.rate, '.0f'):>9}")
        yield f"{name:<{width}}" + "".join(cells)
    others = further_of(results)
    if others:
        yield "other attacks, in the order of the states above"
    for column in others:
        shares = [success_of(attack_of(state, *column)) for state in results["states"]]
        rates = "".join(f"{'-' if share is None else format(100 * share.rate, '.0f'):>9}" for share in shares)
        yield f"{attack_title(*column):<{max(width, 56)}}{rates}"
    yield "intervals, over-refusal, incoherent answers and perplexity stand in the report"


NOTHING = "–"
MASKED = "(masked; --show-text shows it)"

TitledTable = tuple[str, list[str], list[list[str]]]
Record = dict[str, Any]


def analysis_tables(analysis: dict[str, Record], show_text: bool = False) -> list[TitledTable]:
    """A title, a header and rows for each part that there is; the first column is words, the others are numbers."""
    known = {
        "topics": _topics, "depth": _depth, "stability": _stability, "states": _states, "redundancy": _redundancy,
        "methods": _methods, "scale": _scale,
    }  # fmt: skip
    tables = [known[name](record) for name, record in analysis.items() if name in known]
    if "neurons" in analysis:
        tables.append(_neurons(analysis["neurons"], show_text))
    return [table for table in tables if table[2]]


def _topics(record: Record) -> TitledTable:
    columns = (record["overlaps"], record["shuffled_topics"], record["random_neurons"])
    rows = [
        [
            f"K = {own['topics']}",
            *(percentage(one[index]["jaccard"]) if one else NOTHING for one in columns),
            percentage(own["shared"]),
        ]
        for index, own in enumerate(record["overlaps"])
    ]
    title = (
        f"Topics: {record['core']:,} neurons in all {len(record['topics'])} (prompts dealt "
        f"at random: {thousands(record['shuffled_core'])}; random neurons: {record['core_by_chance']:.1f})"
    )
    return title, ["overlap", "Jaccard", "dealt at random", "random neurons", "of mean size"], rows


def _depth(record: Record) -> TitledTable:
    rows = [
        [
            one["name"],
            thousands(one["neurons"]),
            *(percentage(part) for part in one["thirds"]),
            decimals(one["mean_depth"]),
        ]
        for one in record["sets"]
    ]
    return "Depth", ["set", "neurons", "early", "middle", "late", "mean depth"], rows


def _stability(record: Record) -> TitledTable:
    boot, needed = record["bootstrap"], record["needed"]
    rows = [
        [
            "bootstrap against all prompts",
            decimals(boot["jaccard"]["mean"]),
            decimals(boot["correlation"]["mean"]),
            NOTHING,
        ]
    ]
    rows += [
        [
            f"two samples of {one['prompts']}",
            decimals(one["mean"]),
            decimals(one["correlation"]),
            decimals(one["chance"]),
        ]
        for one in record["samples"]
    ]
    rows += [
        [f"measured with {one['variant']}", decimals(one["jaccard"]), decimals(one["correlation"]), NOTHING]
        for one in record["variants"]
    ]
    for one in record.get("also", []):
        kinds = (
            (f"prompts of {one['prompts_of']}", one),
            (f"  of the same {one['same_requests']} requests", one["wording"]),
            ("  these, as the run has them, against all", one["fewer"]),
        )
        rows += [
            [words, decimals(found["jaccard"]), decimals(found["correlation"]), NOTHING]
            for words, found in kinds
            if found["jaccard"] is not None
        ]
    wanted = "not reached" if needed["prompts"] is None else f"{needed['prompts']:,} prompts ({needed['reached']})"
    title = f"Stability: {boot['always']:,} of {record['neurons']:,} neurons always in; Jaccard .9: {wanted}"
    return title, ["sets", "Jaccard", "rank correlation", "by chance"], rows


def _states(record: Record) -> TitledTable:
    rows = []
    for one in record["states"]:
        moved = one["moved"] or []
        rows.append(
            [
                one["state"],
                *(thousands(sum(one["turnover"][name])) for name in ("kept", "lost", "new")),
                *(decimals(mean([layer[side] for layer in moved]), 4) for side in ("inside", "outside")),
                decimals(mean(one["cka_unsafe"])),
                decimals(mean(one["cka_safe"])),
                decimals(mean(one["separability"])),
                decimals(mean(one["separability_pruned"])),
            ]
        )
    header = [
        "state",
        "kept",
        "lost",
        "new",
        "moved in",
        "moved out",
        "CKA harmful",
        "CKA benign",
        "probe",
        "probe pruned",
    ]
    return "States against T0 (means over layers)", header, rows


def _redundancy(record: Record) -> TitledTable:
    rows = []
    for one in record["states"]:
        tried, pruned = len(one["sets"]), one["curve"][-1]["neurons"]
        most = {"redundancy_index": tried, "coherent_index": tried, "sets_to_halve": tried, "neurons_to_halve": pruned}
        numbers = [bounded(one[name], (one["intervals"] or {}).get(name), end) for name, end in most.items()]
        rows.append([one["state"], percentage(one["intact"]["refused"]), *numbers])
    title = f"Redundancy, with 95 % intervals over prompts. {READING}"
    return title, ["state", "refused", "break alone", "coherently", "sets to halve", "top neurons to halve"], rows


def _methods(record: Record) -> TitledTable:
    rows = [
        [
            one["label"],
            thousands(one["selected"]),
            thousands(one["significant"]),
            thousands(one["missed"]),
            decimals(one["largest_q"], 3),
        ]
        for one in record["discoveries"]
    ]
    return "False discoveries", ["set", "neurons", "q < .05", "q < .05, not taken", "largest q"], rows


def _scale(record: Record) -> TitledTable:
    rows = []
    for one in record["iterations"]:
        rates = [percentage(value) for name, value in one.items() if name.startswith("ASR")]
        rows.append([one["state"], thousands(one["neurons"]), thousands(one["frozen"]), *rates])
    names = [name for name in record["iterations"][0] if name.startswith("ASR")] if record["iterations"] else []
    return "Rounds", ["state", "neurons", "frozen", *names], rows


def _neurons(record: Record, show_text: bool) -> TitledTable:
    rows = []
    for one in record["neurons"]:
        best = max(one["profile"], key=lambda name: one["profile"][name])
        promoted = " ".join(repr(token) for token in one["promoted"][:4])
        prompt = one["exciting"][0][:60] if show_text else MASKED
        rows.append([f"{one['layer']}/{one['channel']}", decimals(one["d"]), best, promoted, prompt])
    return "Neurons", ["layer/channel", "d", "category", "promotes", "excited by"], rows


def mean(values: list[float | None]) -> float | None:
    """The mean of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def decimals(value: float | None, places: int = 2) -> str:
    """With so many places."""
    return NOTHING if value is None else f"{value:.{places}f}"


def percentage(value: float | None) -> str:
    """In per cent."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def thousands(value: int | None) -> str:
    """With a comma at each thousand."""
    return NOTHING if value is None else f"{value:,}"


def bounded(value: int | None, interval: dict[str, int | None] | None, most: int) -> str:
    """A number and its interval, where None is more than the ``most`` that was tried; without an interval, nothing."""
    if interval is None:
        return NOTHING
    number, low, high = (f">{most:,}" if one is None else f"{one:,}" for one in (value, *interval.values()))
    return f"{number} ({low} to {high})"
