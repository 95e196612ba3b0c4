"""The stages that attack a state: what its attackers find, its answers under attack, verdicts, what it can do besides.

``stages`` says in which order they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safeneuron.config.attack_plan import kinds_answered
from safeneuron.config.states import BASE, State, selectors_for
from safeneuron.evaluation.capability import benchmark
from safeneuron.evaluation.judging import agreement, judged
from safeneuron.evaluation.rates import verdict_rates
from safeneuron.models.vision_tower import pruned_anywhere
from safeneuron.runs.attackers import Rivals, answer_all, demonstrations, searched, settings_of
from safeneuron.runs.context import RunContext, weights_stage
from safeneuron.runs.inputs import file_hashes, judge_of, judges_of, question_hashes
from safeneuron.runs.runner import StageSpec
from safeneuron.runtime.files import read_lines, write_json, write_lines
from safeneuron.runtime.progress import progress_of_part


def attack_stages(context: RunContext, state: State) -> Iterator[StageSpec]:
    """The stages that attack a state whose neurons are known, those that the config asks for, in order."""
    if "iterated" in context.config.attack.knowledge:
        yield iterate_stage(context, state)
    if has_rivals(context, state):
        yield rivals_stage(context, state)
    yield attack_stage(context, state)
    yield judge_stage(context, state)
    if context.config.capability.enabled:
        yield capability_stage(context, state)


def has_rivals(context: RunContext, state: State) -> bool:
    """Whether there is anything to find on the state but the paper's neurons."""
    return bool(selectors_for(context.config.attack, state)) or "fine-tune" in context.config.attack.attempts


def iterate_stage(context: RunContext, state: State) -> StageSpec:
    """The neurons of the attacker who finds again on what is left after each pruning."""
    settings = settings_of(context.config) | {"searches": context.config.attack.searches}
    inputs = ["data", *weights_stage(state), f"{state.name}/select"]
    return StageSpec(f"{state.name}/iterate", settings, inputs, partial(_iterate, context, state), together=True)


def _iterate(context: RunContext, state: State, folder: Path) -> None:
    unsafe, safe = context.findings.classes()
    first, searches = context.findings.neurons(state), context.config.attack.searches
    sets = searched(context.config, context.models.of(state), unsafe, safe, searches, first)
    for number, neurons in enumerate(sets, start=1):
        neurons.save(folder / f"search-{number}.json")


def rivals_stage(context: RunContext, state: State) -> StageSpec:
    """What rival attackers find on the state, and what the fine-tuning attack learns."""
    config, table = context.config, context.config.attack
    tunes = "fine-tune" in table.attempts
    keys = ("selectors", "selector_prompts", "batch_size", "fine_tune_data")
    settings: dict[str, Any] = {"attack": {key: getattr(table, key) for key in keys}, "fine_tune": tunes}
    settings |= settings_of(config) | {"seed": config.seed}
    inputs = ["data", *weights_stage(state), f"{state.name}/select"]
    if tunes:
        settings["judge"] = config.judge.settings()
        # Without a file the path is empty, and that is the working directory, which holds the run itself.
        given = {table.fine_tune_data: Path(table.fine_tune_data)} if table.fine_tune_data else {}
        settings["files"] = file_hashes(given)
    return StageSpec(f"{state.name}/rivals", settings, inputs, partial(_find_rivals, context, state), together=True)


def _find_rivals(context: RunContext, state: State, folder: Path) -> None:
    config, watcher = context.config, context.watcher
    names, tunes = selectors_for(config.attack, state), "fine-tune" in config.attack.attempts
    model, neurons = context.models.of(state), context.findings.neurons(state)
    unsafe, safe = context.findings.classes()
    rivals = Rivals(config, model, neurons, unsafe, safe) if names else None
    for number, name in enumerate(names):
        if rivals is not None:
            # A contrast needs T0's model beside the state's.
            rivals.find(name, lambda: context.models.load(BASE)).save(folder / f"{name}.json")
        watcher.progress(number + 1, len(names) + tunes)
    if tunes:
        learnt = demonstrations(config, model, neurons, unsafe, lambda: judge_of(config.judge))
        write_lines(folder / "demonstrations.jsonl", (asdict(demonstration) for demonstration in learnt))
        if not learnt:
            watcher.warned(
                f"{state.name} is not attacked by fine-tuning: pruned, it gave no answer to learn; give "
                "attack.fine_tune_data"
            )


