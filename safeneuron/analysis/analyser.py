"""An analysis of a run: its parts in order, each a stage of the run that is skipped once done and goes on if stopped.

topics      which topics share which neurons           needs the model
depth       where in the depth the neurons lie
stability   what the set owes to the prompts           needs the model
states      what training changed                      needs the model of every state
redundancy  on how many separate sets refusal hangs    needs the model of every state
methods     how selectors agree; false discoveries
neurons     portraits of the strongest neurons         needs the model
scale       data scale and rounds, of finished runs

Each leaves ``analysis/PART/numbers.json``, CSV tables, and SVG and PNG figures.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from safeneuron.analysis import figures
from safeneuron.analysis.depth import DepthRecord, depth_record
from safeneuron.analysis.drift import StateRecord, StatesRecord, movements, observe, parameter_reader, state_record
from safeneuron.analysis.methods import MethodsRecord, agreements, discoveries, volcano
from safeneuron.analysis.portraits import PortraitsRecord, portraits_record
from safeneuron.analysis.records import PartRecord, TableRow, finite
from safeneuron.analysis.redundancy import RedundancyRecord, redundancy_record
from safeneuron.analysis.scaling import ScaleRecord, data_scale, iterations, required_results
from safeneuron.analysis.settings import Effort
from safeneuron.analysis.stability import StabilityRecord, stability_record
from safeneuron.analysis.topics import TopicsRecord, topic_stats, topics_record
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State
from safeneuron.data.prompts import read_twins
from safeneuron.errors import InputError
from safeneuron.models.embedded import NAME, embedded_folder
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.reporting.tables import as_csv
from safeneuron.runs.attackers import sample
from safeneuron.runs.context import StateModels
from safeneuron.runs.findings import Findings
from safeneuron.runs.inputs import judge_of
from safeneuron.runs.run import Run
from safeneuron.runs.runner import Runner, StageSpec
from safeneuron.runtime.files import key_of, read_json, write_bytes, write_json, write_text
from safeneuron.runtime.progress import Watcher
from safeneuron.selection.scores import Scores

RECORDS: dict[str, type[PartRecord]] = {
    "topics": TopicsRecord, "depth": DepthRecord, "stability": StabilityRecord, "states": StatesRecord,
    "redundancy": RedundancyRecord, "methods": MethodsRecord, "neurons": PortraitsRecord, "scale": ScaleRecord,
}  # fmt: skip
"""The parts in order, and what the ``numbers.json`` of each holds."""
ANALYSIS_PARTS = tuple(RECORDS)

Tables = dict[str, list[TableRow]]
Figures = dict[str, Callable[[], Any]]
AnalysedPart = tuple[PartRecord, Tables, Figures]
"""What a part gives: its record, its CSV tables, and its figures, which are drawn when they are written."""


class Analyser:
    """The parts of the analysis of one run, each a stage of it.

    Args:
        config: The run's config.
        run: The run, of which at least the stages up to ``select`` are done.
        watcher: Is told of the parts and of their progress.
        others: Runs that ``depth`` and ``scale`` hold beside it, with their configs.
        state: The state that ``topics``, ``stability``, ``methods`` and ``neurons`` look at.
        only: Limits ``depth``, ``states`` and ``redundancy`` to these states; all if empty.
        effort: How much work it may be.
        also: Files of twins, or languages of the bundled ones, with which ``stability`` measures again.

    Raises:
        InputError: For a run on neurons of a vision tower, and for a state whose neurons have not been found.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        watcher: Watcher,
        *,
        others: Sequence[tuple[Config, Run]] = (),
        state: str = "T0",
        only: Sequence[str] = (),
        effort: Effort | None = None,
        also: Sequence[str] = (),
    ) -> None:
        if config.measure.part != "text":
            raise InputError(
                f"an analysis looks into the text decoder, but {run.folder} is a run on the neurons of the vision "
                "tower (measure.part); analyse a run on those of the text"
            )
        self.config, self.run, self.watcher, self.others = config, run, watcher, list(others)
        self.findings = Findings(config, run)
        self.effort = Effort() if effort is None else effort
        self.also = [(name, read_twins(name)) for name in also]
        known = {present.name: present for present in self.findings.states() if self._selected(present)}
        for name in (state, *only):
            if name not in known:
                raise InputError(
                    f"{run.folder} has no neurons of a state {name!r}; expected one of {', '.join(known) or 'none'}, "
                    f"make it first with: safeneuron run {run.folder}/config.toml --out {run.folder}"
                )
        self.state = known[state]
        self.states = [selected for name, selected in known.items() if not only or name in only]
        self.models = StateModels(config, run)

    def analyse(self, parts: Sequence[str] = ANALYSIS_PARTS, redo: Sequence[str] = ()) -> dict[str, PartRecord]:
        """Do the parts that are not done yet, and those to ``redo``; the records of all of them by name.

        Args:
            parts: Some of ``ANALYSIS_PARTS``.
            redo: Parts whose folders are deleted first, by name or as ``analysis/NAME``.

        Returns:
            The record of each part, in the order of ``ANALYSIS_PARTS``.

        Raises:
            InputError: For a part that there is not, or whose work was made with other settings.
        """
        redo = [name.removeprefix("analysis/") for name in redo]
        unknown = [name for name in (*parts, *redo) if name not in ANALYSIS_PARTS]
        if unknown:
            raise InputError(f"analysis has no part {unknown[0]!r}; expected some of {', '.join(ANALYSIS_PARTS)}")
        for name in redo:
            self.run.remove(f"analysis/{name}")
        works: dict[str, Callable[[Path], AnalysedPart]] = {
            "topics": self.topics, "depth": self.depth, "stability": self.stability, "states": self.changes,
            "redundancy": self.redundancy, "methods": self.methods, "neurons": self.neurons, "scale": self.scale,
        }  # fmt: skip
        # The neurons of all states are there: the stages that found them are done.
        selected = {f"{state.name}/select": self.run.folder / state.name / "select" for state in self.states}
        keys = {name: str(read_json(folder / "done.json")["key"]) for name, folder in selected.items()}
        runner, records = Runner(self.run, self.watcher, keys=keys), {}
        for name in ANALYSIS_PARTS:
            if name in parts:
                runner.do(self._part(name, works[name]))
                numbers = read_json(self.run.folder / "analysis" / name / "numbers.json")
                records[name] = RECORDS[name].from_json(numbers)
        return records

    # -- the parts ----------------------------------------------------------------------------------------------

    def topics(self, folder: Path) -> AnalysedPart:
        """Topics of the unsafe prompts, beside the same prompts dealt to topics at random."""
        classes, model = self.findings.classes(), self.models.of(self.state)
        labels = [prompt.category for prompt in classes[0]]
        stats = topic_stats(self.config, model, classes, labels, self.watcher.progress)
        stats.save(folder / "topics.safetensors")
        dealt = [label for label in labels if label in stats.topics]
        random.Random(self.config.seed).shuffle(dealt)
        order = iter(dealt)
        mixed = [next(order) if label in stats.topics else "" for label in labels]
        shuffled = topic_stats(self.config, model, classes, mixed)
        record = topics_record(self.config, stats, shuffled, self.effort)
        return record, record.tables(), {"topics": lambda: figures.topics_figure(record)}

    def depth(self, folder: Path) -> AnalysedPart:
        """The sets of this run's states, and T0's of the other runs, over relative depth."""
        named = [(state.name, self.findings.neurons(state)) for state in self.states]
        if self.others:
            every = [(self.config, self.run), *self.others]
            named = [(config.name, Findings(config, run).neurons(BASE)) for config, run in every]
        record = depth_record(named)
        return record, record.tables(), {"depth": lambda: figures.depth_figure(record)}

    def stability(self, folder: Path) -> AnalysedPart:
        """What the set owes to the prompts and to the way of measuring."""
        model = self.models.of(self.state)
        bare = copy.copy(model.tokenizer)
        bare.chat_template = None
        other = "bfloat16" if str(model.network.dtype) == "torch.float32" else "float32"
        variants = [("no chat template", replace(model, tokenizer=bare)), (other, self.models.load(self.state, other))]
        record = stability_record(
            self.config, model, state=self.state.name, classes=self.findings.classes(), variants=variants,
            effort=self.effort, also=self.also, progress=self.watcher.progress,
        )  # fmt: skip
        return record, record.tables(), {"stability": lambda: figures.stability_figure(record)}

    def changes(self, folder: Path) -> AnalysedPart:
        """What training changed, state by state."""
        unsafe, safe = (sample(prompts, self.effort.prompts, self.config.seed) for prompts in self.findings.classes())
        first = self.findings.neurons(BASE)
        base = observe(self.models.of(BASE), (unsafe, safe), first)
        source = embedded_folder() if self.config.model.name == NAME else Path(self.config.model.name)
        records = []
        for number, state in enumerate(self.states):
            path = folder / f"{state.name}.json"
            if not path.exists():
                neurons, model = self.findings.neurons(state), self.models.of(state)
                observed = base if state == BASE else observe(model, (unsafe, safe), neurons)
                # A name on the Hub is no folder to read weights from.
                moved = (
                    movements(self.models.load(state, "stored"), parameter_reader(source), first)
                    if state != BASE and source.is_dir()
                    else None
                )
                record = state_record(
                    state.name, neurons, observed, base_neurons=first, base=base, moved=moved, seed=self.config.seed
                )
                write_json(path, record.to_json())
            records.append(StateRecord.from_json(read_json(path)))
            self.watcher.progress(number + 1, len(self.states))
        changes = StatesRecord([len(unsafe), len(safe)], records)
        return changes, changes.tables(), {"states": lambda: figures.states_figure(changes)}

    def redundancy(self, folder: Path) -> AnalysedPart:
        """The redundancy index of each state."""
        harmful = sample(self.findings.prompts("test_unsafe"), self.effort.prompts, self.config.seed)
        judge, records = judge_of(self.config.judge), []
        for state in self.states:
            records.append(
                redundancy_record(
                    self.config,
                    self.models.of(state),
                    state=state.name,
                    classes=self.findings.classes(),
                    harmful=harmful,
                    judge=judge,
                    scores=self._scores(state),
                    folder=folder / state.name,
                    effort=self.effort,
                    progress=self.watcher.progress,
                )
            )
        record = RedundancyRecord(records)
        broken = any(state.sets for state in records)
        drawings: Figures = {"redundancy": lambda: figures.redundancy_figure(record)} if broken else {}
        return record, record.tables(), drawings

    def methods(self, folder: Path) -> AnalysedPart:
        """ES, SAS and the rivals whose sets the run has, against each other and against chance."""
        place = self.run.folder / self.state.name
        scores = self._scores(self.state)
        es, sas, full = (self.findings.neurons(self.state, name) for name in ("ES", "SAS", "neurons"))
        rivals = [NeuronSet.load(path) for path in sorted((place / "rivals").glob("*.json")) if path.stem != "done"]
        points = volcano(scores, full)
        record = MethodsRecord(
            agreements([es, sas, *rivals]), [discoveries(scores, neurons) for neurons in (es, sas, full)]
        )
        tables = {**record.tables(), "volcano": points.rows()}
        return record, tables, {"methods": lambda: figures.methods_figure(record, points)}

    def neurons(self, folder: Path) -> AnalysedPart:
        """Portraits of the neurons with the largest effect sizes; whoever prints them masks the prompts."""
        record = portraits_record(
            self.config,
            self.models.of(self.state),
            state=self.state.name,
            neurons=self.findings.neurons(self.state),
            scores=self._scores(self.state),
            prompts=list(self.findings.classes()[0]),
            effort=self.effort,
        )
        return record, record.tables(), {}

    def scale(self, folder: Path) -> AnalysedPart:
        """Attack success against preference pairs over all runs given, and this run's rounds."""
        results = [required_results(run.folder) for run in (self.run, *(other for _, other in self.others))]
        record = ScaleRecord(data_scale(results), iterations(results[0]))
        drawings: Figures = {"scale": lambda: figures.scale_figure(record.scale)} if record.scale else {}
        if len(record.iterations) > 1:
            drawings["rounds"] = lambda: figures.rounds_figure(record.iterations)
        return record, record.tables(), drawings

    # -- what they share ----------------------------------------------------------------------------------------

    def _part(self, name: str, work: Callable[[Path], AnalysedPart]) -> StageSpec:
        """A part of the analysis as a stage of the run."""
        settings: dict[str, Any] = {
            "effort": asdict(self.effort),
            "state": self.state.name,
            "states": [state.name for state in self.states],
            "others": [str(other.folder.resolve()) for _, other in self.others],
        }
        if name == "stability" and self.also:
            texts = {also: [[prompt.text for prompt in prompts] for prompts in both] for also, both in self.also}
            settings["also"] = {also: key_of(both) for also, both in texts.items()}
        inputs = [f"{state.name}/select" for state in self.states]
        return StageSpec(f"analysis/{name}", settings, inputs, partial(_write, work), together=True)

    def _scores(self, state: State) -> Scores:
        return Scores.load(self.run.folder / state.name / "select" / "scores.safetensors")

    def _selected(self, state: State) -> bool:
        return (self.run.folder / state.name / "select" / "done.json").exists()


def _write(work: Callable[[Path], AnalysedPart], folder: Path) -> None:
    """Do a part, and write its numbers, tables and figures."""
    record, tables, drawings = work(folder)
    write_json(folder / "numbers.json", record.to_json())
    for table, rows in tables.items():
        write_text(folder / f"{table}.csv", as_csv(finite(rows)))
    for file, content in figures.figure_files(drawings).items():
        write_bytes(folder / file, content.encode() if isinstance(content, str) else content)
