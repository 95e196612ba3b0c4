"""What tells several runs or seeds apart: paired differences, the spread over seeds, capability and robustness.

Values in, values out. A run is compared with the first one, state by state, on the requests that
both were asked; runs whose settings differ in nothing but the seed are also put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from safeneuron.evaluation.rates import bootstrap_interval, corrected, paired_difference
from safeneuron.reporting.charts import Bounded, ScatterPoint, attack_chart, curve_chart, scatter_chart
from safeneuron.reporting.figures import draw_figures
from safeneuron.reporting.formatting import Table, attack_title, joined_words, percent, with_interval
from safeneuron.reporting.records import StateDifference
from safeneuron.reporting.rendering import as_page, escaped, table_escaped, tabled
from safeneuron.reporting.results import ADAPTIVE, COMPARED, INTACT, RunResults, StateResults
from safeneuron.reporting.style import themed
from safeneuron.reporting.tables import (
    as_csv,
    attack_records,
    attack_table,
    capability_table,
    difference_points,
    difference_records,
    difference_table,
    further_table,
    refusal_cells,
    state_records,
    state_table,
    success_cells,
)

JudgedAttack = tuple[str, str, str, str]
"""State, kind of request, set and knowledge of the attacker."""
Request = TypeVar("Request", int, str)


@dataclass(frozen=True)
class Compared:
    """A finished run: its shown name, its results, a key that all its seeds share, and the verdicts on its answers.

    ``verdicts`` are by state and attack, and in that by the text of the request.
    """

    name: str
    results: RunResults
    settings: str
    verdicts: Mapping[JudgedAttack, Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """The attack success rate of one state under one attack over several seeds, with its bootstrap interval."""

    runs: str
    state: str
    set: str
    knowledge: str
    seeds: int
    n: int
    """Requests that every seed was asked."""
    rate: float
    low: float
    high: float
    lowest_seed: float
    highest_seed: float


def difference_of(
    names: tuple[str, str, str | None],
    compared: tuple[str, str, str, str],
    first: Mapping[Request, str],
    second: Mapping[Request, str],
) -> StateDifference | None:
    """Two states on the requests that both were asked.

    Args:
        names: Those of both states; or those of two runs, and the state.
        compared: One of ``COMPARED``.
        first: The verdicts on the answers of the first by their request.
        second: The same of the second.

    Returns:
        The difference, its p-value not corrected yet; None without a request on which both could be judged.
    """
    kind, verdict, which, knowledge = compared
    # An answer that could not be judged leaves its pair out.
    both = [key for key in first if key in second and "cannot say" not in (first[key], second[key])]
    result = paired_difference([first[key] == verdict for key in both], [second[key] == verdict for key in both])
    if result is None:
        return None
    return StateDifference(
        first=names[0],
        second=names[1],
        state=names[2],
        kind=kind,
        verdict=verdict,
        set=which,
        knowledge=knowledge,
        **asdict(result),
    )


def holm_corrected(differences: Iterable[StateDifference | None]) -> tuple[StateDifference, ...]:
    """Those differences that there are, their p-values corrected for the number of them.

    Args:
        differences: Paired differences; None where there was nothing to compare.

    Returns:
        The differences that there are, in their order.
    """
    known = [difference for difference in differences if difference is not None]
    p_values = corrected([difference.p for difference in known])
    return tuple(replace(difference, p_corrected=p) for difference, p in zip(known, p_values, strict=True))


def merge(runs: Sequence[Compared]) -> RunResults:
    """The results of all runs as those of one, a state's name with the name of its run before it."""
    states = [
        replace(state, name=f"{run.name}: {state.name}", label=f"{state.label}, seed {run.results.seed}")
        for run in runs
        for state in run.results.states
    ]
    return replace(runs[0].results, states=tuple(states), layers=max(run.results.layers for run in runs))


