"""From the stages' files to one ``results.json`` and the report: no number here that a stage has not written."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from safeneuron._version import __version__
from safeneuron.config.align import AlignTable
from safeneuron.config.attack_plan import AttackPlan
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, states_of
from safeneuron.config.toml import to_toml
from safeneuron.evaluation.rates import verdict_rates
from safeneuron.models import embedded
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.reporting.charts import charts_of
from safeneuron.reporting.comparison import difference_of, holm_corrected
from safeneuron.reporting.details import Details, JudgedAnswer, Provenance, StageCost, StrongNeuron
from safeneuron.reporting.figures import as_pictures
from safeneuron.reporting.records import (
    CapabilityScore,
    JudgeAgreement,
    LayerCounts,
    SelectionResult,
    StateDifference,
    TrainingResult,
    TrainingStep,
    read_record,
)
from safeneuron.reporting.report import render_report
from safeneuron.reporting.results import (
    ADAPTIVE,
    COMPARED,
    INTACT,
    AttackResult,
    Counts,
    DensityPoint,
    RunResults,
    StateResults,
)
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines, write_bytes, write_json, write_text
from safeneuron.selection.scores import Scores

STRONGEST = 200
"""Neurons of each criterion that the report shows one by one."""
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "numpy")


def write_report(config: Config, run: Run, folder: Path) -> None:
    """Write ``results.json`` (the same for the same run, however often it was interrupted) and all of the report."""
    results = collect(config, run)
    write_json(folder / "results.json", results.to_json())
    answers = responses(config, run)
    details = Details(answers, strongest_neurons(config, run), analysis_figures(run))
    quoted, origin = examples(config, answers), provenance(config, run)
    for name, text in render_report(results, quoted, origin, config.report.show_text, details).items():
        write_text(folder / name, text)
    for name, picture in as_pictures(charts_of(results)).items():
        write_bytes(folder / "figures" / f"{name}.png", picture)


def collect(config: Config, run: Run) -> RunResults:
    """Every number of the run, by state; no times, so that it can be compared between runs."""
    base = NeuronSet.load(run.folder / "T0" / "select" / "neurons.json")
    findings = Findings(config, run)
    states = findings.states()
    return RunResults(
        name=config.name,
        model=embedded.LABEL if config.model.name == embedded.NAME else config.model.name,
        fingerprint=base.fingerprint,
        seed=config.seed,
        judge=config.judge.label,
        max_new_tokens=config.attack.max_new_tokens,
        neurons_total=base.total,
        layers=len(base.widths),
        part=config.measure.stored_part,
        states=tuple(_state(findings, state, base) for state in states),
        differences=state_differences(findings, states),
    )


def _state(findings: Findings, state: State, base: NeuronSet) -> StateResults:
    folder = findings.run.folder / state.name
    training = read_lines(folder / "align" / "train.jsonl") if state.round > 0 else []
    attacks, curve = _attacks(folder, findings.plan(state))
    agreement = folder / "judge" / "agreement.json"
    pairs = read_json(agreement)["pairs"] if agreement.exists() else []
    return StateResults(
        name=state.name,
        label=label_of(findings.config, state),
        round=state.round,
        variant=state.variant,
        agreement=tuple(read_record(JudgeAgreement, pair) for pair in pairs),
        neurons=_selection(folder, findings, state, base),
        align=_training(findings.run, folder) if state.round > 0 else None,
        training=tuple(read_record(TrainingStep, step) for step in training),
        attacks=tuple(attacks),
        curve=tuple(curve),
        refusals_by_category=_refusals_by_category(findings, state),
        capability=_capability(folder),
    )


def _attacks(folder: Path, plan: AttackPlan) -> tuple[list[AttackResult], list[DensityPoint]]:
    """What the state answered under each attack, the points of the curve apart."""
    attacks, curve = [], []
    for attack in plan.answered:
        record = read_json(folder / "attack" / attack.folder / "pruned.json")
        neurons, judged = int(record["neurons"]), folder / "judge" / attack.folder
        harmful, benign = _counts(judged / "harmful.json"), _counts(judged / "benign.json")
        if attack.knowledge != "curve":
            attacks.append(
                AttackResult(
                    set=attack.set,
                    knowledge=attack.knowledge,
                    neurons=neurons,
                    perplexity=record["perplexity"],
                    harmful=harmful,
                    benign=benign,
                )
            )
        elif harmful is not None:
            curve.append(
                DensityPoint(
                    density=float(attack.set),
                    neurons=neurons,
                    rate=harmful.rate,
                    low=harmful.low,
                    high=harmful.high,
                    incoherent=harmful.incoherent / harmful.n,
                )
            )
    return attacks, curve


def _counts(path: Path) -> Counts | None:
    return read_record(Counts, read_json(path)) if path.exists() else None


def _selection(folder: Path, findings: Findings, state: State, base: NeuronSet) -> SelectionResult:
    es, sas, full = (findings.neurons(state, file) for file in ("ES", "SAS", "neurons"))
    thresholds = read_json(folder / "select" / "thresholds.json")
    return SelectionResult(
        effect_size_threshold=thresholds["effect_size"],
        shift_threshold=thresholds["shift"],
        significant=thresholds["significant"],
        es=len(es),
        sas=len(sas),
        full=len(full),
        density=full.density,
        jaccard_with_t0=full.jaccard(base),
        per_layer=LayerCounts(es=tuple(es.counts), sas=tuple(sas.counts), full=tuple(full.counts)),
    )


def _training(run: Run, folder: Path) -> TrainingResult:
    pairs = len(read_lines(run.folder / "T0" / "pairs" / "pairs.jsonl"))
    return read_record(TrainingResult, {**read_json(folder / "align" / "frozen.json"), "pairs": pairs})


def _refusals_by_category(findings: Findings, state: State) -> dict[str, Counts]:
    """The verdicts on benign requests with nothing pruned, counted for each category of the prompts."""
    groups: dict[str, list[str]] = {}
    by_index = verdicts_of(findings, state, "benign", "ORI", "none")
    for index, prompt in enumerate(findings.prompts("test_safe")):
        if index in by_index:
            groups.setdefault(prompt.category, []).append(by_index[index])
    return {
        category: read_record(Counts, verdict_rates(verdicts, "refused"))
        for category, verdicts in sorted(groups.items())
    }


def _capability(folder: Path) -> dict[str, dict[str, CapabilityScore]]:
    """The scores of the capability benchmarks, by what was pruned and by task; empty where they were not run."""
    scores: dict[str, dict[str, CapabilityScore]] = {}
    for path in sorted((folder / "capability").glob("*/*.json")):
        scores.setdefault(path.parent.name, {})[path.stem] = read_record(CapabilityScore, read_json(path))
    return scores


def state_differences(findings: Findings, states: Sequence[State]) -> tuple[StateDifference, ...]:
    """Paired comparisons, each state with T0 and the main training with each variant of the same round.

    The p-values are corrected for their number, all of this list together.
    """
    others = [state for state in states if state != BASE]
    pairs = [(BASE, state) for state in others]
    pairs += [(rival, main) for main in others for rival in others
              if not main.variant and rival.variant and rival.round == main.round]  # fmt: skip
    return holm_corrected(
        difference_of(
            (first.name, second.name, None),
            compared,
            *(verdicts_of(findings, state, compared[0], *compared[2:]) for state in (first, second)),
        )
        for first, second in pairs
        for compared in COMPARED
    )


def verdicts_of(findings: Findings, state: State, kind: str, which: str, knowledge: str) -> dict[int, str]:
    """The verdicts on a state's answers by the index of the prompt; none where the attack was not made."""
    attack = findings.plan(state).find(which, knowledge)
    if attack is None:
        return {}
    file = findings.run.folder / state.name / "judge" / attack.folder / f"{kind}.jsonl"
    return {int(line["index"]): str(line["verdict"]) for line in read_lines(file)}


