"""The files of a comparison of several runs: one page, the same in Markdown, tables as CSV and the figure as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safeneuron.charts import attack_chart, curve_chart, scatter_chart
from safeneuron.comparison import Compared, differences, merge, over_seeds, scatter_points
from safeneuron.figures import scatter, themed
from safeneuron.markdown import piped, plain, tabled
from safeneuron.pages import as_page
from safeneuron.shares import attack_title, columns_of, listed, percent, refusal_of, success_of
from safeneuron.tables import (
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

NOTES = {
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
    found = differences(runs)
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
        "differences": difference_table(found),
        "seeds": seed_table(seeds),
        "charts": charts,
        "figures": {name: themed(text) for name, text in figures.items()},
        "captions": {
            "attack": "Attack success rate of every state of every run, with 95 % Wilson intervals.",
            "curve": "Attack success rate as more neurons are pruned.",
            "scatter": NOTES["scatter"],
        },
        "notes": NOTES,
    }
    tables = {"differences": found, "seeds": seeds}
    return {
        "comparison.html": as_page("comparison.html", values, {"charts": charts}),
        "comparison.md": as_markdown(runs, merged, found, seeds, bool(points)),
        "tables/attacks.csv": as_csv(attack_records(merged)),
        "tables/states.csv": as_csv(state_records(merged)),
        **{f"tables/{name}.csv": as_csv(records) for name, records in tables.items() if records},
        **{f"figures/{name}.svg": text for name, text in figures.items()},
    }


def summary(runs: Sequence[Compared], found: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]]) -> list[str]:
    """What the comparison says, in sentences that follow the numbers."""
    said = [f"{len(runs)} runs: {listed(run.name for run in runs)}; differences are those from {runs[0].name}."]
    models = dict.fromkeys(run.results["model"] for run in runs)
    if len(models) > 1:
        said.append(f"They are of different models ({listed(models)}), so their neurons are not the same ones.")
    judges = dict.fromkeys(run.results["judge"] for run in runs)
    if len(judges) > 1:
        said.append(f"They were judged by different judges ({listed(judges)}): a difference may be one of the judges.")
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


def difference_table(found: Sequence[dict[str, Any]]) -> Table:
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


def as_markdown(
    runs: Sequence[Compared],
    merged: dict[str, Any],
    found: Sequence[dict[str, Any]],
    seeds: Sequence[dict[str, Any]],
    pictured: bool,
) -> str:
    """The comparison for a release note or a pull request."""
    blocks = [f"# {plain(listed(run.name for run in runs))} side by side"]
    blocks.append("\n".join(f"- {plain(text)}" for text in summary(runs, found, seeds)))
    blocks += ["## Attack success", "Harmful requests complied with: rate, 95 % Wilson interval, counts."]
    blocks.append(piped(attack_table(merged)))
    blocks += tabled("Other attacks", "Success with its interval; refused, incoherent.", further_table(merged))
    blocks += tabled("Over seeds", NOTES["seeds"], seed_table(seeds))
    blocks += tabled("Differences", NOTES["differences"], difference_table(found))
    if pictured:
        blocks += ["## Capability against robustness", NOTES["scatter"], "![scatter](figures/scatter.svg)"]
    blocks += tabled("Capability", "Score in per cent ± its standard error.", capability_table(merged))
    blocks += tabled("The neurons and the training", "Of each state.", state_table(merged))
    return "\n\n".join(blocks) + "\n"
