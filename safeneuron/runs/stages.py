"""The stages of a run, in order, over the states T0, T1, ...: each is a function that says what the stage is.

1.  data       read the prompts, keep the exact records used
2.  measure    activation statistics of the state on unsafe and safe prompts
3.  select     scores of all neurons, and the safety neurons
4.  iterate    find, prune, find again: the neurons of the iterated attacker, if there is one
5.  rivals     what rival selectors find, and what the fine-tuning attack learns, if there are any
6.  attack     answers with neurons pruned: T0's (static), the state's own (adaptive, iterated), random ones; and others
7.  judge      verdicts on the answers
8.  capability benchmarks of what the state can do besides, if they are enabled
9.  pairs      preference pairs, once, from T0
10. align      train the next state with all neurons found so far frozen; back to 2
11. report     tables and figures over all states

Those from 4 to 8 are in ``attack_stages``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safeneuron.config.states import BASE, State, previous, states_of
from safeneuron.config.tables import SourceTable
from safeneuron.data.pairs import mix
from safeneuron.data.prompts import check_classes, check_splits
from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.vision_tower import measure_towers
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.planning.plan import plan_for
from safeneuron.runs.attack_stages import attack_stages
from safeneuron.runs.attackers import refresh_of, settings_of
from safeneuron.runs.context import RunContext, weights_stage
from safeneuron.runs.inputs import hashes_of, leaks, measurement_of, pairs_made, pairs_of, prompts_of, selection_of
from safeneuron.runs.runner import StageSpec, kind_of
from safeneuron.runtime.files import read_lines, write_json, write_lines, writing
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import FEWEST, choose, resolve_thresholds, score
from safeneuron.training.ablation import Ablation
from safeneuron.training.alignment import align
from safeneuron.training.settings import TrainingSettings

PROMPTS = ("unsafe", "safe", "test_unsafe", "test_safe")
"""The roles of prompts: two classes on which neurons are found, and two that attacks are tested with."""

KINDS_OF_VERB = {
    "measure": ("data", "measure"),
    "select": ("data", "select"),
    "attack": ("data", "iterate", "rivals", "attack", "judge", "capability"),
    "align": ("data", "pairs", "align"),
    "report": ("data", "report"),
}
"""The kinds of stage that each verb of the command line does; prompts are read by whichever is the first."""


def verb_for(stage: str) -> str:
    """The verb of the command line that makes a stage, by the stage's name."""
    return next(verb for verb, kinds in KINDS_OF_VERB.items() if kind_of(stage) in kinds)


def stages_of(context: RunContext) -> Iterator[StageSpec]:
    """The stages of the run, in order; each is looked at only after those before it have been done.

    Rounds after one that stopped early are left out once that is known.
    """
    base, *trained = states_of(context.config)
    yield data_stage(context)
    yield from _examination(context, base)
    if trained:
        yield pairs_stage(context)
    for state in trained:
        if state in context.findings.states():
            yield align_stage(context, state)
            yield from _examination(context, state)
    yield report_stage(context)


def _examination(context: RunContext, state: State) -> Iterator[StageSpec]:
    """Find the state's neurons and attack it."""
    yield measure_stage(context, state)
    yield select_stage(context, state)
    yield from attack_stages(context, state)


# -- data, measure, select --------------------------------------------------------------------------------------------


def data_stage(context: RunContext) -> StageSpec:
    """The prompts of all four roles, kept in ``data/``."""
    table = context.config.data
    files = {role: hashes_of(getattr(table, role)) for role in PROMPTS}
    settings = {"data": table.model_dump(mode="json"), "files": files}
    return StageSpec("data", settings, [], partial(_keep_prompts, context))


def _keep_prompts(context: RunContext, folder: Path) -> None:
    prompts = {role: prompts_of(getattr(context.config.data, role)) for role in PROMPTS}
    warnings = check_classes(prompts["unsafe"], prompts["safe"])
    if not prompts["test_unsafe"]:
        raise InputError("there are no harmful prompts to attack with; check data.test_unsafe in the config")
    warnings += check_splits(**prompts)
    for role, of_role in prompts.items():
        write_lines(folder / f"{role}.jsonl", (prompt.to_record(folder) for prompt in of_role))
    context.warn(folder, warnings)