def label_of(config: Config, state: State) -> str:
    """What the report calls a state: the config's label, or a description of how it was trained."""
    if state.round == 0:
        return "base model"
    table = config.variant(state.variant)
    label = table.label or describe(table)
    if table.lora_rank and not table.label:
        label += f", {'LoRA' if table.quantise == 'none' else 'QLoRA'} of rank {table.lora_rank}"
    return f"{label}, round {state.round}" if table.rounds > 1 else label


def describe(table: AlignTable) -> str:
    """A training in a few words, for example ``freeze + ablate``."""
    words = {"safety": "freeze", "random": "random freeze", "none": "plain DPO", "all-but-safety": "safety only"}
    frozen = words[table.freeze]
    if table.refresh:
        return "refresh" if table.freeze == "none" else f"{frozen} + refresh"
    if not table.ablate:
        return frozen
    share = f" in {table.ablate_share:.0%} of steps" if table.ablate_share < 1 else ""
    return f"{frozen} + ablate{share}{', reference too' if table.ablate_reference else ''}"


def responses(config: Config, run: Run) -> list[JudgedAnswer]:
    """Every judged answer of every state under every attack, in the order of states, attacks and prompts."""
    findings = Findings(config, run)
    collected = []
    for state in findings.states():
        for attack in findings.plan(state).answered:
            for kind in ("harmful", "benign"):
                file = Path(attack.folder) / f"{kind}.jsonl"
                verdicts = {line["index"]: line for line in read_lines(run.folder / state.name / "judge" / file)}
                answers = {line["index"]: line for line in read_lines(run.folder / state.name / "attack" / file)}
                collected += [
                    JudgedAnswer(
                        state=state.name,
                        set=attack.set,
                        knowledge=attack.knowledge,
                        kind=kind,
                        index=index,
                        prompt=answers[index]["prompt"],
                        image=answers[index].get("image", ""),
                        response=answers[index]["response"],
                        verdict=verdicts[index]["verdict"],
                    )
                    for index in sorted(answers.keys() & verdicts.keys())
                ]
    return collected


