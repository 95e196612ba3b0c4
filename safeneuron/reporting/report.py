"""The report of a run: one self-contained page, the same in Markdown, the tables as CSV and the figures as SVG.

Values in, values out: ``render`` takes the results and returns the content of every file. Whatever a model said is text
from a stranger: it is masked unless asked for, and escaped in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safeneuron.errors import InputError
from safeneuron.reporting.charts import charts_of
from safeneuron.reporting.figures import draw_figures, themed
from safeneuron.reporting.rendering import (
    as_image,
    as_page,
    compressed,
    escaped,
    examples_shown,
    fenced,
    table_escaped,
    tabled,
)
from safeneuron.reporting.results import attack_title, columns_of, refusal_of, success_of
from safeneuron.reporting.summary import READING, headline, limits, methods, points
from safeneuron.reporting.tables import (
    OUTCOMES,
    as_csv,
    attack_records,
    attack_table,
    capability_table,
    category_table,
    cells_of,
    difference_table,
    further_table,
    neuron_records,
    outcome_table,
    refusal_table,
    stage_table,
    state_records,
    state_table,
)

__all__ = ["Details", "attack_table", "render"]

REPORT_SCHEMA = 1
BRACKETS = "Brackets hold 95 % Wilson intervals."
DIFFERENCES = (
    "Two states on the same requests: the share of each, the paired difference with its 95 % interval (Newcombe), the "
    "requests on which only one of them has the outcome, and the p-value of the exact McNemar test, as it is and "
    "corrected for the number of tests in this table (Holm)."
)
_FURTHER = (
    "Attackers who look for as many neurons in other ways, set them to other values, or do not prune at all. A cell: "
    "harmful requests complied with and the 95 % interval; then the shares refused and incoherent."
)
CAPABILITY = "By lm-evaluation-harness: score in per cent ± its standard error, and the number of questions."
CAPTIONS = {
    "attack": "Attack success rate of every state under every attack, with 95 % Wilson intervals. The hatched part is "
    "incoherent text, which is neither safe nor harmful. On the base model adaptive is the same as static.",
    "curve": "Attack success rate with 95 % Wilson intervals, and share of incoherent text, as more are pruned.",
    "layers": "Safety neurons found in each layer, all panels on the same axes.",
    "neurons": "The safety neurons with the largest effect size or shift, by layer and effect size.",
    "training": "Preference training of each trained state.",
    "topics": "Topics: neurons found for all, some or one of them, and their overlap against chance.",
    "depth": "Where in the depth of the model the neurons lie.",
    "stability": "Stability: the set found again with other prompts, and measured in other ways.",
    "states": "What training changed, layer by layer.",
    "redundancy": f"Redundancy: disjoint sets of neurons pruned alone and together, with 95 % intervals. {READING}",
    "methods": "How selectors agree, and which neurons chance alone could have selected.",
    "scale": "Attack success against the number of preference pairs, with 95 % Wilson intervals.",
    "rounds": "Attack success round by round.",
}


@dataclass(frozen=True)
class Details:
    """What the page shows beside the results: all answers, the strongest neurons of each state, further figures.

    ``responses`` are like examples, ``neurons`` as ``charts.neuron_chart`` takes them, ``analysis`` SVG text by title.
    """

    responses: Sequence[dict[str, Any]] = ()
    neurons: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    analysis: Mapping[str, str] = field(default_factory=dict)


def render(
    results: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    show_text: bool = False,
    details: Details | None = None,
) -> dict[str, str]:
    """Relative path and content of every file of the report; ``pictures`` makes those that are not text.

    A figure for which there are no numbers is left out. Without ``show_text`` only the first words of each response are
    in any of the files. Raises ``InputError`` for results of another schema or without a state.
    """
    details = details or Details()
    if results.get("schema") != REPORT_SCHEMA or not results.get("states"):
        raise InputError(
            f"the report needs results of schema {REPORT_SCHEMA} with at least one state, but got schema "
            f"{results.get('schema')!r} with {len(results.get('states') or [])} states; run the stages again"
        )
    drawn = draw_figures(results)
    return {
        "report.md": report_markdown(results, examples, provenance, show_text, drawn),
        "report.html": as_report_page(results, examples, provenance, show_text, details, drawn),
        "tables/attacks.csv": as_csv(attack_records(results)),
        "tables/states.csv": as_csv(state_records(results)),
        **({"tables/differences.csv": as_csv(results["differences"])} if results.get("differences") else {}),
        **({"tables/neurons.csv": as_csv(neuron_records(details.neurons))} if details.neurons else {}),
        **{f"figures/{name}.svg": text for name, text in drawn.items()},
    }


def as_report_page(
    results: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    show_text: bool,
    details: Details,
    drawn: dict[str, str],
) -> str:
    """The page: matplotlib's figures stand in it for readers without its script, which draws live ones instead."""
    browsed = details.responses or examples
    charts = charts_of(results, details.neurons)
    values = {
        "results": results,
        "provenance": provenance,
        "headline": headline(results),
        "points": points(results),
        "methods": methods(results),
        "limits": limits(results),
        "successes": cells_of(results, success_of),
        "refusals": cells_of(results, refusal_of),
        "iterated": ("FULL", "iterated") in columns_of(results),
        "outcomes": OUTCOMES,
        "attack_title": attack_title,
        "state_table": state_table(results),
        "further": further_table(results),
        "further_note": _FURTHER,
        "differences": difference_table(results),
        "difference_note": DIFFERENCES,
        "categories": category_table(results),
        "capability": capability_table(results),
        "capability_note": CAPABILITY,
        "stage_table": stage_table(provenance),
        "figures": {name: themed(text) for name, text in drawn.items()},
        "charts": charts,
        "captions": CAPTIONS,
        "brackets": BRACKETS,
        "analysis": {name: as_image(text) for name, text in details.analysis.items()},
        "browsed": bool(browsed),
        "show_text": show_text,
    }
    data = {"charts": charts, **({"responses": compressed(browsed, show_text)} if browsed else {})}
    return as_page("report.html", values, data)


