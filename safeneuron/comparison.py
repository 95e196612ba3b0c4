"""What tells several runs or seeds apart: paired differences, the spread over seeds, capability and robustness.

Values in, values out. A run is compared with the first one, state by state, on the requests that
both were asked; runs whose settings differ in nothing but the seed are also put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeneuron.differences import bootstrap_interval, compare, corrected
from safeneuron.shares import COMPARED, attack_of, columns_of, listed, refusal_of, share_of

Asked = tuple[str, str, str, str]
"""State, kind of request, set and knowledge of the attacker."""


@dataclass(frozen=True)
class Compared:
    """A finished run: its shown name, its results, a key that all its seeds share, and the verdicts on its answers.

    ``verdicts`` are by state and attack, and in that by the text of the request.
    """

    name: str
    results: dict[str, Any]
    settings: str
    verdicts: Mapping[Asked, Mapping[str, str]]


def merge(runs: Sequence[Compared]) -> dict[str, Any]:
    """The results of all runs as those of one, a state's name with the name of its run before it."""
    states = [
        {**state, "name": f"{run.name}: {state['name']}", "label": f"{state['label']}, seed {run.results['seed']}"}
        for run in runs
        for state in run.results["states"]
    ]
    return {**runs[0].results, "states": states, "layers": max(run.results["layers"] for run in runs)}


def differences(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Every other run against the first: states of one name, on the requests that both were asked."""
    first, *others = runs
    found: list[dict[str, Any]] = []
    for second in others:
        names = [state["name"] for state in second.results["states"]]
        for state in (state["name"] for state in first.results["states"] if state["name"] in names):
            for kind, verdict, which, knowledge in COMPARED:
                asked = (state, kind, which, knowledge)
                one, other = (run.verdicts.get(asked, {}) for run in (first, second))
                # An answer that could not be judged leaves its pair out.
                both = [p for p in one if p in other and "cannot say" not in (one[p], other[p])]
                result = compare([one[p] == verdict for p in both], [other[p] == verdict for p in both])
                if result is not None:
                    what = {"kind": kind, "verdict": verdict, "set": which, "knowledge": knowledge}
                    names_of = {"first": first.name, "second": second.name, "state": state}
                    found.append({**names_of, **what, **result.to_record()})
    for record, p in zip(found, corrected([record["p"] for record in found]), strict=True):
        record["p_corrected"] = p
    return found


def over_seeds(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Mean attack success rate over the seeds of one setting, with the bootstrap interval of both kinds of chance."""
    found = []
    for group in groups_of(runs):
        for state in (state["name"] for state in group[0].results["states"]):
            for which, knowledge in columns_of(group[0].results):
                kept = [run.verdicts.get((state, "harmful", which, knowledge), {}) for run in group]
                prompts = [p for p in kept[0] if all(v.get(p, "cannot say") != "cannot say" for v in kept)]
                if prompts:
                    found.append(
                        {
                            "runs": listed(run.name for run in group),
                            "state": state,
                            "set": which,
                            "knowledge": knowledge,
                            "seeds": len(group),
                            "n": len(prompts),
                            **_mean([[v[p] == "complied" for p in prompts] for v in kept]),
                        }
                    )
    return found


def _mean(values: Sequence[Sequence[bool]]) -> dict[str, float]:
    import numpy as np

    array = np.array(values, dtype=np.float64)
    low, high = bootstrap_interval(array)
    rates = array.mean(axis=1)
    bounds = {"low": low, "high": high, "lowest_seed": float(rates.min()), "highest_seed": float(rates.max())}
    return {"rate": float(array.mean()), **bounds}


def groups_of(runs: Sequence[Compared]) -> Iterator[list[Compared]]:
    """Runs that differ in the seed alone, where there are at least two of them."""
    for settings in dict.fromkeys(run.settings for run in runs):
        group = [run for run in runs if run.settings == settings]
        if len({run.results["seed"] for run in group}) > 1:
            yield group


def scatter_points(merged: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Robustness and capability of each state with their intervals, and what stands for capability.

    That is the mean score of the benchmarks that every state has, with 1.96 standard errors; without such, the share of
    harmless requests that are not refused.
    """
    states = merged["states"]
    scores = [(state.get("capability") or {}).get("ORI", {}) for state in states]
    tasks = [task for task in scores[0] if all(task in found for found in scores)]
    found = []
    for state, own in zip(states, scores, strict=True):
        robust = share_of(under_attack(state), "harmful", "refused")
        refused = refusal_of(attack_of(state, "ORI", "none"))
        if robust is None or (not tasks and refused is None):
            continue
        interval = wilson(robust.hits, robust.total)
        if tasks:
            mean = sum(own[task]["value"] for task in tasks) / len(tasks)
            half = 1.96 * sum(own[task]["stderr"] ** 2 for task in tasks) ** 0.5 / len(tasks)
            up = (mean, max(0.0, mean - half), min(1.0, mean + half))
        else:
            assert refused is not None
            up = (1 - refused.rate, 1 - refused.high, 1 - refused.low)
        found.append({"name": state["name"], "x": (robust.hits / robust.total, *interval), "y": up})
    return found, f"mean of {listed(tasks)}" if tasks else "harmless requests not refused"


def under_attack(state: dict[str, Any]) -> dict[str, Any] | None:
    """The adaptive FULL attack on a state."""
    return attack_of(state, "FULL", "adaptive")


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share, whose counts alone are in the results."""
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
