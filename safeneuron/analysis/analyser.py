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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safeneuron.analysis import figures
from safeneuron.analysis.depth import density_over_depth, layer_densities, mean_depth, thirds
from safeneuron.analysis.drift import by_layer, movement_record, observe, state_record
from safeneuron.analysis.methods import agreements, discoveries, volcano
from safeneuron.analysis.portraits import portraits_record
from safeneuron.analysis.redundancy import redundancy_record, with_intervals
from safeneuron.analysis.scaling import data_scale, iterations, required_results
from safeneuron.analysis.settings import Effort, finite, flat
from safeneuron.analysis.stability import stability_record
from safeneuron.analysis.topics import topic_stats, topics_record
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State
from safeneuron.data.prompts import read_twins
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.embedded import NAME, embedded_folder
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.reporting.tables import as_csv
from safeneuron.runs.attackers import sample
from safeneuron.runs.findings import Findings
from safeneuron.runs.inputs import judge_of, model_of
from safeneuron.runs.run import Run
from safeneuron.runtime.devices import peak_memory_mb, reset_peak_memory
from safeneuron.runtime.files import key_of, read_json, write_bytes, write_json, write_text
from safeneuron.runtime.progress import Watcher
from safeneuron.selection.scores import Scores

ANALYSIS_PARTS = ("topics", "depth", "stability", "states", "redundancy", "methods", "neurons", "scale")

Record = dict[str, Any]
Tables = dict[str, list[Record]]
Figures = dict[str, Callable[[], Any]]


