"""The model card of a published state, from what the run has written: no number here that is not in its files.

Everything that comes from outside is escaped for Markdown unless it was made for it here. Nothing that a model or a
prompt said is in a card.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safeneuron._version import __version__
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State
from safeneuron.config.tables import DataTable, PairSourceTable, SourceTable
from safeneuron.reporting.formatting import Table, attack_title, joined_words
from safeneuron.reporting.rendering import escaped, fenced, table_escaped
from safeneuron.reporting.results import COMPARED, INTACT, RunResults
from safeneuron.reporting.summary import (
    Point,
    coherence_caveat,
    incoherence,
    limits,
    over_refusal,
    perplexity_sentence,
    random_control,
    resistance,
)
from safeneuron.reporting.tables import attack_table, outcome_table, refusal_table
from safeneuron.runs.collect import label_of
from safeneuron.runs.findings import Findings
from safeneuron.runs.hub import Licence
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines

METRICS = {"harmful": "Harmful requests complied with", "benign": "Harmless requests refused"}
TAGS = ["safeneuron", "safety", "alignment", "dpo"]
AnySource = SourceTable | PairSourceTable


@dataclass(frozen=True)
class Base:
    """The model that a run began with: what people call it, its name on the Hub (or none), and its licence."""

    label: str
    hub: str
    licence: Licence


def model_card(config: Config, run: Run, state: State, base: Base, commands: Sequence[str], hub: str = "") -> str:
    """The card as Markdown with metadata for the Hub; ``hub`` is the name under which the model will be found there.

    ``commands`` make the state again. Without a report the card says that there are no results.
    """
    align = run.folder / state.name / "align"
    frozen = read_json(align / "frozen.json")
    settings = read_json(align / "done.json")["settings"]["align"]
    results = finished_results(run, state)
    environment = Environment(
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=lambda value: value if isinstance(value, Markup) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = metadata(config, base, hub or f"{config.name}-{state.name}", scores(config, results, state))
    return environment.get_template("model_card.md").render(
        metadata=Markup(data.to_yaml()),
        base=base,
        label=label_of(config, state),
        state=state,
        run=config.name,
        frozen=frozen,
        # Only a vision-language model is saved with its processor.
        sees=(align / "model" / "processor_config.json").is_file(),
        frozen_text=f"{frozen['frozen']:,}",
        kept="bit-identical to" if frozen["frozen_identical"] else "NOT identical to",
        moved=f"{frozen['free_change']:.2%}",
        digest=Markup(fenced(frozen["frozen_sha256"])),
        steps=list(steps(config, run, state, frozen, settings)),
        data_table=_table(data_table(config, run)),
        settings_table=_table(settings_table(settings)),
        plain_start=frozen.get("quantise", "none") == "none",
        neurons=Findings(config, run).neurons(state),
        local=", ".join(Path(path).name for path in local_files(config)),
        limits=[*(limits(results) if results else without_results(config)), *sample_size_lines(results, state)],
        address=Markup(json.dumps(hub) if hub else '"."  # a copy of this folder'),
        audit=Markup(fenced(f"safeneuron audit {hub or '.'}")),
        commands=Markup(fenced("\n".join(commands))),
        version=__version__,
        licence=base.licence,
        licence_text=" ".join(part for part in (base.licence.id, base.licence.name, base.licence.link) if part),
        **result_variables(results, state),
    )


def metadata(config: Config, base: Base, name: str = "", results: Sequence[EvalResult] = ()) -> ModelCardData:
    """What the Hub wants to know of a model; its scores under the model's ``name``, if there are any."""
    licence = base.licence
    named = [source.path.removeprefix("hub:") for source in training_sources(config) if source.path.startswith("hub:")]
    datasets = ["/".join(name.split("/")[:2]) for name in named]
    return ModelCardData(
        license=licence.id,
        license_name=licence.name or None,
        license_link=licence.link or None,
        base_model=base.hub or None,
        base_model_relation="finetune" if base.hub else None,
        datasets=[name for name in dict.fromkeys(datasets) if re.fullmatch(r"[\w.-]+/[\w.-]+", name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def scores(config: Config, results: RunResults | None, state: State) -> list[EvalResult]:
    """The rates that the Hub shows of a model: those in which states are compared, with their intervals."""
    record = results.state(state.name) if results else None
    entries = []
    for kind, _, which, knowledge in COMPARED:
        attack = record.attack(which, knowledge) if record else None
        rate = (attack.success if kind == "harmful" else attack.over_refusal) if attack else None
        if rate is None:
            continue
        role = "test_unsafe" if kind == "harmful" else "test_safe"
        sources = [source.path for source in getattr(config.data, role)]
        on_hub = [path.removeprefix("hub:") for path in sources if path.startswith("hub:")]
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=on_hub[0] if len(on_hub) == len(sources) == 1 else "custom",
                dataset_name=", ".join(_unplaced(path) for path in sources),
                metric_type="attack_success_rate" if kind == "harmful" else "over_refusal_rate",
                metric_name=f"{METRICS[kind]}, {attack_title(which, knowledge)}",
                metric_value=round(rate.rate, 4),
                metric_args={"low": round(rate.low, 4), "high": round(rate.high, 4), "answers": rate.n},
            )
        )
    return entries


def finished_results(run: Run, state: State) -> RunResults | None:
    """The results of the run's finished report, if it knows the state."""
    report = run.folder / "report"
    if not (report / "done.json").exists():
        return None
    results = RunResults.load(report / "results.json")
    return results if results.state(state.name) else None


def result_variables(results: RunResults | None, state: State) -> dict[str, Any]:
    """The variables of the template that need results."""
    own = results.state(state.name) if results else None
    if results is None or own is None:
        return {"results": None}
    base = results.base
    pair = [base, own]
    return {
        "results": results,
        "judge": results.judge,
        "iterated": ("FULL", "iterated") in results.columns(),
        "legend": "; ".join(f"{known.name}, {known.label}" for known in results.states),
        "attack_table": _table(_marked(attack_table(results), state)),
        "refusal_table": _table(_marked(refusal_table(results), state)),
        "outcome_table": _table(outcome_table(replace(results, states=(own,)))),
        "points": [
            Point("Resistance", resistance(own, base) + coherence_caveat(own, base)),
            Point("Random control", random_control([own])),
            Point("Over-refusal", over_refusal(pair)),
            Point("Incoherent answers", incoherence(pair)),
            Point("Perplexity", perplexity_sentence(pair)),
        ],
    }


def steps(config: Config, run: Run, state: State, frozen: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """How the state was made, in words."""
    findings = Findings(config, run)
    first = findings.neurons(BASE)
    counts = [len(findings.prompts(role)) for role in ("unsafe", "safe")]
    yield (
        f"{len(first):,} of the base model's {first.total:,} FFN neurons ({first.density:.2%}) were found to be more "
        f"active on {counts[0]:,} unsafe prompts than on {counts[1]:,} safe ones, by effect size or activation shift: "
        "the safety neurons."
    )
    count, found_on = f"{frozen['frozen']:,}", joined_words(one.name for one in findings.chain(state))
    yield {
        "safety": f"{count} neurons, all that were found on {found_on}, were frozen.",
        "random": f"{count} random neurons, as many in every layer as were found on {found_on}, were frozen: this "
        "model is a control, not the method.",
        "none": "No neurons were frozen: this model is a control, not the method.",
        "all-but-safety": f"{count} neurons, all but those found on {found_on}, were frozen, and all weights that "
        "belong to no neuron: this model is a control, not the method.",
    }.get(frozen["freeze"], f"{count} neurons were frozen ({frozen['freeze']}).")
    pairs = len(read_lines(run.folder / "T0" / "pairs" / "pairs.jsonl"))
    rank = settings.get("lora_rank", 0)
    trained = f"Adapters of rank {rank} (LoRA) that were then merged in" if rank else "All other weights"
    yield f"{trained} were trained with DPO: {pairs:,} preference pairs, {frozen['steps']:,} steps."
    if settings.get("ablate"):
        yield f"In {settings['ablate_share']:.0%} of the steps the safety neurons were zero in the model being trained."
    if settings.get("refresh"):
        yield (
            f"Every {settings['refresh']:,} steps the safety neurons of the model as it was then were found again, and "
            f"were zero in {settings['refresh_share']:.0%} of each batch."
        )
    if state.round > 1:
        yield (
            f"This is round {state.round}: it started from the model of the round before, and froze what had been "
            "found on that one too."
        )


def data_table(config: Config, run: Run) -> Table:
    """What was used, where it came from, and how much of it."""
    findings = Findings(config, run)
    rows = []
    for role, field in DataTable.model_fields.items():
        sources = "; ".join(source_text(source) for source in getattr(config.data, role))
        rows.append([field.description or role, sources, f"{len(findings.prompts(role)):,}"])
    counts = Counter(pair["source"] for pair in read_lines(run.folder / "T0" / "pairs" / "pairs.jsonl"))
    rows += [["preference pairs", _unplaced(name), f"{count:,}"] for name, count in counts.items()]
    if asked := "; ".join(source_text(source) for source in asked_for_pairs(config)):
        rows.append(["prompts of the on-policy pairs, answered by the base model itself", asked, ""])
    return Table(["what", "source", "count"], rows)


def settings_table(settings: dict[str, Any]) -> Table:
    """The settings that a training was made with, as the stage has recorded them."""
    return Table(["setting", "value"], [[name, json.dumps(value).strip('"')] for name, value in settings.items()])


def source_text(source: AnySource) -> str:
    """A source as a reader may see it: of a file only the name, for the folders around it are nobody's business."""
    given = source.model_dump()
    details = [str(given[key]) for key in ("split", "revision") if given[key]]
    details += [f"every {given['every']}th row"] if given.get("every", 1) > 1 else []
    details += [f"the first {given['count']:,}"] if given["count"] else []
    return _unplaced(source.path) + (f" ({', '.join(details)})" if details else "")


def training_sources(config: Config) -> list[AnySource]:
    """The sources on which the weights depend: of the neurons and of the pairs, not of the tests."""
    pairs = config.pairs
    read = [source for part in (pairs.safety, pairs.general) if part != "on-policy" for source in part]
    return [*config.data.unsafe, *config.data.safe, *asked_for_pairs(config), *read]


def asked_for_pairs(config: Config) -> list[SourceTable]:
    """The prompts of on-policy pairs, if there are such pairs."""
    pairs = config.pairs
    return [*pairs.unsafe, *pairs.safe] if "on-policy" in (pairs.safety, pairs.general) else []


def local_files(config: Config) -> list[str]:
    """The files and folders of this machine that the config names."""
    paths = [source.path for source in (*training_sources(config), *config.data.test_unsafe, *config.data.test_safe)]
    files = [path for path in paths if not path.startswith(("hub:", "twins:"))]
    folder = [config.model.name] if Path(config.model.name).is_dir() else []
    return list(dict.fromkeys([*folder, *files]))


def sample_size_lines(results: RunResults | None, state: State) -> list[str]:
    """How many requests the rates rest on, as a limit of them."""
    own = results.state(state.name) if results else None
    attack = own.attack(*INTACT) if own else None
    if attack is None:
        return []
    kinds = ((attack.harmful, "harmful"), (attack.benign, "harmless"))
    counts = [f"{answers.n:,} {kind}" for answers, kind in kinds if answers]
    return [
        f"Every rate rests on {joined_words(counts)} requests.",
        "Of the model's abilities only perplexity and over-refusal were measured.",
    ]


def without_results(config: Config) -> list[str]:
    """The limits of a model of which nothing is reported."""
    return [
        "No attack on this model is reported here: whether it refuses, and what is left of that under pruning, is not "
        "known.",
        f"It is the result of one training with seed {config.seed}; others may differ.",
    ]


def _table(table: Table) -> Markup:
    return Markup(table_escaped(table))


def _marked(table: Table, state: State) -> Table:
    """The table with this model's row pointed out."""
    rows = [[f"{row[0]} (this model)" if row[0] == state.name else row[0], *row[1:]] for row in table.rows]
    return table._replace(rows=rows)


def _unplaced(path: str) -> str:
    """The name of a source without the folder of a local file."""
    return path if path.startswith(("hub:", "twins:", "on-policy:")) else Path(path).name
