"""The order of the stages over the states T0, T1, ...: the only file that knows Config, Run and the stages together.

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

With many processes, all of them go through the same stages. Rank 0 decides what is to be done, and only its files are
written (``runs``); the stages that compute with the model are done by all together, the others by rank 0 alone.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, previous, selectors_for, states_of
from safeneuron.config.tables import SourceTable
from safeneuron.config.toml import to_toml
from safeneuron.data.pairs import mix
from safeneuron.data.prompts import check_classes, check_splits
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError, did_you_mean
from safeneuron.evaluation.capability import benchmark, require_benchmarks
from safeneuron.evaluation.judging import agreement, judged
from safeneuron.evaluation.rates import verdict_rates
from safeneuron.models.model import Model
from safeneuron.models.vision_tower import measure_towers, pruned_anywhere
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.planning.plan import plan_for, plans_for
from safeneuron.runs.attackers import (
    Rivals,
    answer_all,
    demonstrations,
    refresh_of,
    require_given,
    searched,
    settings_of,
)
from safeneuron.runs.findings import Findings
from safeneuron.runs.inputs import (
    file_hashes,
    hashes_of,
    judge_of,
    judges_of,
    leaks,
    model_of,
    pairs_made,
    pairs_of,
    prompts_of,
    question_hashes,
)
from safeneuron.runs.run import Run
from safeneuron.runs.stages import PROMPTS
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import (
    hand_back_memory,
    peak_memory_mb,
    reporting_shortage,
    reset_peak_memory,
    reuse_memory,
)
from safeneuron.runtime.files import read_json, read_lines, write_json, write_lines, write_text, writing
from safeneuron.runtime.progress import Watcher, part_of
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import FEWEST, choose, resolve_thresholds, score
from safeneuron.training.ablation import Ablation
from safeneuron.training.alignment import align
from safeneuron.training.settings import TrainingSettings, require_trainable_settings


class Pipeline:
    """The stages of one run. ``verb`` limits the work to one kind of stage (``safeneuron measure RUN`` and so on)."""

    def __init__(self, config: Config, run: Run, watcher: Watcher, verb: str = "") -> None:
        self.config = config
        self.run = run
        self.watcher = watcher
        self.findings = Findings(config, run)
        self.kinds = {
            "attack": ("data", "iterate", "rivals", "attack", "judge", "capability"),
            "align": ("data", "pairs", "align"),
        }.get(verb, ("data", verb) if verb else ())
        self.keys: dict[str, str] = {}
        self.missing: list[str] = []
        self._loaded: tuple[tuple[str, str, str], Model] | None = None

    def execute(self) -> None:
        """Do whatever is not done yet, in order."""
        if self.config.capability.enabled:
            require_benchmarks(self.config.capability.tasks, self.config.capability.folder)
        require_given(self.config)
        self.data()
        reuse_memory()
        base, *trained = states_of(self.config)
        for state in trained:
            table = self.config.variant(state.variant)
            require_trainable_settings(TrainingSettings.of(table, self.config.seed), table.refresh > 0)
        self.foresee(trained)
        self.examine(base)
        if trained:
            self.pairs()
        for state in trained:
            # Rounds after one that stopped early are no longer among the run's states.
            if state in self.findings.states():
                self.align(state)
                self.examine(state)
        self.report()

    def foresee(self, states: Sequence[State]) -> None:
        """Say what the training of these states will need in memory, and end now if it can be no way that they fit."""
        waiting = [state for state in states if not (self.run.folder / state.name / "align" / "done.json").exists()]
        if waiting and (not self.kinds or "align" in self.kinds):
            for state, plan in plans_for(self.config, waiting).items():
                self.watcher.noted(f"{state}/align will need about {plan.sentence()}")

    def examine(self, state: State) -> None:
        """Find the state's neurons and attack it."""
        self.measure(state)
        self.select(state)
        self.iterate(state)
        self.rivals(state)
        self.attack(state)
        self.judge(state)
        self.capability(state)

    def require_work(self) -> None:
        """Raise ``InputError`` if a verb was asked for whose inputs are not there yet."""
        wanted = [name for name in self.keys if not self.kinds or name.split("/")[-1] in self.kinds[1:]]
        if wanted:
            return
        if not self.missing:
            raise InputError("there is nothing to train: align.rounds is 0 and the config has no variants; change it")
        kind = self.missing[0].split("/")[-1]
        verb = {"data": "measure", "judge": "attack", "pairs": "align"}.get(kind, kind)
        command = shlex.join(["safeneuron", verb, str(self.run.folder)])
        raise InputError(f"{self.missing[0]} has not been made yet; do it first with: {command}")

    # -- the stages, in the order of the list above -------------------------------------------------------------

    def data(self) -> None:
        """Read the prompts of all four roles and keep them in ``data/``."""
        table = self.config.data

        def work(folder: Path) -> None:
            prompts = {role: prompts_of(getattr(table, role)) for role in PROMPTS}
            warnings = check_classes(prompts["unsafe"], prompts["safe"])
            if not prompts["test_unsafe"]:
                raise InputError("there are no harmful prompts to attack with; check data.test_unsafe in the config")
            warnings += check_splits(**prompts)
            for role, found in prompts.items():
                write_lines(folder / f"{role}.jsonl", (prompt.to_record(folder) for prompt in found))
            self.warn(folder, warnings)

        files = {role: hashes_of(getattr(table, role)) for role in PROMPTS}
        self.stage("data", {"data": table.model_dump(mode="json"), "files": files}, [], work)

    def measure(self, state: State) -> None:
        """Activation statistics of the state (Eq. 1-4)."""
        table = self.config.measure

        def work(folder: Path) -> None:
            unsafe, safe = self.classes()
            if table.part == "vision":
                stats = measure_towers(self.model(state), unsafe, safe, table.pooling, self.watcher.progress)
            else:
                stats = measure(
                    self.model(state),
                    unsafe,
                    safe,
                    pooling=table.pooling,
                    batch_tokens=table.batch_tokens,
                    max_tokens=table.max_tokens,
                    progress=self.watcher.progress,
                )
            stats.save(folder / "stats.safetensors")

        settings = {"measure": table.settings(), "model": self.config.model.settings()}
        self.stage(f"{state.name}/measure", settings, ["data", *self.made_by(state)], work, together=True)

    def select(self, state: State) -> None:
        """Scores of all neurons and the safety neurons (Eq. 5-10)."""
        table = self.config.select

        def work(folder: Path) -> None:
            scores = score(ActivationStats.load(self.run.folder / state.name / "measure" / "stats.safetensors"))
            thresholds = resolve_thresholds(scores, table.effect_size, table.shift, table.density)
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
            found = {**thresholds._asdict(), "significant": scores.significant}
            if scores.unscored:
                found["unscored"] = scores.unscored
                silent = (
                    f"{scores.unscored:,} of {selection.union.total:,} neurons of {state.name} were not scored: fewer "
                    f"than {FEWEST} prompts of a class were routed to their experts"
                )
                self.warn(folder, [silent])
            write_json(folder / "thresholds.json", found)

        self.stage(f"{state.name}/select", {"select": table.model_dump()}, [f"{state.name}/measure"], work)

    def iterate(self, state: State) -> None:
        """The neurons of the attacker who finds again on what is left after each pruning."""
        table = self.config.attack
        if "iterated" not in table.knowledge:
            return

        def work(folder: Path) -> None:
            unsafe, safe = self.classes()
            first = self.findings.neurons(state)
            sets = searched(self.config, self.model(state), unsafe, safe, table.searches, first)
            for number, neurons in enumerate(sets, start=1):
                neurons.save(folder / f"search-{number}.json")

        settings = settings_of(self.config) | {"searches": table.searches}
        inputs = ["data", *self.made_by(state), f"{state.name}/select"]
        self.stage(f"{state.name}/iterate", settings, inputs, work, together=True)

    def rivals(self, state: State) -> None:
        """What rival attackers find on the state, and what the fine-tuning attack learns."""
        table = self.config.attack
        if not self.has_rivals(state):
            return
        names, tunes = selectors_for(self.config, state), "fine-tune" in table.attempts

        def work(folder: Path) -> None:
            model, own = self.model(state), self.findings.neurons(state)
            unsafe, safe = self.classes()
            rivals = Rivals(self.config, model, own, unsafe, safe) if names else None
            for number, name in enumerate(names):
                if rivals is not None:
                    rivals.find(name, self.another).save(folder / f"{name}.json")
                self.watcher.progress(number + 1, len(names) + tunes)
            if tunes:
                learnt = demonstrations(self.config, model, own, unsafe, lambda: judge_of(self.config.judge))
                write_lines(folder / "demonstrations.jsonl", (asdict(one) for one in learnt))
                if not learnt:
                    self.watcher.warned(
                        f"{state.name} is not attacked by fine-tuning: pruned, it gave no answer to learn; give "
                        "attack.fine_tune_data"
                    )

        keys = ("selectors", "selector_prompts", "batch_size", "fine_tune_data")
        settings: dict[str, Any] = {"attack": {key: getattr(table, key) for key in keys}, "fine_tune": tunes}
        settings |= settings_of(self.config) | {"seed": self.config.seed}
        inputs = ["data", *self.made_by(state), f"{state.name}/select"]
        if tunes:
            settings["judge"] = self.config.judge.settings()
            settings["files"] = file_hashes({table.fine_tune_data: Path(table.fine_tune_data)})
        self.stage(f"{state.name}/rivals", settings, inputs, work, together=True)

    def attack(self, state: State) -> None:
        """Answers of the state under every pruning, and the perplexity of a benign text."""
        table = self.config.attack
        settings = {
            "attack": table.model_dump(mode="json"),
            "seed": self.config.seed,
            "model": self.config.model.settings(),
        }

        def work(folder: Path) -> None:
            answer_all(self.config, self.findings, state, self.model(state), folder, self.watcher.progress)

        inputs = ["data", *self.made_by(state), f"{state.name}/select", "T0/select"]
        if "iterated" in table.knowledge:
            inputs.append(f"{state.name}/iterate")
        if self.has_rivals(state):
            inputs.append(f"{state.name}/rivals")
        if table.operators:
            inputs.append(f"{state.name}/measure")
        if table.transfer:
            settings["files"] = file_hashes({table.transfer: Path(table.transfer)})
        self.stage(f"{state.name}/attack", settings, list(dict.fromkeys(inputs)), work, together=True)

    def judge(self, state: State) -> None:
        """Verdicts on the state's answers; apart from the attack, so that another judge needs no new answers."""
        table = self.config.judge

        def work(folder: Path) -> None:
            files = sorted((self.run.folder / state.name / "attack").glob("*/*.jsonl"))
            answers = [sorted(read_lines(path), key=lambda answer: int(answer["index"])) for path in files]
            streams = [[(a["prompt"], a["response"]) for a in stream] for stream in answers]
            found = judged(judges_of(table), table.rule, streams, self.watcher.progress)
            for path, stream, said in zip(files, answers, found, strict=True):
                here, kind = folder / path.parent.name, path.stem
                lines = [{"index": a["index"], **record} for a, record in zip(stream, said.records(), strict=True)]
                write_lines(here / f"{kind}.jsonl", lines)
                write_json(
                    here / f"{kind}.json", verdict_rates(said.verdicts, "complied" if kind == "harmful" else "refused")
                )
            if len(table.names) > 1:
                own = {name: [v for said in found for v in said.own[name]] for name in found[0].own}
                write_json(folder / "agreement.json", {"rule": table.rule, "pairs": agreement(own)})

        self.stage(f"{state.name}/judge", {"judge": table.settings()}, [f"{state.name}/attack"], work)

    def capability(self, state: State) -> None:
        """Scores of the state on capability benchmarks, intact and with its own neurons pruned; task by task."""
        table = self.config.capability
        if not table.enabled:
            return

        def work(folder: Path) -> None:
            prunings = {"ORI": None, **({"FULL": self.findings.neurons(state)} if table.pruned else {})}
            jobs = [(name, task) for name in prunings for task in table.tasks]
            for number, (name, task) in enumerate(jobs):
                path = folder / name / f"{task}.json"
                if path.exists():
                    continue

                model = self.model(state)
                with pruned_anywhere(model, prunings[name]):
                    found = benchmark(
                        model,
                        task,
                        folder=table.folder,
                        limit=table.limit,
                        shots=table.shots,
                        chat_template=table.chat_template,
                        batch_size=table.batch_size,
                        progress=part_of(self.watcher.progress, number, len(jobs)),
                    )
                write_json(path, found.to_record())

        settings = {"capability": table.model_dump(mode="json"), "model": self.config.model.settings()}
        settings["files"] = question_hashes(table)
        inputs = [*self.made_by(state), *([f"{state.name}/select"] if table.pruned else [])]
        self.stage(f"{state.name}/capability", settings, inputs, work)

    def pairs(self) -> None:
        """The preference pairs of all trainings, made from T0 or read."""
        table = self.config.pairs
        settings: dict[str, Any] = {"pairs": table.model_dump(mode="json"), "seed": self.config.seed}
        sources: list[Any] = [
            source for part in (table.safety, table.general) if part != "on-policy" for source in part
        ]
        inputs = []
        if "on-policy" in (table.safety, table.general):
            settings |= {"judge": self.config.judge.settings(), "max_length": self.config.align.max_length}
            inputs = ["T0/select"]
            sources += [*table.unsafe, *table.safe]
        settings["files"] = hashes_of(sources)

        def work(folder: Path) -> None:
            warnings: list[str] = []
            safe = table.safe if table.general != "on-policy" else ()

            def read_or_made(sources: Any, unsafe: Sequence[SourceTable], safe: Sequence[SourceTable]) -> list[Pair]:
                if sources != "on-policy":
                    return [pair for source in sources for pair in pairs_of(source, warnings)]
                model, neurons = self.model(BASE), self.findings.neurons(BASE)
                return pairs_made(self.config, model, neurons, unsafe, safe, warnings, self.watcher.progress)

            safety = read_or_made(table.safety, table.unsafe, safe)
            general = read_or_made(table.general, (), table.safe)
            if general:
                pairs = mix(safety, general, table.safety_share, table.count, self.config.seed)
            else:
                pairs = safety[: table.count]
            write_lines(folder / "pairs.jsonl", (pair.to_record(folder) for pair in pairs))
            tests = {role: self.findings.prompts(role) for role in ("test_unsafe", "test_safe")}
            self.warn(folder, [*warnings, *leaks(pairs, tests)])

        self.stage("T0/pairs", settings, inputs, work, together="on-policy" in (table.safety, table.general))

    def align(self, state: State) -> None:
        """Train the state from the previous one, with every neuron found so far frozen (Eq. 11-13)."""
        table = self.config.variant(state.variant)
        before = previous(state)
        chain = self.findings.chain(state)

        def work(folder: Path) -> None:
            found = self.findings.found(chain)
            start = self.model(before, "float32" if table.quantise == "none" else "", table.quantise)
            self._loaded = None
            made = self.run.folder / "T0" / "pairs"
            pairs = [Pair.from_record(record, made) for record in read_lines(made / "pairs.jsonl")]
            frozen = self.findings.frozen(table, found)
            plan = plan_for(start, pairs, TrainingSettings.of(table, self.config.seed), frozen, table.fit_memory)
            self.watcher.noted(f"{state.name}/align needs about {plan.sentence()}")
            with writing(folder / "checkpoints"):
                result = align(
                    start,
                    pairs,
                    frozen=frozen,
                    training=plan.training,
                    ablation=Ablation(found, table.ablate_share, table.ablate_reference) if table.ablate else None,
                    refresh=refresh_of(self.config, table, *self.classes()) if table.refresh else None,
                    freeze_rest=table.freeze == "all-but-safety",
                    checkpoints=folder / "checkpoints",
                    progress=self.watcher.progress,
                )
            write_json(folder / "memory.json", {**plan.to_record(), "at_once_in_the_end": result.at_once})
            result.model.save(folder / "model")
            write_lines(folder / "train.jsonl", result.log)
            write_json(
                folder / "frozen.json",
                {
                    "freeze": table.freeze,
                    "ablate": table.ablate,
                    "refresh": table.refresh,
                    "quantise": table.quantise,
                    "frozen": result.frozen_count,
                    "frozen_identical": result.frozen_identical,
                    "frozen_sha256": result.frozen_sha256,
                    "free_change": result.free_change,
                    "steps": result.steps,
                },
            )
            self.warn(folder, result.warnings)
            self.run.remove(f"{state.name}/align/checkpoints")

        # How often it is done, and what it needs in memory, are not part of what a training is.
        apart = {"label", "rounds", "stop_early", "fit_memory"}
        if not table.freeze_routers:
            # So that what was trained before there was such a switch still counts.
            apart.add("freeze_routers")
        settings = {"align": table.model_dump(exclude=apart), "seed": self.config.seed}
        settings["model"] = self.config.model.settings()
        inputs = ["T0/pairs", *self.made_by(before), *(f"{one.name}/select" for one in chain)]
        if table.refresh:
            settings |= settings_of(self.config)
            inputs.append("data")
        self.stage(f"{state.name}/align", settings, inputs, work, together=True)

    def report(self) -> None:
        """Tables and figures over all states."""
        from safeneuron.runs.collect import write_report

        states = self.findings.states()
        judged = [f"{state.name}/judge" for state in states]
        if self.config.capability.enabled:
            judged += [f"{state.name}/capability" for state in states]
        trained = [f"{state.name}/align" for state in states if state.round > 0]
        labels = {name: self.config.variant(name).label for name in ["", *self.config.variants]}
        settings = {"report": self.config.report.model_dump(), "labels": labels, "name": self.config.name}
        self.stage("report", settings, [*judged, *trained], lambda folder: write_report(self.config, self.run, folder))

    # -- what the stages share ----------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[str],
        work: Callable[[Path], None],
        together: bool = False,
    ) -> None:
        """Do one stage unless it is done, not asked for, or cannot be done yet; all ranks ``together``, or rank 0."""
        absent = [needed for needed in inputs if needed not in self.keys]
        if absent:
            self.missing.append(absent[0])
            return
        stage = self.run.stage(name, settings, {needed: self.keys[needed] for needed in inputs})
        if distributed.from_main(lambda: stage.done):
            self.keys[name] = stage.key
            self.watcher.ended(name, 0.0, skipped=True)
            return
        if self.kinds and name.split("/")[-1] not in self.kinds:
            return
        self.watcher.began(name)
        distributed.from_main(stage.start)
        hand_back_memory()
        reset_peak_memory()
        begun = time.monotonic()
        with reporting_shortage(self.watcher.warned):
            if together:
                work(stage.folder)
            else:
                distributed.from_main(lambda: work(stage.folder))
        seconds = time.monotonic() - begun
        distributed.from_main(lambda: stage.finish(seconds, peak_memory_mb()))
        self.keys[name] = stage.key
        self.run.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} done in {seconds:.1f} s")
        self.watcher.ended(name, seconds, skipped=False)

    def made_by(self, state: State) -> list[str]:
        """The stage that made the state's weights, if any."""
        return [f"{state.name}/align"] if state.round > 0 else []

    def model(self, state: State, dtype: str = "", quantise: str = "none") -> Model:
        """The state's model in the given precision, or the config's; the last one loaded is kept."""
        table = self.config.model
        key = (state.name, dtype or table.dtype, quantise)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            trained = self.run.folder / state.name / "align" / "model" if state.round else None
            self._loaded = (key, model_of(table, dtype, quantise, trained))
        return self._loaded[1]

    def has_rivals(self, state: State) -> bool:
        """Whether there is anything to find on the state but the paper's neurons."""
        return bool(selectors_for(self.config, state)) or "fine-tune" in self.config.attack.attempts

    def classes(self) -> tuple[list[Prompt], list[Prompt]]:
        """The unsafe and the safe prompts on which neurons are found."""
        return self.findings.prompts("unsafe"), self.findings.prompts("safe")

    def another(self) -> Model:
        """T0's model beside the one that is loaded."""
        return model_of(self.config.model)

    def warn(self, folder: Path, warnings: Sequence[str]) -> None:
        """Tell the user, and keep the warnings for the report."""
        write_json(folder / "warnings.json", {"warnings": list(warnings)})
        for warning in warnings:
            self.watcher.warned(warning)


