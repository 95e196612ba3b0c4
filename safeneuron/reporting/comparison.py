"""What tells several runs or seeds apart: paired differences, the spread over seeds, capability and robustness.

Values in, values out. A run is compared with the first one, state by state, on the requests that
both were asked; runs whose settings differ in nothing but the seed are also put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeneuron.evaluation.rates import bootstrap_interval, corrected, paired_difference
from safeneuron.reporting.charts import attack_chart, curve_chart, scatter_chart
from safeneuron.reporting.figures import scatter, themed
from safeneuron.reporting.rendering import as_page, escaped, table_escaped, tabled
from safeneuron.reporting.results import (
    COMPARED,
    attack_of,
    attack_title,
    columns_of,
    joined_words,
    judged_share,
    percent,
    refusal_of,
    success_of,
)
from safeneuron.reporting.tables import (
    Table,
    as_csv,
    attack_records,
    attack_table,
    capability_table,
    cells_of,
    further_table,
    p_value,
    state_records,
    state_table,
)

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


def run_differences(runs: Sequence[Compared]) -> list[dict[str, Any]]:
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
                result = paired_difference([one[p] == verdict for p in both], [other[p] == verdict for p in both])
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
                            "runs": joined_words(run.name for run in group),
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
        robust = judged_share(under_attack(state), "harmful", "refused")
        refused = refusal_of(attack_of(state, "ORI", "none"))
        if robust is None or (not tasks and refused is None):
            continue
        interval = wilson_interval(robust.hits, robust.total)
        if tasks:
            mean = sum(own[task]["value"] for task in tasks) / len(tasks)
            half = 1.96 * sum(own[task]["stderr"] ** 2 for task in tasks) ** 0.5 / len(tasks)
            up = (mean, max(0.0, mean - half), min(1.0, mean + half))
        else:
            assert refused is not None
            up = (1 - refused.rate, 1 - refused.high, 1 - refused.low)
        found.append({"name": state["name"], "x": (robust.hits / robust.total, *interval), "y": up})
    return found, f"mean of {joined_words(tasks)}" if tasks else "harmless requests not refused"


def under_attack(state: dict[str, Any]) -> dict[str, Any] | None:
    """The adaptive FULL attack on a state."""
    return attack_of(state, "FULL", "adaptive")


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share, whose counts alone are in the results."""
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


_NOTES = {
    "differences": "Each run against the first, on the requests that both were asked: the share of each, the paired "
    "difference with its 95 % interval (Newcombe), the requests on which only one has the outcome, and the p-value of "
    "the exact McNemar test, as it is and corrected for the number of tests in this table (Holm).",
    "seeds": "Runs whose settings differ in the seed alone: the mean attack success rate with its 95 % bootstrap "
    "interval over seeds and requests together. With few seeds such an interval is too narrow.",
    "scatter": "Robustness is the share of harmful requests that are refused with the safety neurons pruned (FULL "
    "adaptive): babble is no refusal. Lines are 95 % intervals. Up and to the right is better.",
}


def render_comparison(runs: Sequence[Compared]) -> dict[str, str]:
    """Relative path and content of every file of the comparison."""
    merged = merge(runs)
    found = run_differences(runs)
    seeds = over_seeds(runs)
    points, capability = scatter_points(merged)
    axes = ("robustness (refused under FULL adaptive)", capability)
    figures = {"scatter": scatter(points, *axes)} if points else {}
    charts = {
        "attack": attack_chart(merged),
        "curve": curve_chart(merged["states"]),
        "scatter": scatter_chart(points, *axes),
    }
    charts = {name: chart for name, chart in charts.items() if chart["panels"]}
    values = {
        "runs": [run.results | {"name": run.name} for run in runs],
        "said": summary(runs, found, seeds),
        "successes": cells_of(merged, success_of),
        "refusals": cells_of(merged, refusal_of),
        "iterated": ("FULL", "iterated") in columns_of(merged),
        "further": further_table(merged),
        "capability": capability_table(merged),
        "states": state_table(merged),
        "differences": run_difference_table(found),
        "seeds": seed_table(seeds),
        "charts": charts,
        "figures": {name: themed(text) for name, text in figures.items()},
        "captions": {
            "attack": "Attack success rate of every state of every run, with 95 % Wilson intervals.",
            "curve": "Attack success rate as more neurons are pruned.",
            "scatter": _NOTES["scatter"],
        },
        "notes": _NOTES,
    }
    tables = {"differences": found, "seeds": seeds}
    return {
        "comparison.html": as_page("comparison.html", values, {"charts": charts}),
        "comparison.md": comparison_markdown(runs, merged, found, seeds, bool(points)),
        "tables/attacks.csv": as_csv(attack_records(merged)),
        "tables/states.csv": as_csv(state_records(merged)),
        **{f"tables/{name}.csv": as_csv(records) for name, records in tables.items() if records},
        **{f"figures/{name}.svg": text for name, text in figures.items()},
    }


