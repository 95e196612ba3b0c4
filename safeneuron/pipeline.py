"""The order of the stages over the states T0, T1, ...: the only file that knows Config, Run and the stages together.

1. data      read the prompts, keep the exact records used
2. measure   activation statistics of the state on unsafe and safe prompts
3. select    scores of all neurons, and the safety neurons
4. iterate   find, prune, find again: the neurons of the iterated attacker, if there is one
5. attack    answers with neurons pruned: T0's (static), the state's own (adaptive, iterated), random ones
6. judge     verdicts on the answers
7. pairs     preference pairs, once, from T0
8. align     train the next state with all neurons found so far frozen; back to 2
9. report    tables and figures over all states

With many processes, all of them go through the same stages. Rank 0 decides what is to be done, and only its files are
written (``runs``); the stages that compute with the model are done by all together, the others by rank 0 alone.
"""

from __future__ import annotations

import random
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safeneuron import ranks
from safeneuron.ablating import Ablation, Refresh
from safeneuron.aligning import align
from safeneuron.attacking import outcome, perplexity, respond
from safeneuron.config import AlignTable, Config, JudgeTable, SourceTable
from safeneuron.data import Pair, Prompt, benign_text, check_classes, check_splits, read_prompts
from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.foreseeing import plan_for, plans_for, training_of
from safeneuron.halving import shortage_told
from safeneuron.judges import Judge, make_judge
from safeneuron.judging import judged
from safeneuron.measuring import measure, search
from safeneuron.memory import hand_back_memory, peak_memory_mb, reset_peak_memory, reuse_memory
from safeneuron.models import Model, load
from safeneuron.neurons import NeuronSet
from safeneuron.pairing import on_policy_pairs
from safeneuron.pairs import left_out, mix, read_pairs
from safeneuron.panel import Panel, agreement
from safeneuron.rows import Source
from safeneuron.rubric import Endpoint
from safeneuron.runs import (
    Run,
    append_lines,
    read_lines,
    sha256_of,
    write_json,
    write_lines,
    writing,
)
from safeneuron.selecting import choose, resolve_thresholds, score, select
from safeneuron.states import BASE, Findings, State, previous, states_of
from safeneuron.statistics import ActivationStats
from safeneuron.training import require_trainable

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
        self.kinds = {"attack": ("data", "iterate", "attack", "judge"), "align": ("data", "pairs", "align")}.get(
            verb, ("data", verb) if verb else ()
        )
        self.keys: dict[str, str] = {}
        self.missing: list[str] = []
        self._loaded: tuple[tuple[str, str, str], Model] | None = None

    def execute(self) -> None:
        """Do whatever is not done yet, in order."""
        self.data()
        reuse_memory()
        base, *trained = states_of(self.config)
        for state in trained:
            table = self.config.variant(state.variant)
            require_trainable(training_of(self.config, table), table.refresh > 0)
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
            write_json(folder / "thresholds.json", {**thresholds._asdict(), "significant": scores.significant})

        self.stage(f"{state.name}/select", {"select": table.model_dump()}, [f"{state.name}/measure"], work)

    def iterate(self, state: State) -> None:
        """The neurons of the attacker who finds again on what is left after each pruning."""
        table = self.config.attack
        if "iterated" not in table.knowledge:
            return

        def work(folder: Path) -> None:
            unsafe, safe = (self.findings.prompts(role) for role in ("unsafe", "safe"))
            first = self.findings.neurons(state)
            sets = self.searched(self.model(state), unsafe, safe, table.searches, first)
            for number, neurons in enumerate(sets, start=1):
                neurons.save(folder / f"search-{number}.json")

        settings = {name: value.model_dump() for name, value in self.finding().items()} | {"searches": table.searches}
        inputs = ["data", *self.made_by(state), f"{state.name}/select"]
        self.stage(f"{state.name}/iterate", settings, inputs, work, together=True)

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
            if table.over_refusal != "never":
                kinds["benign"] = self.findings.prompts("test_safe")
            harmful_only = [
                pruning
                for pruning in prunings
                if pruning.knowledge == "curve" or (pruning.neurons is not None and table.over_refusal == "unpruned")
            ]
            total = len(kinds["harmful"]) * len(prunings)
            total += len(kinds.get("benign", ())) * (len(prunings) - len(harmful_only))
            done = 0
            for pruning in prunings:
                here = folder / pruning.folder
                asked = {"harmful": kinds["harmful"]} if pruning in harmful_only else kinds
                with pruned(model, pruning.neurons):
                    for kind, prompts in asked.items():
                        done = self.answer(model, here / f"{kind}.jsonl", prompts, done, total)
                    if not ranks.from_main((here / "pruned.json").exists):
                        record = {"neurons": len(pruning.neurons) if pruning.neurons is not None else 0}
                        write_json(here / "pruned.json", {**record, "perplexity": perplexity(model, benign_text())})

        inputs = ["data", *self.made_by(state), f"{state.name}/select", "T0/select"]
        if "iterated" in table.knowledge:
            inputs.append(f"{state.name}/iterate")
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
                    here / f"{kind}.json", outcome(said.verdicts, "complied" if kind == "harmful" else "refused")
                )
            if len(table.names) > 1:
                own = {name: [v for said in found for v in said.own[name]] for name in found[0].own}
                write_json(folder / "agreement.json", {"rule": table.rule, "pairs": agreement(own)})

        self.stage(f"{state.name}/judge", {"judge": table.settings()}, [f"{state.name}/attack"], work)

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
        settings["files"] = _file_hashes(sources)

        def work(folder: Path) -> None:
            warnings: list[str] = []
            safe = table.safe if table.general != "on-policy" else ()
            safety = self.read_or_made(table.safety, table.unsafe, safe, warnings)
            general = self.read_or_made(table.general, (), table.safe, warnings)
            if general:
                pairs = mix(safety, general, table.safety_share, table.count, self.config.seed)
            else:
                pairs = safety[: table.count]
            write_lines(folder / "pairs.jsonl", (pair.to_record() for pair in pairs))
            self.warn(folder, [*warnings, *self.leaks(pairs)])

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
                    ablation=Ablation(found, table.ablate_share, table.ablate_reference) if table.ablate else None,
                    refresh=self.refresh(table) if table.refresh else None,
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
        settings = {"align": table.model_dump(exclude=apart), "seed": self.config.seed}
        settings["model"] = self.config.model.model_dump()
        inputs = ["T0/pairs", *self.made_by(before), *(f"{one.name}/select" for one in chain)]
        if table.refresh:
            settings |= {name: value.model_dump() for name, value in self.finding().items()}
            inputs.append("data")
        self.stage(f"{state.name}/align", settings, inputs, work, together=True)

    def report(self) -> None:
        """Tables and figures over all states."""
        from safeneuron.collecting import write_report

        states = self.findings.states()
        judged = [f"{state.name}/judge" for state in states]
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
        if ranks.from_main(lambda: stage.done):
            self.keys[name] = stage.key
            self.watcher.ended(name, 0.0, skipped=True)
            return
        if self.kinds and name.split("/")[-1] not in self.kinds:
            return
        self.watcher.began(name)
        ranks.from_main(stage.start)
        hand_back_memory()
        reset_peak_memory()
        begun = time.monotonic()
        with shortage_told(self.watcher.warned):
            if together:
                work(stage.folder)
            else:
                ranks.from_main(lambda: work(stage.folder))
        seconds = time.monotonic() - begun
        ranks.from_main(lambda: stage.finish(seconds, peak_memory_mb()))
        self.keys[name] = stage.key
        self.run.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} done in {seconds:.1f} s")
        self.watcher.ended(name, seconds, skipped=False)

    def made_by(self, state: State) -> list[str]:
        """The stage that made the state's weights, if any."""
        return [f"{state.name}/align"] if state.round > 0 else []

    def model(self, state: State, dtype: str = "", quantise: str = "none") -> Model:
        """The state's model in the given precision, or the config's; the last one loaded is kept."""
        table = self.config.model
        source = table.name if state.round == 0 else str(self.run.folder / state.name / "align" / "model")
        key = (source, dtype or table.dtype, quantise)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            revision = table.revision if state.round == 0 else ""
            self._loaded = (key, load(source, key[1], table.device, revision, table.trust_remote_code, quantise))
        return self._loaded[1]

    def answer(self, model: Model, path: Path, prompts: Sequence[Prompt], done: int, total: int) -> int:
        """Append the answers that are missing in a stream, whole batches at a time; the new count of all answers."""
        size = self.config.attack.batch_size

        def kept() -> int:
            have = read_lines(path)
            if len(have) < len(prompts):
                have = have[: len(have) // size * size]
                write_lines(path, have)
            return len(have)

        have = ranks.from_main(kept)
        if have < len(prompts):
            for batch in respond(model, prompts, self.config.attack.max_new_tokens, size, skip=have):
                append_lines(path, (response.to_record() for response in batch))
                done += len(batch)
                self.watcher.progress(done + have, total)
        return done + have

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

    def finding(self) -> dict[str, Any]:
        """The tables that decide which neurons are found on a model."""
        return {"measure": self.config.measure, "select": self.config.select, "model": self.config.model}

    def searched(
        self,
        model: Model,
        unsafe: Sequence[Prompt],
        safe: Sequence[Prompt],
        searches: int,
        first: NeuronSet | None = None,
    ) -> list[NeuronSet]:
        """What an attacker with this config finds on the model in so many searches, each set holding the one before."""
        table, choice = self.config.measure, self.config.select
        return search(
            model,
            unsafe,
            safe,
            lambda stats: select(stats, choice.effect_size, choice.shift, choice.density),
            searches,
            first=first,
            pooling=table.pooling,
            batch_tokens=table.batch_tokens,
            max_tokens=table.max_tokens,
        )

    def refresh(self, table: AlignTable) -> Refresh:
        """The attacker whose finds are ablated while a model is trained; she sees a sample of the prompts."""
        draw = random.Random(self.config.seed)
        samples = [self.findings.prompts(role) for role in ("unsafe", "safe")]
        unsafe, safe = (draw.sample(prompts, min(table.refresh_prompts, len(prompts))) for prompts in samples)

        def find(running: Model) -> list[NeuronSet]:
            return self.searched(running, unsafe, safe, table.refresh_searches)

        return Refresh(find, table.refresh, table.refresh_share, table.kl_weight)

    def read_or_made(
        self, sources: Any, unsafe: Sequence[SourceTable], safe: Sequence[SourceTable], warnings: list[str]
    ) -> list[Pair]:
        """Pairs from the sources, or on-policy ones of these prompts; rows that gave no pair add a warning."""
        table = self.config.pairs
        if sources != "on-policy":
            return [pair for source in sources for pair in _read_pairs(source, warnings)]
        model, longest = self.model(BASE), self.config.align.max_length

        def fitting(kind: str, tables: Sequence[SourceTable]) -> list[Prompt]:
            """Without the prompts that leave no room for an answer, which could not be trained on."""
            prompts = _read_all(tables)
            kept = [prompt for prompt in prompts if len(model.encode(_asked(prompt))) < longest]
            if len(kept) < len(prompts):
                warnings.append(
                    f"{len(prompts) - len(kept)} of {len(prompts)} {kind} prompts of on-policy pairs were left out: "
                    f"they alone fill align.max_length = {longest} tokens"
                )
            return kept

        return on_policy_pairs(
            model,
            fitting("harmful", unsafe),
            fitting("harmless", safe),
            self.findings.neurons(BASE),
            _judge(self.config.judge),
            max_new_tokens=table.max_new_tokens,
            batch_size=self.config.attack.batch_size,
            seed=self.config.seed,
            progress=self.watcher.progress,
        )


def judges_of(table: JudgeTable) -> list[Callable[[], Judge]]:
    """The makers of the judges of a config."""
    endpoint = Endpoint(table.url, table.model, table.timeout, table.retries, table.concurrency, table.key_variable)
    return [partial(make_judge, name, endpoint) for name in table.names]


def _judge(table: JudgeTable) -> Judge:
    """The judge of a config, or its judges as one."""
    judges = [make() for make in judges_of(table)]
    return judges[0] if len(judges) == 1 else Panel(judges, table.rule)


def _asked(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]


def _source(table: Any) -> Source:
    return Source(**table.model_dump())


def _read_all(tables: Sequence[SourceTable]) -> list[Prompt]:
    return [prompt for table in tables for prompt in read_prompts(_source(table))]


def _read_pairs(table: Any, warnings: list[str]) -> list[Pair]:
    dropped: Counter[str] = Counter()
    pairs = read_pairs(_source(table), dropped=dropped)
    if dropped:
        warnings.append(f"{table.path}: {left_out(dropped)}; {len(pairs)} pairs are used")
    return pairs


def _file_hashes(tables: Sequence[Any]) -> dict[str, str]:
    """The contents of the local files among the sources, so that an edited file is noticed."""
    paths = {table.path: Path(table.path).expanduser() for table in tables}
    return {name: sha256_of(path) for name, path in paths.items() if path.is_file()}