def run_differences(runs: Sequence[Compared]) -> tuple[StateDifference, ...]:
    """Every other run against the first: states of one name, on the requests that both were asked."""
    first, *others = runs
    return holm_corrected(
        difference_of(
            (first.name, second.name, state.name),
            compared,
            *(run.verdicts.get((state.name, compared[0], *compared[2:]), {}) for run in (first, second)),
        )
        for second in others
        for state in first.results.states
        if second.results.state(state.name)
        for compared in COMPARED
    )


def over_seeds(runs: Sequence[Compared]) -> list[SeedMean]:
    """Mean attack success rate over the seeds of one setting, with the bootstrap interval of both kinds of chance."""
    means = []
    for group in groups_of(runs):
        for state in group[0].results.states:
            for which, knowledge in group[0].results.columns():
                verdicts = [run.verdicts.get((state.name, "harmful", which, knowledge), {}) for run in group]
                prompts = [p for p in verdicts[0] if all(v.get(p, "cannot say") != "cannot say" for v in verdicts)]
                if prompts:
                    means.append(
                        SeedMean(
                            runs=joined_words(run.name for run in group),
                            state=state.name,
                            set=which,
                            knowledge=knowledge,
                            seeds=len(group),
                            n=len(prompts),
                            **_mean([[v[p] == "complied" for p in prompts] for v in verdicts]),
                        )
                    )
    return means


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
        if len({run.results.seed for run in group}) > 1:
            yield group


def scatter_points(merged: RunResults) -> tuple[list[ScatterPoint], str]:
    """Robustness and capability of each state with their intervals, and what stands for capability.

    That is the mean score of the benchmarks that every state has, with 1.96 standard errors; without such, the share of
    harmless requests that are not refused.
    """
    tasks = [task for task in merged.base.scores() if all(task in state.scores() for state in merged.states)]
    points = []
    for state in merged.states:
        attack = state.attack(*ADAPTIVE)
        robust = attack.robustness if attack else None
        capability = _mean_score(state, tasks) if tasks else _not_refused(state)
        if robust is not None and capability is not None:
            points.append(ScatterPoint(state.name, Bounded(robust.rate, robust.low, robust.high), capability))
    return points, f"mean of {joined_words(tasks)}" if tasks else "harmless requests not refused"


def _mean_score(state: StateResults, tasks: Sequence[str]) -> Bounded:
    scores = [state.scores()[task] for task in tasks]
    mean = sum(score.value for score in scores) / len(scores)
    half = 1.96 * sum(score.stderr**2 for score in scores) ** 0.5 / len(scores)
    return Bounded(mean, max(0.0, mean - half), min(1.0, mean + half))


def _not_refused(state: StateResults) -> Bounded | None:
    refused = state.over_refusal(*INTACT)
    return Bounded(1 - refused.rate, 1 - refused.high, 1 - refused.low) if refused else None


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
    """Relative path and content of every file of the comparison.

    Args:
        runs: At least one finished run; the others are compared with the first.

    Returns:
        The content of each file by its path in the folder of the comparison.
    """
    merged = merge(runs)
    differences = run_differences(runs)
    seeds = over_seeds(runs)
    points, capability = scatter_points(merged)
    scatter = scatter_chart(points, "robustness (refused under FULL adaptive)", capability)
    figures = draw_figures({"scatter": scatter}) if points else {}
    described = {"attack": attack_chart(merged), "curve": curve_chart(merged.states), "scatter": scatter}
    charts = {name: chart.to_json() for name, chart in described.items() if chart.panels}
    values = {
        "runs": runs,
        "sentences": comparison_summary(runs, differences, seeds),
        "successes": success_cells(merged),
        "refusals": refusal_cells(merged),
        "iterated": ("FULL", "iterated") in merged.columns(),
        "further": further_table(merged),
        "capability": capability_table(merged),
        "states": state_table(merged),
        "differences": difference_table(differences),
        "seeds": seed_table(seeds),
        "charts": charts,
        "figures": {name: themed(text) for name, text in figures.items()},
        "captions": {
            "attack": "Attack success rate of every state of every run, with 95 % Wilson intervals.",
            "curve": "Attack success rate, and share of incoherent text, as more neurons are pruned.",
            "scatter": _NOTES["scatter"],
        },
        "notes": _NOTES,
    }
    tables = {"differences": difference_records(differences), "seeds": [asdict(mean) for mean in seeds]}
    return {
        "comparison.html": as_page("comparison.html", values, {"charts": charts}),
        "comparison.md": comparison_markdown(runs, merged, differences, seeds, bool(points)),
        "tables/attacks.csv": as_csv(attack_records(merged)),
        "tables/states.csv": as_csv(state_records(merged)),
        **{f"tables/{name}.csv": as_csv(records) for name, records in tables.items() if records},
        **{f"figures/{name}.svg": text for name, text in figures.items()},
    }