class Analyser:
    """The parts of the analysis of one run; ``others`` are runs that depth and scale hold beside it.

    ``state`` is the one that topics, stability and neurons look at; ``only`` limits states and redundancy to some.
    ``also`` names files of twins, or languages of the bundled ones, with which stability measures again.
    """

    def __init__(
        self, config: Config, run: Run, watcher: Watcher, others: Sequence[tuple[Config, Run]] = (),
        state: str = "T0", only: Sequence[str] = (), effort: Effort | None = None, also: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if config.measure.part != "text":
            raise InputError(
                f"an analysis looks into the text decoder, but {run.folder} is a run on the neurons of the eyes "
                "(measure.part); analyse a run on those of the text"
            )
        self.config, self.run, self.watcher, self.others = config, run, watcher, list(others)
        self.findings = Findings(config, run)
        self.effort = Effort() if effort is None else effort
        self.also = [(name, read_twins(name)) for name in also]
        known = {one.name: one for one in self.findings.states() if self._selected(one)}
        for name in (state, *only):
            if name not in known:
                raise InputError(
                    f"{run.folder} has no neurons of a state {name!r}; expected one of {', '.join(known) or 'none'}, "
                    f"make it first with: safeneuron run {run.folder}/config.toml --out {run.folder}"
                )
        self.state = known[state]
        self.states = [one for name, one in known.items() if not only or name in only]
        self._loaded: tuple[str, str, Model] | None = None

    def analyse(self, parts: Sequence[str] = ANALYSIS_PARTS, redo: Sequence[str] = ()) -> dict[str, Record]:
        """Do the parts that are not done yet, and those to ``redo``; the numbers of all of them by name."""
        redo = [name.removeprefix("analysis/") for name in redo]
        unknown = [name for name in (*parts, *redo) if name not in ANALYSIS_PARTS]
        if unknown:
            raise InputError(f"analysis has no part {unknown[0]!r}; expected some of {', '.join(ANALYSIS_PARTS)}")
        for name in redo:
            self.run.remove(f"analysis/{name}")
        works: dict[str, Callable[[Path], tuple[Record, Tables, Figures]]] = {
            "topics": self.topics, "depth": self.depth, "stability": self.stability, "states": self.changes,
            "redundancy": self.redundancy, "methods": self.methods, "neurons": self.neurons, "scale": self.scale,
        }  # fmt: skip
        return {name: self._stage(name, works[name]) for name in ANALYSIS_PARTS if name in parts}

    # -- the parts ----------------------------------------------------------------------------------------------

    def topics(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """Topics of the unsafe prompts, beside the same prompts dealt to topics at random."""
        classes, model = self._classes(), self._model(self.state)
        labels = [prompt.category for prompt in classes[0]]
        stats = topic_stats(self.config, model, classes, labels, self.watcher.progress)
        stats.save(folder / "topics.safetensors")
        dealt = [label for label in labels if label in stats.topics]
        random.Random(self.config.seed).shuffle(dealt)
        order = iter(dealt)
        mixed = [next(order) if label in stats.topics else "" for label in labels]
        shuffled = topic_stats(self.config, model, classes, mixed)
        record = topics_record(self.config, stats, shuffled, self.effort)
        layers = [
            {"layer": layer, "width": width, **{role: record["layers"][role][layer] for role in record["layers"]}}
            for layer, width in enumerate(record["widths"])
        ]
        tables = {"topics": record["topics"], "layers": layers}
        tables |= {name: record[name] for name in ("overlaps", "random_neurons", "shuffled_topics")}
        return record, tables, {"topics": lambda: figures.topics_figure(record)}

    def depth(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """The sets of this run's states, and T0's of the other runs, over relative depth."""
        named = [(state.name, self.findings.neurons(state)) for state in self.states]
        if self.others:
            every = [(self.config, self.run), *self.others]
            named = [(config.name, Findings(config, run).neurons(BASE)) for config, run in every]
        sets: list[Record] = [
            {
                "name": name,
                "neurons": len(one),
                "layers": layer_densities(one),
                "density": density_over_depth(one),
                "thirds": list(thirds(one)),
                "mean_depth": mean_depth([one])[0],
            }
            for name, one in named
        ]
        rows = [
            {"name": one["name"], "neurons": one["neurons"], "mean_depth": one["mean_depth"]}
            | dict(zip(("early", "middle", "late"), one["thirds"], strict=True))
            for one in sets
        ]
        record = {"sets": sets}
        return record, {"depth": rows}, {"depth": lambda: figures.depth_figure(record)}

    def stability(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """What the set owes to the prompts and to the way of measuring."""
        model = self._model(self.state)
        bare = copy.copy(model.tokenizer)
        bare.chat_template = None
        other = "bfloat16" if str(model.network.dtype) == "torch.float32" else "float32"
        variants = [("no chat template", replace(model, tokenizer=bare)), (other, self._load(self.state, other))]
        record = stability_record(
            self.config, model, self._classes(), variants, self.effort, self.watcher.progress, self.also
        )
        record["state"] = self.state.name
        thresholds = [
            {"density": one["density"], **one["jaccard"], "chance": one["chance"]} for one in record["thresholds"]
        ]
        tables = {"samples": record["samples"], "variants": record["variants"], "thresholds": thresholds}
        if record["also"]:
            tables["also"] = [flat(one) for one in record["also"]]
        return record, tables, {"stability": lambda: figures.stability_figure(record)}

    def changes(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """What training changed, state by state."""
        unsafe, safe = (sample(prompts, self.effort.prompts, self.config.seed) for prompts in self._classes())
        first = self.findings.neurons(BASE)
        base = observe(self._model(BASE), (unsafe, safe), first)
        source = embedded_folder() if self.config.model.name == NAME else Path(self.config.model.name)
        records: list[Record] = []
        for number, state in enumerate(self.states):
            path = folder / f"{state.name}.json"
            if not path.exists():
                own, model = self.findings.neurons(state), self._model(state)
                now = base if state == BASE else observe(model, (unsafe, safe), own)
                # A name on the Hub is no folder to read weights from.
                moved = (
                    movement_record(self._load(state, "stored"), source, first)
                    if state != BASE and source.is_dir()
                    else None
                )
                write_json(
                    path, {"state": state.name, **state_record(now, base, own, first, self.config.seed), "moved": moved}
                )
            records.append(read_json(path))
            self.watcher.progress(number + 1, len(self.states))
        record: Record = {"prompts": [len(unsafe), len(safe)], "states": records}
        return record, {"states": by_layer(records)}, {"states": lambda: figures.states_figure(record)}

    def redundancy(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """The redundancy index of each state."""
        asked = sample(self.findings.prompts("test_unsafe"), self.effort.prompts, self.config.seed)
        judge, records = judge_of(self.config.judge), []
        for state in self.states:
            scores = Scores.load(self.run.folder / state.name / "select" / "scores.safetensors")
            found = redundancy_record(
                self.config, self._model(state), self._classes(), asked, judge, scores, folder / state.name,
                self.effort, self.watcher.progress,
            )  # fmt: skip
            records.append({"state": state.name, **found})
        rows = [with_intervals(one) for one in records]
        sets = [
            {"state": one["state"], "set": number, "neurons": found["neurons"]}
            | {f"{share} {how}": found[how][share] for how in ("alone", "together") for share in found[how]}
            for one in records
            for number, found in enumerate(one["sets"], start=1)
        ]
        record = {"states": records}
        drawings: Figures = {"redundancy": lambda: figures.redundancy_figure(record)} if sets else {}
        return record, {"redundancy": rows, "sets": sets}, drawings

    def methods(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """ES, SAS and the rivals whose sets the run has, against each other and against chance."""
        place = self.run.folder / self.state.name
        scores = Scores.load(place / "select" / "scores.safetensors")
        es, sas, full = (self.findings.neurons(self.state, name) for name in ("ES", "SAS", "neurons"))
        rivals = [NeuronSet.load(path) for path in sorted((place / "rivals").glob("*.json")) if path.stem != "done"]
        found = [one._asdict() for one in agreements([es, sas, *rivals])]
        points = {name: one.tolist() for name, one in volcano(scores, full)._asdict().items()}
        record = {"agreements": found, "discoveries": [discoveries(scores, one)._asdict() for one in (es, sas, full)]}
        pairs = [{key: value for key, value in one.items() if key != "layers"} for one in found]
        plot = [dict(zip(points, row, strict=True)) for row in zip(*points.values(), strict=True)]
        tables = {"agreements": pairs, "discoveries": record["discoveries"], "volcano": plot}
        return record, tables, {"methods": lambda: figures.methods_figure(record, points)}

    def neurons(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """Portraits of the neurons with the largest effect sizes; whoever prints them masks the prompts."""
        scores = Scores.load(self.run.folder / self.state.name / "select" / "scores.safetensors")
        own, prompts = self.findings.neurons(self.state), list(self._classes()[0])
        found = portraits_record(self.config, self._model(self.state), own, scores, prompts, self.effort)
        rows = [
            {"layer": one["layer"], "channel": one["channel"], "d": one["d"], "promoted": " | ".join(one["promoted"])}
            for one in found
        ]
        return {"state": self.state.name, "neurons": found}, {"neurons": rows}, {}

    def scale(self, folder: Path) -> tuple[Record, Tables, Figures]:
        """Attack success against preference pairs over all runs given, and this run's rounds."""
        results = [required_results(one.folder) for one in (self.run, *(other for _, other in self.others))]
        found, rounds = data_scale(results), iterations(results[0])
        drawings: Figures = {"scale": lambda: figures.scale_figure(found)} if found else {}
        if len(rounds) > 1:
            drawings["rounds"] = lambda: figures.rounds_figure(rounds)
        return {"scale": found, "iterations": rounds}, {"scale": found, "iterations": rounds}, drawings

    # -- what they share ----------------------------------------------------------------------------------------

    def _stage(self, name: str, work: Callable[[Path], tuple[Record, Tables, Figures]]) -> Record:
        settings = {
            "effort": asdict(self.effort),
            "state": self.state.name,
            "states": [one.name for one in self.states],
            "others": [str(other.folder.resolve()) for _, other in self.others],
        }
        inputs = {f"{one.name}/select": self._key(one) for one in self.states}
        if name == "stability" and self.also:
            asked = {also: [[one.text for one in prompts] for prompts in both] for also, both in self.also}
            settings["also"] = {also: key_of(texts) for also, texts in asked.items()}
        stage = self.run.stage(f"analysis/{name}", settings, inputs)
        if stage.done:
            self.watcher.ended(stage.name, 0.0, skipped=True)
            return read_json(stage.folder / "numbers.json")
        self.watcher.began(stage.name)
        stage.start()
        reset_peak_memory()
        begun = time.monotonic()
        record, tables, drawings = work(stage.folder)
        write_json(stage.folder / "numbers.json", finite(record))
        for table, rows in tables.items():
            write_text(stage.folder / f"{table}.csv", as_csv(finite(rows)))
        for file, content in figures.figure_files(drawings).items():
            write_bytes(stage.folder / file, content.encode() if isinstance(content, str) else content)
        seconds = time.monotonic() - begun
        stage.finish(seconds, peak_memory_mb())
        self.watcher.ended(stage.name, seconds, skipped=False)
        return read_json(stage.folder / "numbers.json")

    def _key(self, state: State) -> str:
        return str(read_json(self.run.folder / state.name / "select" / "done.json")["key"])

    def _selected(self, state: State) -> bool:
        return (self.run.folder / state.name / "select" / "done.json").exists()

    def _classes(self) -> tuple[list[Prompt], list[Prompt]]:
        return self.findings.prompts("unsafe"), self.findings.prompts("safe")

    def _load(self, state: State, dtype: str) -> Model:
        trained = None if state == BASE else self.run.folder / state.name / "align" / "model"
        return model_of(self.config.model, dtype, trained=trained)

    def _model(self, state: State) -> Model:
        """The state's model; the last one loaded is kept."""
        if self._loaded is None or self._loaded[0] != state.name:
            self._loaded = None
            self._loaded = (state.name, "", self._load(state, self.config.model.dtype))
        return self._loaded[2]
