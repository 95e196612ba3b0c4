"""The tables of the report: every cell, every count, and a dash where nothing was measured."""

from __future__ import annotations

import csv
import io
from typing import Any

from safeneuron.reporting.report import render_report
from safeneuron.reporting.tables import attack_table, capability_table, category_table, difference_table
from tests.helpers.sample_results import (
    attack,
    benign,
    counts,
    difference,
    rendered,
    sample_provenance,
    sample_results,
    sample_state,
    typed,
)


def table_of(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    header, rows, *_ = attack_table(typed(results))
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_cell_of_the_table_has_rate_interval_and_counts() -> None:
    table = table_of(sample_results())
    assert list(table["T1"]) == [
        *("state", "ORI", "ES static", "SAS static", "FULL static"),
        *("ES adaptive", "SAS adaptive", "FULL adaptive", "random"),
    ]
    assert table["T1"]["FULL adaptive"] == "32\u00a0% (20\u201346\u00a0%) 15/47"
    assert table["T1"]["FULL static"] == "19\u00a0% (10\u201333\u00a0%) 9/47"
    assert table["T0"]["FULL adaptive"] == "85\u00a0% (= static)"


def test_the_iterated_attack_has_a_column_where_it_was_run() -> None:
    results = sample_results()
    results["states"][1]["attacks"].append(attack("FULL", "iterated", 7000, 11, 20))
    table = table_of(results)
    assert list(table["T1"])[-3:] == ["FULL adaptive", "FULL iterated", "random"]
    assert table["T1"]["FULL iterated"].endswith("11/47")
    assert table["T0"]["FULL iterated"] == "\u2013"
    page = render_report(typed(results), [], sample_provenance())["report.html"]
    assert page.count("FULL iterated</th>") == 2
    assert "FULL iterated" not in render_report(typed(sample_results()), [], sample_provenance())["report.html"]


def test_an_attack_that_was_not_run_or_not_judged_is_a_dash_and_never_a_zero() -> None:
    results = sample_results()
    trained = results["states"][1]
    trained["attacks"] = [tried for tried in trained["attacks"] if tried["knowledge"] != "adaptive"]
    trained["attacks"][0]["harmful"] = counts(5, 0, unknown=5)
    table = table_of(results)
    assert table["T1"]["FULL adaptive"] == "\u2013", "a static attack must not stand in for an adaptive one"
    assert table["T1"]["ORI"] == "\u2013"


def test_attacks_csv_gives_back_every_number() -> None:
    results = sample_results()
    rows = list(csv.DictReader(io.StringIO(rendered(results)["tables/attacks.csv"])))
    attacks = [(state, tried) for state in results["states"] for tried in state["attacks"]]
    assert len(rows) == len(attacks) == 5 + 8
    for row, (state, tried) in zip(rows, attacks, strict=True):
        assert (row["state"], row["set"], row["knowledge"]) == (state["name"], tried["set"], tried["knowledge"])
        assert int(row["neurons"]) == tried["neurons"]
        for key in ("n", "refused", "complied", "harmless", "incoherent", "cannot say"):
            assert int(row[f"harmful_{key.replace(' ', '_')}"]) == tried["harmful"][key]
        for key in ("rate", "low", "high"):
            assert float(row[f"attack_success_{key}"]) == tried["harmful"][key]
            assert float(row[f"over_refusal_{key}"]) == tried["benign"][key]
        assert float(row["perplexity"]) == tried["perplexity"]


def test_states_csv_gives_back_neurons_and_training_and_leaves_the_unknown_empty() -> None:
    results = sample_results()
    base, trained = csv.DictReader(io.StringIO(rendered(results)["tables/states.csv"]))
    assert (base["FULL"], base["freeze"], base["last_loss"]) == ("1500", "", "")
    assert (int(trained["frozen"]), trained["freeze"], int(trained["steps"])) == (1660, "safety", 48)
    assert float(trained["density"]) == 1660 / 46080
    assert float(trained["last_margin"]) == results["states"][1]["training"][-1]["margin"]


def test_a_name_with_comma_quote_and_newline_survives_the_csv() -> None:
    state = sample_state("T0", 40)
    state["label"] = 'a "base", two\nlines'
    rows = list(csv.DictReader(io.StringIO(rendered(sample_results(state))["tables/states.csv"])))
    assert rows[0]["label"] == state["label"]


def test_differences_have_their_interval_their_discordant_pairs_and_both_p_values() -> None:
    results = sample_results()
    results["differences"] = [difference("T1", 1e-7), difference("T1", 0.0301, "iterated")]
    header, rows, *_ = difference_table(typed(results).differences or ())
    assert dict(zip(header, rows[1], strict=True)) == {
        "compared": "T0, T1",
        "share of requests": "complied, FULL iterated",
        "n": "47",
        "first": "85\u00a0%",
        "second": "32\u00a0%",
        "difference (points)": "-53 (-66 to -37)",
        "only first": "27",
        "only second": "2",
        "p": "0.030",
        "p, corrected": "0.060",
    }
    assert rows[0][-2:] == ["< 0.001", "< 0.001"]
    files = rendered(results)
    assert "Differences between states" in files["report.html"]
    assert "&lt; 0.001" in files["report.md"]
    found = list(csv.DictReader(io.StringIO(files["tables/differences.csv"])))
    assert [float(row["p_corrected"]) for row in found] == [2e-7, 0.0602]
    plain_files = rendered()
    assert "tables/differences.csv" not in plain_files
    assert "Differences between states" not in plain_files["report.html"] + plain_files["report.md"]


def test_over_refusal_by_category_is_shown_where_there_are_enough_of_each() -> None:
    results = sample_results()
    for state, refused in zip(results["states"], (2, 12), strict=True):
        state["refusals_by_category"] = {"XSTest": benign(30, refused), "twins": benign(20, 1)}
    header, rows, *_ = category_table(typed(results))
    assert header == ["category", "T0", "T1"]
    assert [row[0] for row in rows] == ["XSTest", "twins"]
    assert rows[0][2].endswith("12/30")
    assert "By category" in rendered(results)["report.html"]
    assert "Over-refusal by category" in rendered(results)["report.md"]
    results["states"][1]["refusals_by_category"]["third"] = benign(3, 1)
    assert category_table(typed(results)).rows == [], "too few on average"
    assert category_table(typed(sample_results())).rows == []


def test_capability_scores_have_their_standard_errors() -> None:
    results = sample_results()
    score = {"value": 0.4567, "stderr": 0.0143, "n": 1172}
    results["states"][0]["capability"] = {"FULL": {"gsm8k": score}, "ORI": {"gsm8k": score, "arc_challenge": score}}
    header, rows, *_ = capability_table(typed(results))
    assert header == ["state", "pruned", "gsm8k", "arc_challenge"]
    assert rows == [["T0", "ORI", *["45.7 ± 1.4 (n = 1,172)"] * 2], ["T0", "FULL", "45.7 ± 1.4 (n = 1,172)", "\u2013"]]
    files = rendered(results)
    assert "lm-evaluation-harness" in files["report.html"]
    assert "## Capability" in files["report.md"]
    assert "Capability" not in rendered()["report.md"]
