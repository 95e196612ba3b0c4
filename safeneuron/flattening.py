"""Records of an analysis as the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeneuron.redundancy import NUMBERS

Record = dict[str, Any]


def with_intervals(state: Record) -> Record:
    """A state as one row: each number and both ends of its interval, empty where it is beyond what was tried."""
    row = {"state": state["state"], "refused": state["intact"]["refused"]}
    for name in NUMBERS:
        ends = (state["intervals"] or {}).get(name, {"low": None, "high": None})
        row |= {name: state[name], **{f"{name}_{end}": value for end, value in ends.items()}}
    return row


def flat(record: Record) -> Record:
    """A record as one row: what lies in it gets the name of its place in front."""
    row: Record = {}
    for key, value in record.items():
        row |= {f"{key}_{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return row


def by_layer(states: Sequence[Record]) -> list[Record]:
    """One row a state and layer."""
    plain = [key for key, value in states[0].items() if isinstance(value, list) and key != "moved"]
    return [
        {"state": one["state"], "layer": layer}
        | {name: counts[layer] for name, counts in one["turnover"].items()}
        | {f"moved_{side}": one["moved"][layer][side] if one["moved"] else None for side in ("inside", "outside")}
        | {key: one[key][layer] for key in plain}
        for one in states
        for layer in range(len(one["turnover"]["kept"]))
    ]


def finite(value: Any) -> Any:
    """The same with None for what is not a number, which JSON cannot hold."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
