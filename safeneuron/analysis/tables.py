"""The tables of an analysis for a terminal: the numbers of each part as a title, a header and rows."""

from __future__ import annotations

from typing import Any

from safeneuron.reporting.summary import READING

_UNDEFINED = "–"
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
            *(_percentage(one[index]["jaccard"]) if one else _UNDEFINED for one in columns),
            _percentage(own["shared"]),
        ]
        for index, own in enumerate(record["overlaps"])
    ]
    title = (
        f"Topics: {record['core']:,} neurons in all {len(record['topics'])} (prompts dealt "
        f"at random: {_thousands(record['shuffled_core'])}; random neurons: {record['core_by_chance']:.1f})"
    )
    return title, ["overlap", "Jaccard", "dealt at random", "random neurons", "of mean size"], rows


def _depth(record: Record) -> TitledTable:
    rows = [
        [
            one["name"],
            _thousands(one["neurons"]),
            *(_percentage(part) for part in one["thirds"]),
            _decimals(one["mean_depth"]),
        ]
        for one in record["sets"]
    ]
    return "Depth", ["set", "neurons", "early", "middle", "late", "mean depth"], rows


def _stability(record: Record) -> TitledTable:
    boot, needed = record["bootstrap"], record["needed"]
    rows = [
        [
            "bootstrap against all prompts",
            _decimals(boot["jaccard"]["mean"]),
            _decimals(boot["correlation"]["mean"]),
            _UNDEFINED,
        ]
    ]
    rows += [
        [
            f"two samples of {one['prompts']}",
            _decimals(one["mean"]),
            _decimals(one["correlation"]),
            _decimals(one["chance"]),
        ]
        for one in record["samples"]
    ]
    rows += [
        [f"measured with {one['variant']}", _decimals(one["jaccard"]), _decimals(one["correlation"]), _UNDEFINED]
        for one in record["variants"]
    ]
    for one in record.get("also", []):
        kinds = (
            (f"prompts of {one['prompts_of']}", one),
            (f"  of the same {one['same_requests']} requests", one["wording"]),
            ("  these, as the run has them, against all", one["fewer"]),
        )
        rows += [
            [words, _decimals(found["jaccard"]), _decimals(found["correlation"]), _UNDEFINED]
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
                *(_thousands(sum(one["turnover"][name])) for name in ("kept", "lost", "new")),
                *(_decimals(_mean([layer[side] for layer in moved]), 4) for side in ("inside", "outside")),
                _decimals(_mean(one["cka_unsafe"])),
                _decimals(_mean(one["cka_safe"])),
                _decimals(_mean(one["separability"])),
                _decimals(_mean(one["separability_pruned"])),
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
        numbers = [_bounded(one[name], (one["intervals"] or {}).get(name), end) for name, end in most.items()]
        rows.append([one["state"], _percentage(one["intact"]["refused"]), *numbers])
    title = f"Redundancy, with 95 % intervals over prompts. {READING}"
    return title, ["state", "refused", "break alone", "coherently", "sets to halve", "top neurons to halve"], rows


def _methods(record: Record) -> TitledTable:
    rows = [
        [
            one["label"],
            _thousands(one["selected"]),
            _thousands(one["significant"]),
            _thousands(one["missed"]),
            _decimals(one["largest_q"], 3),
        ]
        for one in record["discoveries"]
    ]
    return "False discoveries", ["set", "neurons", "q < .05", "q < .05, not taken", "largest q"], rows


def _scale(record: Record) -> TitledTable:
    rows = []
    for one in record["iterations"]:
        rates = [_percentage(value) for name, value in one.items() if name.startswith("ASR")]
        rows.append([one["state"], _thousands(one["neurons"]), _thousands(one["frozen"]), *rates])
    names = [name for name in record["iterations"][0] if name.startswith("ASR")] if record["iterations"] else []
    return "Rounds", ["state", "neurons", "frozen", *names], rows


def _neurons(record: Record, show_text: bool) -> TitledTable:
    rows = []
    for one in record["neurons"]:
        best = max(one["profile"], key=lambda name: one["profile"][name])
        promoted = " ".join(repr(token) for token in one["promoted"][:4])
        prompt = one["exciting"][0][:60] if show_text else MASKED
        rows.append([f"{one['layer']}/{one['channel']}", _decimals(one["d"]), best, promoted, prompt])
    return "Neurons", ["layer/channel", "d", "category", "promotes", "excited by"], rows


def _mean(values: list[float | None]) -> float | None:
    """The mean of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _decimals(value: float | None, places: int = 2) -> str:
    """With so many places."""
    return _UNDEFINED if value is None else f"{value:.{places}f}"


def _percentage(value: float | None) -> str:
    """In per cent."""
    return _UNDEFINED if value is None else f"{100 * value:.1f} %"


def _thousands(value: int | None) -> str:
    """With a comma at each thousand."""
    return _UNDEFINED if value is None else f"{value:,}"


def _bounded(value: int | None, interval: dict[str, int | None] | None, most: int) -> str:
    """A number and its interval, where None is more than the ``most`` that was tried; without an interval, nothing."""
    if interval is None:
        return _UNDEFINED
    number, low, high = (f">{most:,}" if one is None else f"{one:,}" for one in (value, *interval.values()))
    return f"{number} ({low} to {high})"