def measure_stage(context: RunContext, state: State) -> StageSpec:
    """Activation statistics of the state (Eq. 1-4)."""
    settings = {"measure": context.config.measure.settings(), "model": context.config.model.settings()}
    inputs = ["data", *weights_stage(state)]
    return StageSpec(f"{state.name}/measure", settings, inputs, partial(_measure, context, state), together=True)


def _measure(context: RunContext, state: State, folder: Path) -> None:
    table, progress = context.config.measure, context.watcher.progress
    unsafe, safe = context.findings.classes()
    if table.part == "vision":
        stats = measure_towers(context.models.of(state), unsafe, safe, table.pooling, progress=progress)
    else:
        stats = measure(
            context.models.of(state),
            unsafe,
            safe,
            measurement_of(context.config),
            progress=progress,
        )
    stats.save(folder / "stats.safetensors")


def select_stage(context: RunContext, state: State) -> StageSpec:
    """Scores of all neurons and the safety neurons (Eq. 5-10)."""
    settings = {"select": context.config.select.model_dump()}
    return StageSpec(f"{state.name}/select", settings, [f"{state.name}/measure"], partial(_select, context, state))


def _select(context: RunContext, state: State, folder: Path) -> None:
    scores = score(ActivationStats.load(context.run.folder / state.name / "measure" / "stats.safetensors"))
    thresholds = resolve_thresholds(scores, selection_of(context.config))
    selection = choose(scores, thresholds)
    if not len(selection.union):
        raise InputError(
            f"no neuron of {state.name} exceeds the thresholds (effect_size {thresholds.effect_size:.3g}, "
            f"shift {thresholds.shift:.3g}); lower them in [select], or give a density"
        )
    scores.save(folder / "scores.safetensors")
    selection.es.save(folder / "ES.json")
    selection.sas.save(folder / "SAS.json")
    selection.union.save(folder / "neurons.json")
    record = {**thresholds._asdict(), "significant": scores.significant}
    if scores.unscored:
        record["unscored"] = scores.unscored
        warning = (
            f"{scores.unscored:,} of {selection.union.total:,} neurons of {state.name} were not scored: fewer "
            f"than {FEWEST} prompts of a class were routed to their experts"
        )
        context.warn(folder, [warning])
    write_json(folder / "thresholds.json", record)


# -- pairs, align -----------------------------------------------------------------------------------------------------


def pairs_stage(context: RunContext) -> StageSpec:
    """The preference pairs of all trainings, made from T0 or read."""
    config, table = context.config, context.config.pairs
    on_policy = "on-policy" in (table.safety, table.general)
    settings: dict[str, Any] = {"pairs": table.model_dump(mode="json"), "seed": config.seed}
    sources: list[Any] = [source for part in (table.safety, table.general) if part != "on-policy" for source in part]
    inputs = []
    if on_policy:
        settings |= {"judge": config.judge.settings(), "max_length": config.align.max_length}
        inputs = ["T0/select"]
        sources += [*table.unsafe, *table.safe]
    settings["files"] = hashes_of(sources)
    return StageSpec("T0/pairs", settings, inputs, partial(_pair, context), together=on_policy)


def _pair(context: RunContext, folder: Path) -> None:
    config, table, findings = context.config, context.config.pairs, context.findings
    warnings: list[str] = []

    def read_or_made(sources: Any, unsafe: Sequence[SourceTable], safe: Sequence[SourceTable]) -> list[Pair]:
        if sources != "on-policy":
            return [pair for source in sources for pair in pairs_of(source, warnings)]
        model, neurons = context.models.of(BASE), findings.neurons(BASE)
        return pairs_made(config, model, neurons, unsafe, safe, warnings, context.watcher.progress)

    # Harmless prompts make pairs of one part only: the general one, if it is on-policy too.
    safety = read_or_made(table.safety, table.unsafe, table.safe if table.general != "on-policy" else ())
    general = read_or_made(table.general, (), table.safe)
    pairs = mix(safety, general, table.safety_share, table.count, config.seed) if general else safety[: table.count]
    write_lines(folder / "pairs.jsonl", (pair.to_record(folder) for pair in pairs))
    tests = {role: findings.prompts(role) for role in ("test_unsafe", "test_safe")}
    context.warn(folder, [*warnings, *leaks(pairs, tests)])