class _Check(Pipeline):
    """A walk over the stages of a run that only asks each whether its work goes with the settings."""

    def __init__(self, config: Config, run: Run, watcher: Watcher, remade: Collection[str]) -> None:
        super().__init__(config, run, watcher)
        self.remade = remade

    def foresee(self, states: Sequence[State]) -> None:
        """Nothing is trained here."""

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[str],
        work: Callable[[Path], None],
        together: bool = False,
    ) -> None:
        stage = self.run.stage(name, settings, {needed: self.keys[needed] for needed in inputs})
        if name not in self.remade:
            stage.require_same_settings()
        self.keys[name] = stage.key


def prepare(config: Config, run: Run, watcher: Watcher, redo: Sequence[str] = ()) -> list[str]:
    """Make a run ready to be executed with this config, and return the names of the stages deleted for that.

    ``redo`` names stages (T1/attack) or kinds (attack) to delete, with everything made from them. Changes nothing and
    raises ``InputError`` for a name that no stage has, or if the work of another stage was made with other settings.
    """
    doomed = _made_from(run, redo)
    _Check(config, run, watcher, doomed).execute()
    for name in doomed:
        run.remove(name)
    write_text(run.folder / "config.toml", to_toml(config))
    return doomed


def _made_from(run: Run, names: Sequence[str]) -> list[str]:
    """The named stages and all that were made from them; each stands before those that it was made from."""
    present = {str(path.parent.relative_to(run.folder)) for marker in ("done.json", "started.json")
               for path in run.folder.rglob(marker)}  # fmt: skip
    doomed: set[str] = set()
    for wanted in names:
        meant = {name for name in present if wanted in (name, name.split("/")[-1])}
        if not meant:
            known = ", ".join(sorted(present)) or "none yet"
            raise InputError(
                f"--redo {wanted}: the run has no such stage{did_you_mean(wanted, present)}; it has {known}"
            )
        doomed |= meant
    inputs = {name: _inputs_of(run, name) for name in present}
    while more := {name for name in present - doomed if inputs[name] & doomed}:
        doomed |= more
    ordered: list[str] = []
    while doomed:
        last = min(name for name in doomed if not any(name in inputs[other] for other in doomed))
        ordered.append(last)
        doomed.remove(last)
    return ordered


def _inputs_of(run: Run, name: str) -> set[str]:
    for marker in ("done.json", "started.json"):
        if (run.folder / name / marker).exists():
            return set(read_json(run.folder / name / marker)["inputs"])
    return set()