def attack_stage(context: RunContext, state: State) -> StageSpec:
    """Answers of the state under every attack, and the perplexity of a benign text."""
    config, table = context.config, context.config.attack
    settings = {"attack": table.model_dump(mode="json"), "seed": config.seed, "model": config.model.settings()}
    inputs = ["data", *weights_stage(state), f"{state.name}/select", "T0/select"]
    if "iterated" in table.knowledge:
        inputs.append(f"{state.name}/iterate")
    if has_rivals(context, state):
        inputs.append(f"{state.name}/rivals")
    if table.operators:
        inputs.append(f"{state.name}/measure")
    if table.transfer:
        settings["files"] = file_hashes({table.transfer: Path(table.transfer)})
    work = partial(_attack, context, state)
    return StageSpec(f"{state.name}/attack", settings, list(dict.fromkeys(inputs)), work, together=True)


def _attack(context: RunContext, state: State, folder: Path) -> None:
    model = context.models.of(state)
    answer_all(context.config, context.findings, state, model, folder, context.watcher.progress)


def judge_stage(context: RunContext, state: State) -> StageSpec:
    """Verdicts on the state's answers; apart from the attack, so that another judge needs no new answers."""
    settings = {"judge": context.config.judge.settings()}
    return StageSpec(f"{state.name}/judge", settings, [f"{state.name}/attack"], partial(_judge, context, state))


def _judge(context: RunContext, state: State, folder: Path) -> None:
    table, source = context.config.judge, context.run.folder / state.name / "attack"
    files = {
        source / attack.folder / f"{kind}.jsonl"
        for attack in context.findings.plan(state).answered
        for kind in kinds_answered(attack, context.config.attack)
    }
    # Where there are no harmless test prompts, there is no file of answers to them.
    paths = sorted(file for file in files if file.exists())
    answers = [sorted(read_lines(path), key=lambda answer: int(answer["index"])) for path in paths]
    streams = [[(answer["prompt"], answer["response"]) for answer in stream] for stream in answers]
    judgements = judged(judges_of(table), table.rule, streams, context.watcher.progress)
    for path, stream, judgement in zip(paths, answers, judgements, strict=True):
        attack, kind = folder / path.parent.name, path.stem
        records = zip(stream, judgement.records(), strict=True)
        write_lines(attack / f"{kind}.jsonl", [{"index": answer["index"], **record} for answer, record in records])
        counted = "complied" if kind == "harmful" else "refused"
        write_json(attack / f"{kind}.json", verdict_rates(judgement.verdicts, counted))
    if len(table.names) > 1:
        names = judgements[0].own
        verdicts = {name: [verdict for each in judgements for verdict in each.own[name]] for name in names}
        write_json(folder / "agreement.json", {"rule": table.rule, "pairs": agreement(verdicts)})


def capability_stage(context: RunContext, state: State) -> StageSpec:
    """Scores of the state on capability benchmarks, intact and with its own neurons pruned; task by task."""
    table = context.config.capability
    settings = {"capability": table.model_dump(mode="json"), "model": context.config.model.settings()}
    settings["files"] = question_hashes(table)
    inputs = [*weights_stage(state), *([f"{state.name}/select"] if table.pruned else [])]
    return StageSpec(f"{state.name}/capability", settings, inputs, partial(_benchmark, context, state))


def _benchmark(context: RunContext, state: State, folder: Path) -> None:
    table = context.config.capability
    prunings = {"ORI": None, **({"FULL": context.findings.neurons(state)} if table.pruned else {})}
    jobs = [(name, task) for name in prunings for task in table.tasks]
    for number, (name, task) in enumerate(jobs):
        path = folder / name / f"{task}.json"
        if path.exists():
            continue
        model = context.models.of(state)
        with pruned_anywhere(model, prunings[name]):
            score = benchmark(
                model,
                task,
                folder=table.folder,
                limit=table.limit,
                shots=table.shots,
                chat_template=table.chat_template,
                batch_size=table.batch_size,
                progress=progress_of_part(context.watcher.progress, number, len(jobs)),
            )
        write_json(path, score.to_record())