def report_markdown(
    results: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    show_text: bool,
    drawn: dict[str, str],
) -> str:
    """The same report for a release note or a pull request; the figures are links to the files beside it."""
    blocks = [f"# Safety neurons of {escaped(results['model'])}", f"**{escaped(headline(results))}**"]
    blocks.append("\n".join(f"- **{escaped(topic)}.** {escaped(text)}" for topic, text in points(results)))
    blocks.append(BRACKETS)
    blocks += [f"> **Warning.** {escaped(warning)}" for warning in provenance["warnings"]]
    blocks += ["## Attack success", "Harmful requests complied with: rate, 95 % Wilson interval, counts."]
    blocks += [table_escaped(attack_table(results)), *pictures(drawn, "attack")]
    blocks += tabled("Other attacks", _FURTHER, further_table(results))
    blocks += ["## What the answers were", table_escaped(outcome_table(results))]
    blocks += ["## Over-refusal and perplexity", "Benign requests refused; perplexity after the semicolon."]
    blocks.append(table_escaped(refusal_table(results)))
    blocks += tabled("Over-refusal by category", "Benign requests refused, nothing pruned.", category_table(results))
    blocks += tabled("Capability", CAPABILITY, capability_table(results))
    blocks += tabled("Differences between states", DIFFERENCES, difference_table(results))
    if "curve" in drawn:
        blocks += ["## As more neurons are pruned", *pictures(drawn, "curve")]
    blocks += [
        "## The neurons and the training",
        table_escaped(state_table(results)),
        *pictures(drawn, "layers", "training"),
    ]
    if examples:
        blocks.append("## Examples")
    for title, group in examples_shown(examples, show_text).items():
        blocks += [f"### {escaped(title)}", *(example_quoted(example) for example in group)]
    blocks += ["## Method", "\n".join(f"- {escaped(text)}" for text in methods(results))]
    blocks += ["## Limits", "\n".join(f"- {escaped(text)}" for text in limits(results)), "## How it was made"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    blocks.append(
        f"safeneuron {escaped(provenance['version'])}, {escaped(provenance['created'])}. "
        f"Model fingerprint {escaped(results['fingerprint'])}, judge {escaped(results['judge'])}, "
        f"seed {results['seed']}. {escaped(versions)}."
    )
    blocks += [fenced(provenance["command"]), table_escaped(stage_table(provenance)), fenced(provenance["config_toml"])]
    return "\n\n".join(blocks) + "\n"


def example_quoted(example: dict[str, Any]) -> str:
    """Prompt and verdict of one example, and its response as a quotation."""
    hidden = f" ▒▒▒▒ ({example['hidden']:,} characters hidden)" if example["hidden"] else ""
    response = "\n> ".join(escaped(line) for line in (example["response"] + hidden).splitlines() or [""])
    image = f" [image: {escaped(example['image'])}]" if example.get("image") else ""
    return f"{escaped(example['prompt'])}{image} *({escaped(example['verdict'])})*\n\n> {response}"


def pictures(drawn: dict[str, str], *names: str) -> list[str]:
    """Links to the figures that there are, each with its caption."""
    return [f"![{CAPTIONS[name]}](figures/{name}.svg)" for name in names if name in drawn]
