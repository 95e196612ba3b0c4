"""What finished runs say together: attack success against the preference data, and round by round (Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeneuron.errors import InputError
from safeneuron.runtime.files import read_json

ATTACKS = (("ORI", "none"), ("FULL", "static"), ("FULL", "adaptive"), ("FULL", "iterated"))
"""The attacks of the tables: the set and what the attacker knew."""


def required_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run; ``InputError`` for a folder without them."""
    path = folder / "report" / "results.json"
    if not path.exists():
        raise InputError(f"{folder} has no report yet; finish it first with: safeneuron run {folder}/config.toml")
    return read_json(path)


def data_scale(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each trained state and attack of each run: pairs, ASR with its interval (Fig. 6).

    ``share`` is the pairs over the most that a run with the same label has; sorted by label, attack and pairs.
    """
    found = []
    for run in results:
        for state in run["states"]:
            if state["align"] is None:
                continue
            for (name, knowledge), harmful in _harmful(state).items():
                found.append(
                    {
                        "run": run["name"],
                        "state": state["name"],
                        "label": state["label"],
                        "pairs": state["align"]["pairs"],
                        "set": name,
                        "knowledge": knowledge,
                        **{key: harmful[key] for key in ("rate", "low", "high", "n")},
                    }
                )
    most: dict[str, int] = {}
    for record in found:
        most[record["label"]] = max(most.get(record["label"], 0), record["pairs"])
    for record in found:
        record["share"] = record["pairs"] / most[record["label"]]
    return sorted(found, key=lambda one: (one["label"], one["set"], one["knowledge"], one["pairs"], one["run"]))


def iterations(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The iteration table (Table 2): each round of the main training with its neurons, attacks and capability.

    ``frozen`` counts the neurons that its training kept, which grow from round to round; ``ASR ...`` are rates with
    the counts behind them, None where an attack was not run.
    """
    found = []
    for state in results["states"]:
        if state["variant"]:
            continue
        record: dict[str, Any] = {
            "state": state["name"],
            "neurons": state["neurons"]["FULL"],
            "frozen": None if state["align"] is None else state["align"]["frozen"],
        }
        harmful = _harmful(state)
        for attack in ATTACKS:
            counted = harmful.get(attack)
            # T0's static and adaptive attackers are one.
            if counted is None and attack == ("FULL", "adaptive") and state["round"] == 0:
                counted = harmful.get(("FULL", "static"))
            name = " ".join(attack).replace(" none", "")
            record[f"ASR {name}"] = None if counted is None else counted["rate"]
            record[f"complied {name}"] = None if counted is None else counted["complied"]
        for task, score in state["capability"].get("ORI", {}).items():
            record[task] = score["value"]
        found.append(record)
    return found


def _harmful(state: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The counts on harmful prompts under those of ``ATTACKS`` that were run."""
    counts = {(one["set"], one["knowledge"]): one["harmful"] for one in state["attacks"]}
    return {attack: counts[attack] for attack in ATTACKS if counts.get(attack)}