def align_stage(context: RunContext, state: State) -> StageSpec:
    """The training of the state from the previous one, with every neuron found so far frozen (Eq. 11-13)."""
    config, table = context.config, context.config.variant(state.variant)
    # How often it is done, and what it needs in memory, are not part of what a training is.
    apart = {"label", "rounds", "stop_early", "fit_memory"}
    if not table.freeze_routers:
        # So that what was trained before there was such a switch still counts.
        apart.add("freeze_routers")
    settings = {"align": table.model_dump(exclude=apart), "seed": config.seed, "model": config.model.settings()}
    searched = [f"{earlier.name}/select" for earlier in context.findings.chain(state)]
    inputs = ["T0/pairs", *weights_stage(previous(state)), *searched]
    if table.refresh:
        settings |= settings_of(config)
        inputs.append("data")
    return StageSpec(f"{state.name}/align", settings, inputs, partial(_align, context, state), together=True)


def _align(context: RunContext, state: State, folder: Path) -> None:
    config, table, findings = context.config, context.config.variant(state.variant), context.findings
    neurons = findings.safety_neurons(findings.chain(state))
    start = context.models.of(previous(state), "float32" if table.quantise == "none" else "", table.quantise)
    # The training changes this model and lets it go, so nobody else may hold it.
    context.models.release()
    source = context.run.folder / "T0" / "pairs"
    pairs = [Pair.from_record(record, source) for record in read_lines(source / "pairs.jsonl")]
    frozen = findings.frozen(table, neurons)
    plan = plan_for(start, pairs, TrainingSettings.of(table, config.seed), frozen, table.fit_memory)
    context.watcher.noted(f"{state.name}/align needs about {plan.sentence()}")
    with writing(folder / "checkpoints"):
        result = align(
            start,
            pairs,
            frozen=frozen,
            training=plan.training,
            ablation=Ablation(neurons, table.ablate_share, table.ablate_reference) if table.ablate else None,
            refresh=refresh_of(config, table, *findings.classes()) if table.refresh else None,
            freeze_rest=table.freeze == "all-but-safety",
            checkpoints=folder / "checkpoints",
            progress=context.watcher.progress,
        )
    write_json(folder / "memory.json", {**plan.to_record(), "at_once_in_the_end": result.at_once})
    result.model.save(folder / "model")
    write_lines(folder / "train.jsonl", result.log)
    proof = {
        "freeze": table.freeze,
        "ablate": table.ablate,
        "refresh": table.refresh,
        "quantise": table.quantise,
        "frozen": result.frozen_count,
        "frozen_identical": result.frozen_identical,
        "frozen_sha256": result.frozen_sha256,
        "free_change": result.free_change,
        "steps": result.steps,
    }
    write_json(folder / "frozen.json", proof)
    context.warn(folder, result.warnings)
    context.run.remove(f"{state.name}/align/checkpoints")


# -- report -----------------------------------------------------------------------------------------------------------


def report_stage(context: RunContext) -> StageSpec:
    """Tables and figures over all states."""
    from safeneuron.runs.collect import write_report

    config, states = context.config, context.findings.states()
    inputs = [f"{state.name}/judge" for state in states]
    if config.capability.enabled:
        inputs += [f"{state.name}/capability" for state in states]
    inputs += [f"{state.name}/align" for state in states if state.round > 0]
    labels = {name: config.variant(name).label for name in ["", *config.variants]}
    settings = {"report": config.report.model_dump(), "labels": labels, "name": config.name}
    return StageSpec("report", settings, inputs, partial(write_report, config, context.run))
