"""The order of the stages over the states T0, T1, ...: the only file that knows Config, Run and the stages together.

1. data      read the prompts, keep the exact records used
2. measure   activation statistics of the state on unsafe and safe prompts
3. select    scores of all neurons, and the safety neurons
4. attack    answers with neurons pruned: T0's (static), the state's own (adaptive), random ones
5. judge     verdicts on the answers
6. pairs     preference pairs, once, from T0
7. align     train the next state with all neurons found so far frozen; back to 2
8. report    tables and figures over all states
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safeneuron.ablating import Ablation
from safeneuron.aligning import align
from safeneuron.attacking import outcome, perplexity, respond
from safeneuron.config import Config, SourceTable
from safeneuron.data import Pair, Prompt, benign_text, check_classes, check_splits, read_prompts
from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.foreseeing import plan_for, require_trainable, training_of
from safeneuron.halving import shortage_told
from safeneuron.judges import Judge, make_judge
from safeneuron.measuring import measure
from safeneuron.memory import hand_back_memory, peak_memory_mb, reset_peak_memory, reuse_memory
from safeneuron.models import Model, load
from safeneuron.pairing import on_policy_pairs
from safeneuron.pairs import mix, read_pairs
from safeneuron.rows import Source
from safeneuron.runs import (
    Run,
    append_lines,
    read_lines,
    sha256_of,
    write_json,
    write_lines,
    writing,
)
from safeneuron.selecting import choose, resolve_thresholds, score
from safeneuron.states import BASE, Findings, State, previous, states_of
from safeneuron.statistics import ActivationStats

PROMPTS = ("unsafe", "safe", "test_unsafe", "test_safe")


class Watcher(Protocol):
    """Who is told how a run goes on; the command line draws progress bars, tests listen."""

    def began(self, stage: str) -> None:
        """A stage starts now."""

    def progress(self, done: int, total: int) -> None:
        """The running stage has done so much of its work."""

    def ended(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage has finished, or had finished before."""

    def noted(self, text: str) -> None:
        """Something is worth a line."""

    def warned(self, text: str) -> None:
        """Something deserves attention but does not stop the run."""


