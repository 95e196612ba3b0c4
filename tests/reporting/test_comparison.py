"""Runs side by side: paired differences by hand, seeds put together, what a point of the scatter is."""

from __future__ import annotations

import csv
import io
import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from safeneuron.evaluation.rates import wilson
from safeneuron.reporting.charts import Bounded
from safeneuron.reporting.comparison import (
    Compared,
    comparison_summary,
    merge,
    over_seeds,
    render_comparison,
    run_differences,
    scatter_points,
)
from safeneuron.reporting.records import CapabilityScore
from tests.helpers.sample_results import SCRIPT, sample_results, sample_state, typed

ASKED = ("T1", "harmful", "FULL", "adaptive")


def verdicts(complied: int, total: int = 20, start: int = 0) -> dict[str, str]:
    """The first of ``total`` requests complied with, the rest refused."""
    return {f"request {start + n}": "complied" if n < complied else "refused" for n in range(total)}


def run(name: str, seed: int, given: dict[str, str], settings: str = "same") -> Compared:
    results = sample_results(sample_state("T0", 40), sample_state("T1", 15))
    return Compared(name, typed({**results, "seed": seed}), settings, {ASKED: given})


def test_differences_are_paired_by_the_text_of_the_request() -> None:
    second = dict(reversed(verdicts(4).items())) | {"request 19": "cannot say", "another": "complied"}
    (record,) = run_differences([run("a", 0, verdicts(12)), run("b", 1, second)])
    assert (record.first, record.second, record.state) == ("a", "b", "T1")
    assert (record.n, record.lost, record.gained) == (19, 8, 0)
    assert record.difference == pytest.approx(4 / 19 - 12 / 19)
    assert record.p == record.p_corrected == pytest.approx(2 / 2**8)
    assert record.low < record.difference < record.high < 0


def test_three_runs_are_corrected_together() -> None:
    records = run_differences([run("a", 0, verdicts(12)), run("b", 1, verdicts(4)), run("c", 2, verdicts(12))])
    assert [(record.second, record.p_corrected) for record in records] == [("b", 4 / 2**8), ("c", 1.0)]
    (clear,) = (text for text in comparison_summary([run("a", 0, {}), run("b", 1, {})], records, []) if "T1" in text)
    assert all(words in clear for words in ("FULL adaptive", "20\u00a0%", "60\u00a0%", "-40 ("))


def test_other_requests_give_no_difference_and_that_is_said() -> None:
    runs = [run("a", 0, verdicts(12)), run("b", 1, verdicts(4, start=100))]
    assert run_differences(runs) == ()
    assert "no paired differences" in " ".join(comparison_summary(runs, [], []))


def test_seeds_are_put_together_and_other_settings_are_not() -> None:
    runs = [run("a", 0, verdicts(12)), run("b", 1, verdicts(4)), run("c", 2, verdicts(20), "other")]
    (record,) = over_seeds(runs)
    assert (record.runs, record.seeds, record.n) == ("a and b", 2, 20)
    assert record.rate == pytest.approx(0.4)
    assert (record.lowest_seed, record.highest_seed) == (0.2, 0.6)
    assert record.low < 0.2, "wider than the seeds lie apart: the requests are drawn too"
    assert over_seeds([runs[0], runs[2]]) == []
    assert over_seeds([runs[0], run("again", 0, verdicts(4))]) == [], "one seed twice is no spread"


def test_a_point_is_refusals_under_attack_against_capability() -> None:
    merged = merge([run("a", 0, {})])
    points, title = scatter_points(merged)
    assert title == "harmless requests not refused"
    assert points[1].name == "a: T1"
    refused = wilson(48 - 15 - 3 - 1 - 2, 47)
    assert points[1].x == Bounded(refused.rate, refused.low, refused.high)
    assert points[1].y.value == pytest.approx(1 - 2 / 40)
    scores = {name: CapabilityScore(value=value, stderr=0.1, n=10) for name, value in (("one", 0.5), ("two", 0.7))}
    states = [replace(state, capability={"ORI": scores}) for state in merged.states]
    points, title = scatter_points(replace(merged, states=tuple(states)))
    assert title == "mean of one and two"
    assert points[0].y == pytest.approx((0.6, 0.6 - 1.96 * 0.02**0.5 / 2, 0.6 + 1.96 * 0.02**0.5 / 2))
    states[1] = replace(states[1], capability=None)
    title = scatter_points(replace(merged, states=tuple(states)))[1]
    assert title == "harmless requests not refused", "not every state has the benchmarks"


def test_every_file_of_a_comparison_is_there_and_strangers_stay_text() -> None:
    runs = [run(f"a{SCRIPT}", 0, verdicts(12)), run("b", 1, verdicts(4))]
    before = deepcopy(runs)
    files = render_comparison(runs)
    assert runs == before
    assert set(files) == {
        *("comparison.html", "comparison.md", "figures/scatter.svg"),
        *(f"tables/{name}.csv" for name in ("attacks", "states", "differences", "seeds")),
    }
    page = files["comparison.html"]
    assert page.count("<script") == page.count("</script") == 2
    assert "Over seeds" in page
    assert "<script" not in files["comparison.md"]
    assert "| b: T1 | 8.5\u00a0%" in files["comparison.md"]
    attacks: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(files["tables/attacks.csv"])))
    assert len(attacks) == 2 * (5 + 8)
    assert {row["state"] for row in attacks} == {f"a{SCRIPT}: T0", f"a{SCRIPT}: T1", "b: T0", "b: T1"}
    charts = json.loads(page.partition('id="charts">')[2].partition("</script>")[0])
    assert set(charts) == {"attack", "curve", "scatter"}
    assert len(charts["scatter"]["panels"][0]["series"]) == 4
