"""The report: its files, its shape, and that no stranger's text gets out of its quotes."""

from __future__ import annotations

import base64
import hashlib
import re
from copy import deepcopy
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from safeneuron.reporting.details import Details, JudgedAnswer, Provenance, StrongNeuron
from safeneuron.reporting.report import render_report
from safeneuron.reporting.results import RunResults
from safeneuron.reporting.tables import attack_table
from tests.helpers.sample_results import (
    SCRIPT,
    SECRET,
    Page,
    counts,
    inside,
    rendered,
    sample_examples,
    sample_provenance,
    sample_results,
    sample_state,
    typed,
)


def test_output_is_the_same_for_the_same_results() -> None:
    assert rendered() == rendered(deepcopy(sample_results()))


def test_results_are_not_changed() -> None:
    results, before = sample_results(), sample_results()
    rendered(results)
    assert results == before


def test_every_file_and_every_figure_is_there_and_well_formed() -> None:
    files = rendered()
    figures = [f"figures/{name}.svg" for name in ("attack", "curve", "layers", "training")]
    assert sorted(files) == sorted(["report.html", "report.md", "tables/attacks.csv", "tables/states.csv", *figures])
    for name in figures:
        root = ElementTree.fromstring(files[name])
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert f"]({name})" in files["report.md"]
    identifiers = [attributes["id"] for _, attributes in Page(files["report.html"]).tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)), "figures in one page must not share identifiers"
    references = re.findall(r'(?:url\(|href=")#([^")]+)', re.sub(r"(?s)<script.*?</script>", "", files["report.html"]))
    assert references
    assert set(references) <= set(identifiers)


def test_a_single_state_without_curve_training_benign_and_perplexity() -> None:
    state = sample_state("T0", 40)
    state["curve"] = []
    for attack in state["attacks"]:
        attack["benign"] = attack["perplexity"] = None
    results = sample_results(state)
    files = render_report(typed(results), [], replace(sample_provenance(), warnings=[], stages=[]))
    assert "figures/curve.svg" not in files
    assert "figures/training.svg" not in files
    assert "Over-refusal was not measured on T0." in files["report.html"]
    assert "Examples" not in files["report.md"]
    assert "None" not in files["report.html"] + files["report.md"] + files["tables/attacks.csv"]


def test_nothing_judged_at_all() -> None:
    results = sample_results()
    for state in results["states"]:
        state["curve"] = []
        for attack in state["attacks"]:
            attack["harmful"], attack["benign"] = counts(0, 0), counts(0, 0)
    files = rendered(results)
    assert "Resistance is not known" in files["report.md"]
    assert "figures/attack.svg" not in files
    assert "nan" not in files["report.md"]


def test_ten_states() -> None:
    results = sample_results(*[sample_state(f"T{index}", 40 - 4 * index) for index in range(10)])
    files = rendered(results)
    assert [row[0] for row in attack_table(typed(results)).rows] == [f"T{index}" for index in range(10)]
    for name in ("attack", "curve", "layers"):
        assert all(f"T{index}" in files[f"figures/{name}.svg"] for index in range(10))


def poisoned() -> tuple[RunResults, list[JudgedAnswer], Provenance]:
    """A script wherever a user, a model or a prompt can put text."""
    results, provenance = sample_results(), sample_provenance()
    for key in ("name", "model", "fingerprint", "judge"):
        results[key] += SCRIPT
    for state in results["states"]:
        state["name"] += SCRIPT
        state["label"] += SCRIPT
    examples = [replace(answer, prompt=SCRIPT, response=f"{SCRIPT} {SECRET}") for answer in sample_examples()]
    provenance = replace(
        provenance,
        command=provenance.command + SCRIPT,
        version=provenance.version + SCRIPT,
        created=provenance.created + SCRIPT,
        config_toml=provenance.config_toml + SCRIPT,
        versions={**provenance.versions, SCRIPT: SCRIPT},
        warnings=[SCRIPT],
        stages=[replace(provenance.stages[0], stage=f"T0/measure{SCRIPT}"), *provenance.stages[1:]],
    )
    return typed(results), examples, provenance


@pytest.mark.parametrize("show_text", [False, True])
def test_a_script_stays_text_everywhere(show_text: bool) -> None:
    files = render_report(*poisoned(), show_text)
    page = Page(files["report.html"])
    scripts = [attributes.get("id") for tag, attributes in page.tags if tag == "script"]
    assert scripts == ["charts", "responses", None], "the data and the page's own script, and no other"
    assert files["report.html"].count("<script") == files["report.html"].count("</script") == 3
    assert SCRIPT in "".join(page.words), "the text itself must not be lost"
    assert SCRIPT in "".join(inside(files["report.html"], "responses")["prompts"])
    assert "<script" not in re.sub(r"```.*?```", "", files["report.md"], flags=re.DOTALL)
    for name, text in files.items():
        if name.endswith(".svg"):
            assert not [element for element in ElementTree.fromstring(text).iter() if element.tag.endswith("script")]


def test_responses_are_masked_in_every_file_unless_asked_for() -> None:
    hidden, shown = rendered(), rendered(show_text=True)
    assert all("recipe" not in text and "moonlight" not in text for text in hidden.values())
    rows = inside(hidden["report.html"], "responses")["rows"]
    assert rows[0][5:] == ["I cannot quite", len(SECRET) - len("I cannot quite")]
    assert f"({len(SECRET) - len('I cannot quite')} characters hidden)" in hidden["report.md"]
    assert SECRET in shown["report.html"]
    assert SECRET in shown["report.md"]


def test_the_page_allows_only_its_own_script() -> None:
    html = rendered()["report.html"]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def test_further_figures_stand_in_the_page_as_images_and_neurons_in_a_table() -> None:
    details = Details(
        (), {"T0": [StrongNeuron(3, 7, 100, 1.5, 2.5, 3)]}, {"topics": f"<svg>{SCRIPT}</svg>", "own": "<svg/>"}
    )
    files = render_report(typed(sample_results()), sample_examples(), sample_provenance(), details=details)
    assert "<figcaption>Topics: neurons found for all, some or one of them" in files["report.html"]
    assert "<figcaption>own</figcaption>" in files["report.html"], "what has no caption has its name"
    assert files["report.html"].count("<script") == 3
    assert files["tables/neurons.csv"] == "state,layer,neuron,d,z,ES,SAS\nT0,3,7,1.5,2.5,1,1\n"
    (panel,) = inside(files["report.html"], "charts")["neurons"]["panels"]
    assert panel["series"][0]["points"][0]["x"] == 3.07


def test_the_page_loads_nothing() -> None:
    html = rendered()["report.html"]
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not re.search(r"https?:(?!//www\.w3\.org/(?:2000/svg|1999/xlink))", html)
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|import)\b\s*\(|innerHTML|eval\(", html)


def test_a_fence_in_the_settings_does_not_end_the_code_block() -> None:
    provenance = replace(sample_provenance(), config_toml="a = 1\n```\n# not a heading")
    text = render_report(typed(sample_results()), [], provenance)["report.md"]
    assert "````\na = 1\n```\n# not a heading\n````" in text
