"""The report of a run: one self-contained page, the same in Markdown, the tables as CSV and the figures as SVG.

Values in, values out: ``render_report`` takes the results and returns the content of every file. Whatever a model said
is text from a stranger: it is masked unless asked for, and escaped in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeneuron.reporting.charts import charts_of
from safeneuron.reporting.details import Details, JudgedAnswer, Provenance
from safeneuron.reporting.figures import draw_figures
from safeneuron.reporting.formatting import attack_title
from safeneuron.reporting.rendering import (
    ShownAnswer,
    as_image,
    as_page,
    compressed,
    escaped,
    examples_shown,
    fenced,
    table_escaped,
    tabled,
)
from safeneuron.reporting.results import OUTCOMES, RunResults
from safeneuron.reporting.style import themed
from safeneuron.reporting.summary import READING, headline, limits, methods, points
from safeneuron.reporting.tables import (
    as_csv,
    attack_records,
    attack_table,
    capability_table,
    category_table,
    difference_records,
    difference_table,
    further_table,
    neuron_records,
    outcome_table,
    refusal_cells,
    refusal_table,
    stage_table,
    state_records,
    state_table,
    success_cells,
)

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


def render_report(
    results: RunResults,
    examples: Sequence[JudgedAnswer],
    provenance: Provenance,
    show_text: bool = False,
    details: Details | None = None,
) -> dict[str, str]:
    """Every file of the report but the pictures, which are not text (``as_pictures``).

    A figure for which there are no numbers is left out. Nothing is written.

    Args:
        results: Every number of the run.
        examples: The answers that ``report.md`` quotes.
        provenance: How the results were made.
        show_text: Whether answers stand in the files; without it only the first words of each are in any of them.
        details: What the page shows beside: all answers, the strongest neurons, figures of the analysis.

    Returns:
        The content of each file by its path in the folder of the report.
    """
    details = details or Details()
    differences = results.differences or ()
    drawn = draw_figures(charts_of(results))
    return {
        "report.md": report_markdown(results, examples, provenance, show_text, drawn),
        "report.html": as_report_page(results, examples, provenance, show_text, details, drawn),
        "tables/attacks.csv": as_csv(attack_records(results)),
        "tables/states.csv": as_csv(state_records(results)),
        **({"tables/differences.csv": as_csv(difference_records(differences))} if differences else {}),
        **({"tables/neurons.csv": as_csv(neuron_records(details.neurons))} if details.neurons else {}),
        **{f"figures/{name}.svg": text for name, text in drawn.items()},
    }


def as_report_page(
    results: RunResults,
    examples: Sequence[JudgedAnswer],
    provenance: Provenance,
    show_text: bool,
    details: Details,
    drawn: Mapping[str, str],
) -> str:
    """The page: printed figures stand in it for readers without its script, which draws live ones instead."""
    browsed = details.responses or examples
    charts = {name: chart.to_json() for name, chart in charts_of(results, details.neurons).items()}
    values = {
        "results": results,
        "provenance": provenance,
        "headline": headline(results),
        "points": points(results),
        "methods": methods(results),
        "limits": limits(results),
        "successes": success_cells(results),
        "refusals": refusal_cells(results),
        "iterated": ("FULL", "iterated") in results.columns(),
        "outcomes": OUTCOMES,
        "attack_title": attack_title,
        "state_table": state_table(results),
        "further": further_table(results),
        "further_note": _FURTHER,
        "differences": difference_table(results.differences or ()),
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
    results: RunResults,
    examples: Sequence[JudgedAnswer],
    provenance: Provenance,
    show_text: bool,
    drawn: Mapping[str, str],
) -> str:
    """The same report for a release note or a pull request; the figures are links to the files beside it."""
    blocks = [f"# Safety neurons of {escaped(results.model)}", f"**{escaped(headline(results))}**"]
    blocks.append("\n".join(f"- **{escaped(topic)}.** {escaped(text)}" for topic, text in points(results)))
    blocks.append(BRACKETS)
    blocks += [f"> **Warning.** {escaped(warning)}" for warning in provenance.warnings]
    blocks += ["## Attack success", "Harmful requests complied with: rate, 95 % Wilson interval, counts."]
    blocks += [table_escaped(attack_table(results)), *pictures(drawn, "attack")]
    blocks += tabled("Other attacks", _FURTHER, further_table(results))
    blocks += ["## What the answers were", table_escaped(outcome_table(results))]
    blocks += ["## Over-refusal and perplexity", "Benign requests refused; perplexity after the semicolon."]
    blocks.append(table_escaped(refusal_table(results)))
    blocks += tabled("Over-refusal by category", "Benign requests refused, nothing pruned.", category_table(results))
    blocks += tabled("Capability", CAPABILITY, capability_table(results))
    blocks += tabled("Differences between states", DIFFERENCES, difference_table(results.differences or ()))
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
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    blocks.append(
        f"safeneuron {escaped(provenance.version)}, {escaped(provenance.created)}. "
        f"Model fingerprint {escaped(results.fingerprint)}, judge {escaped(results.judge)}, "
        f"seed {results.seed}. {escaped(versions)}."
    )
    blocks += [fenced(provenance.command), table_escaped(stage_table(provenance)), fenced(provenance.config_toml)]
    return "\n\n".join(blocks) + "\n"


def example_quoted(shown: ShownAnswer) -> str:
    """Prompt and verdict of one example, and its response as a quotation."""
    answer = shown.answer
    hidden = f" ▒▒▒▒ ({shown.hidden:,} characters hidden)" if shown.hidden else ""
    response = "\n> ".join(escaped(line) for line in (shown.text + hidden).splitlines() or [""])
    image = f" [image: {escaped(answer.image)}]" if answer.image else ""
    return f"{escaped(answer.prompt)}{image} *({escaped(answer.verdict)})*\n\n> {response}"


def pictures(drawn: Mapping[str, str], *names: str) -> list[str]:
    """Links to the figures that there are, each with its caption."""
    return [f"![{CAPTIONS[name]}](figures/{name}.svg)" for name in names if name in drawn]