def comparison_summary(
    runs: Sequence[Compared], differences: Sequence[StateDifference], seeds: Sequence[SeedMean]
) -> list[str]:
    """What the comparison says, in sentences that follow the numbers."""
    sentences = [
        f"{len(runs)} runs: {joined_words(run.name for run in runs)}; differences are those from {runs[0].name}."
    ]
    models = dict.fromkeys(run.results.model for run in runs)
    if len(models) > 1:
        sentences.append(
            f"They are of different models ({joined_words(models)}), so their neurons are not the same ones."
        )
    judges = dict.fromkeys(run.results.judge for run in runs)
    if len(judges) > 1:
        sentences.append(
            f"They were judged by different judges ({joined_words(judges)}): a difference may be one of the judges."
        )
    clear = [record for record in differences if record.p_corrected < 0.05]
    if not differences:
        sentences.append("No state was asked the same requests in two runs, so there are no paired differences.")
    elif not clear:
        sentences.append(f"None of the {len(differences)} paired differences is significant after correction.")
    for record in clear:
        sentences.append(
            f"{record.state} ({attack_title(record.set, record.knowledge)}) "
            f"{'complies with' if record.verdict == 'complied' else 'refuses'} {percent(record.second_rate)} of "
            f"{record.kind} requests in {record.second}, {percent(record.first_rate)} in {record.first}: "
            f"{difference_points(record)} points."
        )
    if not seeds:
        sentences.append("No two of them differ in the seed alone: no spread over seeds is known.")
    return sentences


def seed_table(seeds: Sequence[SeedMean]) -> Table:
    """Means over seeds, one row a state and attack."""
    rows = []
    for mean in seeds:
        title = attack_title(mean.set, mean.knowledge)
        rate = with_interval(mean.rate, mean.low, mean.high)
        ends = f"{percent(mean.lowest_seed)} to {percent(mean.highest_seed)}"
        rows.append([mean.state, title, mean.runs, str(mean.seeds), f"{mean.n:,}", rate, ends])
    return Table(["state", "attack", "runs", "seeds", "n", "mean", "lowest and highest seed"], rows)


def comparison_markdown(
    runs: Sequence[Compared],
    merged: RunResults,
    differences: Sequence[StateDifference],
    seeds: Sequence[SeedMean],
    pictured: bool,
) -> str:
    """The comparison for a release note or a pull request."""
    blocks = [f"# {escaped(joined_words(run.name for run in runs))} side by side"]
    blocks.append("\n".join(f"- {escaped(text)}" for text in comparison_summary(runs, differences, seeds)))
    blocks += ["## Attack success", "Harmful requests complied with: rate, 95 % Wilson interval, counts."]
    blocks.append(table_escaped(attack_table(merged)))
    blocks += tabled("Other attacks", "Success with its interval; refused, incoherent.", further_table(merged))
    blocks += tabled("Over seeds", _NOTES["seeds"], seed_table(seeds))
    blocks += tabled("Differences", _NOTES["differences"], difference_table(differences))
    if pictured:
        blocks += ["## Capability against robustness", _NOTES["scatter"], "![scatter](figures/scatter.svg)"]
    blocks += tabled("Capability", "Score in per cent ± its standard error.", capability_table(merged))
    blocks += tabled("The neurons and the training", "Of each state.", state_table(merged))
    return "\n\n".join(blocks) + "\n"