class Pipeline:
    """The stages of one run. ``verb`` limits the work to one kind of stage (``safeneuron measure RUN`` and so on)."""

    def __init__(self, config: Config, run: Run, watcher: Watcher, verb: str = "") -> None:
        self.config = config
        self.run = run
        self.watcher = watcher
        self.findings = Findings(config, run)
        self.kinds = {"attack": ("data", "attack", "judge"), "align": ("data", "pairs", "align")}.get(
            verb, ("data", verb) if verb else ()
        )
        self.keys: dict[str, str] = {}
        self.missing: list[str] = []
        self._loaded: tuple[tuple[str, str], Model] | None = None

    def execute(self) -> None:
        """Do whatever is not done yet, in order."""
        self.data()
        reuse_memory()
        base, *trained = states_of(self.config)
        self.foresee(trained)
        self.examine(base)
        if trained:
            self.pairs()
        for state in trained:
            self.align(state)
            self.examine(state)
        self.report()

    def foresee(self, states: Sequence[State]) -> None:
        """Say what the training of these states will need in memory, and end now if it can be no way that they fit."""
        waiting = [state for state in states if not (self.run.folder / state.name / "align" / "done.json").exists()]
        if waiting and (not self.kinds or "align" in self.kinds):
            for state, plan in require_trainable(self.config, waiting).items():
                self.watcher.noted(f"{state}/align will need about {plan.sentence()}")

    def examine(self, state: State) -> None:
        """Find the state's neurons and attack it."""
        self.measure(state)
        self.select(state)
        self.attack(state)
        self.judge(state)

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
            prompts = {role: _read_all(getattr(table, role)) for role in PROMPTS}
            warnings = check_classes(prompts["unsafe"], prompts["safe"])
            if not prompts["test_unsafe"]:
                raise InputError("there are no harmful prompts to attack with; check data.test_unsafe in the config")
            warnings += check_splits(**prompts)
            for role, found in prompts.items():
                write_lines(folder / f"{role}.jsonl", (prompt.to_record() for prompt in found))
            self.warn(folder, warnings)

        files = {role: _file_hashes(getattr(table, role)) for role in PROMPTS}
        self.stage("data", {"data": table.model_dump(mode="json"), "files": files}, [], work)

    def measure(self, state: State) -> None:
        """Activation statistics of the state (Eq. 1-4)."""
        table = self.config.measure

        def work(folder: Path) -> None:
            stats = measure(
                self.model(state),
                self.findings.prompts("unsafe"),
                self.findings.prompts("safe"),
                pooling=table.pooling,
                batch_tokens=table.batch_tokens,
                max_tokens=table.max_tokens,
                progress=self.watcher.progress,
            )
            stats.save(folder / "stats.safetensors")

        settings = {"measure": table.model_dump(), "model": self.config.model.model_dump()}
        self.stage(f"{state.name}/measure", settings, ["data", *self.made_by(state)], work)

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
            write_json(folder / "thresholds.json", {**thresholds._asdict(), "significant": scores.significant})

        self.stage(f"{state.name}/select", {"select": table.model_dump()}, [f"{state.name}/measure"], work)

    def attack(self, state: State) -> None:
        """Answers of the state under every pruning, and the perplexity of a benign text."""
        table = self.config.attack
        settings = {
            "attack": table.model_dump(mode="json"),
            "seed": self.config.seed,
            "model": self.config.model.model_dump(),
        }

        def work(folder: Path) -> None:
            model = self.model(state)
            prunings = self.findings.prunings(state)
            kinds = {"harmful": self.findings.prompts("test_unsafe")}
            if table.over_refusal:
                kinds["benign"] = self.findings.prompts("test_safe")
            curve = [pruning for pruning in prunings if pruning.knowledge == "curve"]
            total = sum(map(len, kinds.values())) * (len(prunings) - len(curve)) + len(kinds["harmful"]) * len(curve)
            done = 0
            for pruning in prunings:
                here = folder / pruning.folder
                asked = {"harmful": kinds["harmful"]} if pruning in curve else kinds
                with pruned(model, pruning.neurons):
                    for kind, prompts in asked.items():
                        done = self.answer(model, here / f"{kind}.jsonl", prompts, done, total)
                    if not (here / "pruned.json").exists():
                        record = {"neurons": len(pruning.neurons) if pruning.neurons is not None else 0}
                        write_json(here / "pruned.json", {**record, "perplexity": perplexity(model, benign_text())})

        inputs = ["data", *self.made_by(state), f"{state.name}/select", "T0/select"]
        self.stage(f"{state.name}/attack", settings, list(dict.fromkeys(inputs)), work)

    def judge(self, state: State) -> None:
        """Verdicts on the state's answers; apart from the attack, so that another judge needs no new answers."""

        def work(folder: Path) -> None:
            judge: Judge = make_judge(self.config.judge.name)
            streams = sorted((self.run.folder / state.name / "attack").glob("*/*.jsonl"))
            for number, path in enumerate(streams):
                answers = sorted(read_lines(path), key=lambda answer: int(answer["index"]))
                verdicts = judge([a["prompt"] for a in answers], [a["response"] for a in answers])
                lines = [{"index": a["index"], "verdict": v} for a, v in zip(answers, verdicts, strict=True)]
                kind = path.stem
                write_lines(folder / path.parent.name / f"{kind}.jsonl", lines)
                counted = "complied" if kind == "harmful" else "refused"
                write_json(folder / path.parent.name / f"{kind}.json", outcome(verdicts, counted))
                self.watcher.progress(number + 1, len(streams))

        self.stage(f"{state.name}/judge", {"judge": self.config.judge.model_dump()}, [f"{state.name}/attack"], work)

    def pairs(self) -> None:
        """The preference pairs of all trainings, made from T0 or read."""
        table = self.config.pairs
        settings = {"pairs": table.model_dump(mode="json"), "seed": self.config.seed}
        if table.safety == "on-policy":
            settings["judge"] = self.config.judge.model_dump()
            inputs = ["T0/select"]
            settings["files"] = _file_hashes([*table.unsafe, *table.safe, *table.general])
        else:
            inputs = []
            settings["files"] = _file_hashes([*table.safety, *table.general])

        def work(folder: Path) -> None:
            safety = self.safety_pairs()
            general = [pair for source in table.general for pair in read_pairs(_source(source))]
            if general:
                pairs = mix(safety, general, table.safety_share, table.count, self.config.seed)
            else:
                pairs = safety[: table.count]
            write_lines(folder / "pairs.jsonl", (pair.to_record() for pair in pairs))
            self.warn(folder, self.leaks(pairs))

        self.stage("T0/pairs", settings, inputs, work)

    def align(self, state: State) -> None:
        """Train the state from the previous one, with every neuron found so far frozen (Eq. 11-13)."""
        table = self.config.variant(state.variant)
        before = previous(state)
        chain = self.findings.chain(state)

        def work(folder: Path) -> None:
            found = self.findings.found(chain)
            start = self.model(before, dtype="float32")
            self._loaded = None
            records = read_lines(self.run.folder / "T0" / "pairs" / "pairs.jsonl")
            pairs = [Pair.from_record(record) for record in records]
            frozen = self.findings.frozen(table, found)
            plan = plan_for(start, pairs, training_of(self.config, table), frozen, table.fit_memory)
            self.watcher.noted(f"{state.name}/align needs about {plan.sentence()}")
            with writing(folder / "checkpoints"):
                result = align(
                    start,
                    pairs,
                    frozen=frozen,
                    training=plan.training,
                    ablation=Ablation(found, table.ablate_share) if table.ablate else None,
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
                    "frozen": result.frozen_count,
                    "frozen_identical": result.frozen_identical,
                    "frozen_sha256": result.frozen_sha256,
                    "free_change": result.free_change,
                    "steps": result.steps,
                },
            )
            self.run.remove(f"{state.name}/align/checkpoints")

        # What a training needs in memory is not part of what it is.
        settings = {"align": table.model_dump(exclude={"label", "rounds", "fit_memory"}), "seed": self.config.seed}
        settings["model"] = self.config.model.model_dump()
        inputs = ["T0/pairs", *self.made_by(before), *(f"{one.name}/select" for one in chain)]
        self.stage(f"{state.name}/align", settings, inputs, work)

    def report(self) -> None:
        """Tables and figures over all states."""
        from safeneuron.collecting import write_report

        judged = [f"{state.name}/judge" for state in states_of(self.config)]
        trained = [f"{state.name}/align" for state in states_of(self.config) if state.round > 0]
        labels = {name: self.config.variant(name).label for name in ["", *self.config.variants]}
        settings = {"report": self.config.report.model_dump(), "labels": labels, "name": self.config.name}
        self.stage("report", settings, [*judged, *trained], lambda folder: write_report(self.config, self.run, folder))

    # -- what the stages share ----------------------------------------------------------------------------------

    def stage(
        self, name: str, settings: Mapping[str, Any], inputs: Sequence[str], work: Callable[[Path], None]
    ) -> None:
        """Do one stage unless it is done, or not asked for, or cannot be done yet."""
        absent = [needed for needed in inputs if needed not in self.keys]
        if absent:
            self.missing.append(absent[0])
            return
        stage = self.run.stage(name, settings, {needed: self.keys[needed] for needed in inputs})
        if stage.done:
            self.keys[name] = stage.key
            self.watcher.ended(name, 0.0, skipped=True)
            return
        if self.kinds and name.split("/")[-1] not in self.kinds:
            return
        self.watcher.began(name)
        stage.start()
        hand_back_memory()
        reset_peak_memory()
        begun = time.monotonic()
        with shortage_told(self.watcher.warned):
            work(stage.folder)
        seconds = time.monotonic() - begun
        stage.finish(seconds, peak_memory_mb())
        self.keys[name] = stage.key
        self.run.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} done in {seconds:.1f} s")
        self.watcher.ended(name, seconds, skipped=False)

    def made_by(self, state: State) -> list[str]:
        """The stage that made the state's weights, if any."""
        return [f"{state.name}/align"] if state.round > 0 else []

    def model(self, state: State, dtype: str = "") -> Model:
        """The state's model in the given precision, or the config's; the last one loaded is kept."""
        table = self.config.model
        source = table.name if state.round == 0 else str(self.run.folder / state.name / "align" / "model")
        key = (source, dtype or table.dtype)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            revision = table.revision if state.round == 0 else ""
            self._loaded = (key, load(source, key[1], table.device, revision, table.trust_remote_code))
        return self._loaded[1]

    def answer(self, model: Model, path: Path, prompts: Sequence[Prompt], done: int, total: int) -> int:
        """Append the answers that are missing in a stream, whole batches at a time; the new count of all answers."""
        size = self.config.attack.batch_size
        have = read_lines(path)
        if len(have) < len(prompts):
            have = have[: len(have) // size * size]
            write_lines(path, have)
            for batch in respond(model, prompts, self.config.attack.max_new_tokens, size, skip=len(have)):
                append_lines(path, (response.to_record() for response in batch))
                done += len(batch)
                self.watcher.progress(done + len(have), total)
        return done + len(have)

    def warn(self, folder: Path, warnings: Sequence[str]) -> None:
        """Tell the user, and keep the warnings for the report."""
        write_json(folder / "warnings.json", {"warnings": list(warnings)})
        for warning in warnings:
            self.watcher.warned(warning)

    def leaks(self, pairs: Sequence[Pair]) -> list[str]:
        """A warning if prompts of the attack are trained on; several pairs may share a prompt."""
        asked = {pair.prompt[-1]["content"]: Prompt(pair.prompt[-1]["content"]) for pair in pairs}
        tests = {role: self.findings.prompts(role) for role in ("test_unsafe", "test_safe")}
        told = check_splits(**tests)
        return [warning for warning in check_splits(pairs=list(asked.values()), **tests) if warning not in told]

    def safety_pairs(self) -> list[Pair]:
        """Pairs from the model's own answers, or from the sources in the config."""
        table = self.config.pairs
        if table.safety != "on-policy":
            return [pair for source in table.safety for pair in read_pairs(_source(source))]
        unsafe, safe = _read_all(table.unsafe), _read_all(table.safe)
        return on_policy_pairs(
            self.model(BASE),
            unsafe,
            safe,
            self.findings.neurons(BASE),
            make_judge(self.config.judge.name),
            max_new_tokens=table.max_new_tokens,
            batch_size=self.config.attack.batch_size,
            seed=self.config.seed,
            progress=self.watcher.progress,
        )


def _source(table: Any) -> Source:
    return Source(**table.model_dump())


def _read_all(tables: Sequence[SourceTable]) -> list[Prompt]:
    return [prompt for table in tables for prompt in read_prompts(_source(table))]


def _file_hashes(tables: Sequence[Any]) -> dict[str, str]:
    """The contents of the local files among the sources, so that an edited file is noticed."""
    paths = {table.path: Path(table.path).expanduser() for table in tables}
    return {name: sha256_of(path) for name, path in paths.items() if path.is_file()}