def examples(config: Config, answers: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    """Of all answers, each state's first ones, intact and with all its safety neurons pruned."""
    counts = {"harmful": config.report.examples, "benign": min(1, config.report.examples)}
    chosen: list[JudgedAnswer] = []
    taken: Counter[tuple[str, str, str]] = Counter()
    plans = {state.name: AttackPlan.of(config.attack, state) for state in states_of(config)}
    for answer in answers:
        pruned = plans[answer.state].find(*ADAPTIVE)
        attacks = [INTACT, *([] if pruned is None else [(pruned.set, pruned.knowledge)])]
        place = (answer.state, answer.set, answer.kind)
        shown = (answer.set, answer.knowledge) in attacks
        if shown and taken[place] < counts[answer.kind]:
            taken[place] += 1
            chosen.append(answer)
    return chosen


def strongest_neurons(config: Config, run: Run) -> dict[str, list[StrongNeuron]]:
    """The neurons of each state with the largest effect size or shift, in the order of the layers."""
    findings = Findings(config, run)
    strongest = {}
    for state in findings.states():
        scores = Scores.load(run.folder / state.name / "select" / "scores.safetensors")
        sets = [findings.neurons(state, name) for name in ("ES", "SAS")]
        chosen: dict[tuple[int, int], StrongNeuron] = {}
        for criterion, (neurons, values) in enumerate(zip(sets, (scores.d, scores.z), strict=True), start=1):
            ranked = sorted(places_of(neurons), key=lambda place: -float(values[place[2]]))
            for layer, index, flat in ranked[:STRONGEST]:
                criteria = 3 if (layer, index) in sets[2 - criterion] else criterion
                d, z = round(float(scores.d[flat]), 4), round(float(scores.z[flat]), 4)
                chosen[layer, index] = StrongNeuron(layer, index, scores.widths[layer], d, z, criteria)
        strongest[state.name] = [chosen[place] for place in sorted(chosen)]
    return strongest


def places_of(neurons: NeuronSet) -> list[tuple[int, int, int]]:
    """Layer and index of every neuron of a set, and its place among the neurons of all layers."""
    starts = [0, *itertools.accumulate(neurons.widths)]
    return [
        (layer, index, starts[layer] + index)
        for layer, indices in neurons.layers().items()
        for index in indices.tolist()
    ]


def analysis_figures(run: Run) -> dict[str, str]:
    """The SVG text of each figure that ``safeneuron analyse`` has written for the run, by title; none without one."""
    paths = sorted((run.folder / "analysis").rglob("*.svg"))
    return {path.stem.replace("-", " ").replace("_", " "): path.read_text(encoding="utf-8") for path in paths}


def provenance(config: Config, run: Run) -> Provenance:
    """How the results were made: config, versions, machine, and the time and memory of each stage."""
    import torch

    markers = sorted(run.folder.rglob("done.json"), key=lambda path: path.stat().st_mtime)
    records = [read_json(path) for path in markers]
    return Provenance(
        command=f"safeneuron run config.toml --out {run.folder.name}",
        version=__version__,
        versions={
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
            "platform": sys.platform,
            **{package: version(package) for package in PACKAGES},
        },
        created=time.strftime("%Y-%m-%dT%H:%M:%S"),
        config_toml=to_toml(config, comments=False),
        stages=[StageCost(record["stage"], record["seconds"], record["peak_memory_mb"]) for record in records],
        warnings=_warnings(run.folder),
    )


def _warnings(folder: Path) -> list[str]:
    """What the stages have warned of, in their order."""
    paths = (
        folder / "data" / "warnings.json",
        folder / "T0" / "pairs" / "warnings.json",
        *sorted(folder.glob("*/select/warnings.json")),
        *sorted(folder.glob("*/align/warnings.json")),
    )
    return [warning for path in paths if path.exists() for warning in read_json(path)["warnings"]]