def summary(runs: Sequence[Compared], found: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]]) -> list[str]:
    """What the comparison says, in sentences that follow the numbers."""
    said = [f"{len(runs)} runs: {joined_words(run.name for run in runs)}; differences are those from {runs[0].name}."]
    models = dict.fromkeys(run.results["model"] for run in runs)
    if len(models) > 1:
        said.append(f"They are of different models ({joined_words(models)}), so their neurons are not the same ones.")
    judges = dict.fromkeys(run.results["judge"] for run in runs)
    if len(judges) > 1:
        said.append(
            f"They were judged by different judges ({joined_words(judges)}): a difference may be one of the judges."
        )
    clear = [record for record in found if record["p_corrected"] < 0.05]
    if not found:
        said.append("No state was asked the same requests in two runs, so there are no paired differences.")
    elif not clear:
        said.append(f"None of the {len(found)} paired differences is significant after correction.")
    for record in clear:
        said.append(
            f"{record['state']} ({attack_title(record['set'], record['knowledge'])}) "
            f"{'complies with' if record['verdict'] == 'complied' else 'refuses'} {percent(record['second_rate'])} of "
            f"{record['kind']} requests in {record['second']}, {percent(record['first_rate'])} in {record['first']}: "
            f"{points_of(record)} points."
        )
    if not seeds:
        said.append("No two of them differ in the seed alone: no spread over seeds is known.")
    return said


def points_of(record: Mapping[str, Any]) -> str:
    """A difference with its interval, in points."""
    value, low, high = (f"{100 * record[key]:+.0f}" for key in ("difference", "low", "high"))
    return f"{value} ({low} to {high})"


def run_difference_table(found: Sequence[dict[str, Any]]) -> Table:
    """The paired differences, one row each."""
    header = ["state", "compared", "share of requests", "n", "first", "second", "difference (points)"]
    rows = []
    for record in found:
        names = [record["state"], f"{record['first']}, {record['second']}"]
        share = f"{record['verdict']}, {attack_title(record['set'], record['knowledge'])}"
        numbers = [f"{record['n']:,}", percent(record["first_rate"]), percent(record["second_rate"]), points_of(record)]
        tests = [f"{record['lost']:,}", f"{record['gained']:,}", p_value(record["p"]), p_value(record["p_corrected"])]
        rows.append([*names, share, *numbers, *tests])
    return [*header, "only first", "only second", "p", "p, corrected"], rows


def seed_table(seeds: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds, one row a state and attack."""
    rows = []
    for record in seeds:
        rate, low, high, least, most = (
            percent(record[k]) for k in ("rate", "low", "high", "lowest_seed", "highest_seed")
        )
        title = attack_title(record["set"], record["knowledge"])
        counts = [str(record["seeds"]), f"{record['n']:,}"]
        rows.append(
            [record["state"], title, record["runs"], *counts, f"{rate} ({low} to {high})", f"{least} to {most}"]
        )
    return ["state", "attack", "runs", "seeds", "n", "mean", "lowest and highest seed"], rows


def comparison_markdown(
    runs: Sequence[Compared],
    merged: dict[str, Any],
    found: Sequence[dict[str, Any]],
    seeds: Sequence[dict[str, Any]],
    pictured: bool,
) -> str:
    """The comparison for a release note or a pull request."""
    blocks = [f"# {escaped(joined_words(run.name for run in runs))} side by side"]
    blocks.append("\n".join(f"- {escaped(text)}" for text in summary(runs, found, seeds)))
    blocks += ["## Attack success", "Harmful requests complied with: rate, 95 % Wilson interval, counts."]
    blocks.append(table_escaped(attack_table(merged)))
    blocks += tabled("Other attacks", "Success with its interval; refused, incoherent.", further_table(merged))
    blocks += tabled("Over seeds", _NOTES["seeds"], seed_table(seeds))
    blocks += tabled("Differences", _NOTES["differences"], run_difference_table(found))
    if pictured:
        blocks += ["## Capability against robustness", _NOTES["scatter"], "![scatter](figures/scatter.svg)"]
    blocks += tabled("Capability", "Score in per cent ± its standard error.", capability_table(merged))
    blocks += tabled("The neurons and the training", "Of each state.", state_table(merged))
    return "\n\n".join(blocks) + "\n"
