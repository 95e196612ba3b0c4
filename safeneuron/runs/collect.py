"""From the stages' files to one ``results.json`` and the report: no number here that a stage has not written."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeneuron._version import __version__
from safeneuron.config.align import AlignTable
from safeneuron.config.attack_plan import AttackPlan
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, states_of
from safeneuron.config.toml import read_config, to_toml
from safeneuron.errors import InputError
from safeneuron.evaluation.rates import corrected, paired_difference, verdict_rates
from safeneuron.models import embedded
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.reporting.comparison import Asked, Compared, render_comparison
from safeneuron.reporting.figures import as_pictures
from safeneuron.reporting.report import Details, render
from safeneuron.reporting.results import COMPARED
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import key_of, read_json, read_lines, write_bytes, write_json, write_text
from safeneuron.selection.scores import Scores

STRONGEST = 200
"""Neurons of each criterion that the report shows one by one."""
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "numpy")


def write_report(config: Config, run: Run, folder: Path) -> None:
    """Write ``results.json`` (the same for the same run, however often it was interrupted) and all of the report."""
    results = collect(config, run)
    write_json(folder / "results.json", results)
    answers = responses(config, run)
    details = Details(answers, strongest_neurons(config, run), analysis_figures(run))
    files = render(results, examples(config, answers), provenance(config, run), config.report.show_text, details)
    for name, text in files.items():
        write_text(folder / name, text)
    for name, picture in as_pictures(results).items():
        write_bytes(folder / "figures" / f"{name}.png", picture)


def collect(config: Config, run: Run) -> dict[str, Any]:
    """Every number of the run, by state; no times, so that it can be compared between runs."""
    base = NeuronSet.load(run.folder / "T0" / "select" / "neurons.json")
    findings = Findings(config, run)
    states = findings.states()
    return {
        "schema": 1,
        "name": config.name,
        "model": embedded.LABEL if config.model.name == embedded.NAME else config.model.name,
        "fingerprint": base.fingerprint,
        "seed": config.seed,
        "judge": config.judge.label,
        "max_new_tokens": config.attack.max_new_tokens,
        "neurons_total": base.total,
        "layers": len(base.widths),
        "part": config.measure.stored_part,
        "states": [_state(findings, state, base) for state in states],
        "differences": state_differences(findings, states),
    }


def _state(findings: Findings, state: State, base: NeuronSet) -> dict[str, Any]:
    config, run = findings.config, findings.run
    folder = run.folder / state.name
    sets = {name: findings.neurons(state, file) for name, file in (("ES", "ES"), ("SAS", "SAS"), ("FULL", "neurons"))}
    thresholds = read_json(folder / "select" / "thresholds.json")
    align, training = None, []
    if state.round > 0:
        align = read_json(folder / "align" / "frozen.json")
        align["pairs"] = len(read_lines(run.folder / "T0" / "pairs" / "pairs.jsonl"))
        training = read_lines(folder / "align" / "train.jsonl")
    attacks, curve = [], []
    for attack in findings.plan(state).answered:
        record = read_json(folder / "attack" / attack.folder / "pruned.json")
        judged = {
            kind: read_json(path) if (path := folder / "judge" / attack.folder / f"{kind}.json").exists() else None
            for kind in ("harmful", "benign")
        }
        if attack.knowledge == "curve":
            harmful = judged["harmful"] or {}
            shares = {name: harmful[name] for name in ("rate", "low", "high")}
            incoherent = harmful["incoherent"] / harmful["n"]
            point = {"density": float(attack.set), "neurons": record["neurons"]}
            curve.append({**point, **shares, "incoherent": incoherent})
        else:
            attacks.append({"set": attack.set, "knowledge": attack.knowledge, **record, **judged})
    file = folder / "judge" / "agreement.json"
    return {
        "name": state.name,
        "label": label_of(config, state),
        "round": state.round,
        "variant": state.variant,
        "agreement": read_json(file)["pairs"] if file.exists() else [],
        "neurons": {
            "effect_size_threshold": thresholds["effect_size"],
            "shift_threshold": thresholds["shift"],
            "significant": thresholds["significant"],
            **{name: len(neurons) for name, neurons in sets.items()},
            "density": sets["FULL"].density,
            "jaccard_with_T0": sets["FULL"].jaccard(base),
            "per_layer": {name: neurons.counts for name, neurons in sets.items()},
        },
        "align": align,
        "training": training,
        "attacks": attacks,
        "curve": curve,
        "refusals_by_category": _refusals_by_category(findings, state),
        "capability": _capability(folder),
    }


def _refusals_by_category(findings: Findings, state: State) -> dict[str, dict[str, float]]:
    """The verdicts on benign requests with nothing pruned, counted for each category of the prompts."""
    groups: dict[str, list[str]] = {}
    found = verdicts_of(findings, state, "benign", "ORI", "none")
    for index, prompt in enumerate(findings.prompts("test_safe")):
        if index in found:
            groups.setdefault(prompt.category, []).append(found[index])
    return {category: verdict_rates(verdicts, "refused") for category, verdicts in sorted(groups.items())}


def _capability(folder: Path) -> dict[str, dict[str, Any]]:
    """The scores of the capability benchmarks, by what was pruned and by task; empty where they were not run."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "capability").glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = read_json(path)
    return found


def state_differences(findings: Findings, states: Sequence[State]) -> list[dict[str, Any]]:
    """Paired comparisons, each state with T0 and the main training with each variant of the same round.

    The p-values are corrected for their number, all of this list together.
    """
    others = [state for state in states if state != BASE]
    pairs = [(BASE, state) for state in others]
    pairs += [(rival, main) for main in others for rival in others
              if not main.variant and rival.variant and rival.round == main.round]  # fmt: skip
    found: list[dict[str, Any]] = []
    for first, second in pairs:
        for kind, verdict, which, knowledge in COMPARED:
            one, other = (verdicts_of(findings, state, kind, which, knowledge) for state in (first, second))
            # An answer that could not be judged leaves its pair out.
            asked = [
                index for index in sorted(one.keys() & other.keys()) if "cannot say" not in (one[index], other[index])
            ]
            result = paired_difference([one[i] == verdict for i in asked], [other[i] == verdict for i in asked])
            if result is not None:
                what = {"kind": kind, "verdict": verdict, "set": which, "knowledge": knowledge}
                found.append({"first": first.name, "second": second.name, **what, **result.to_record()})
    for record, p in zip(found, corrected([record["p"] for record in found]), strict=True):
        record["p_corrected"] = p
    return found


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


def responses(config: Config, run: Run) -> list[dict[str, Any]]:
    """Every judged answer of every state under every attack, in the order of states, attacks and prompts."""
    findings = Findings(config, run)
    found = []
    for state in findings.states():
        for attack in findings.plan(state).answered:
            for kind in ("harmful", "benign"):
                file = Path(attack.folder) / f"{kind}.jsonl"
                verdicts = {v["index"]: v for v in read_lines(run.folder / state.name / "judge" / file)}
                answers = {a["index"]: a for a in read_lines(run.folder / state.name / "attack" / file)}
                what = {"state": state.name, "set": attack.set, "knowledge": attack.knowledge, "kind": kind}
                found += [
                    {
                        **what,
                        "index": index,
                        "prompt": answers[index]["prompt"],
                        "image": answers[index].get("image", ""),
                        "response": answers[index]["response"],
                        "verdict": verdicts[index]["verdict"],
                    }
                    for index in sorted(answers.keys() & verdicts.keys())
                ]
    return found


def examples(config: Config, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all answers, each state's first ones, intact and with all its safety neurons pruned."""
    counts = {"harmful": config.report.examples, "benign": min(1, config.report.examples)}
    found: list[dict[str, Any]] = []
    taken: dict[tuple[str, str, str], int] = {}
    plans = {state.name: AttackPlan.of(config.attack, state) for state in states_of(config)}
    for answer in answers:
        pruned = plans[answer["state"]].find("FULL", "adaptive")
        shown = [("ORI", "none"), *([] if pruned is None else [(pruned.set, pruned.knowledge)])]
        place = (answer["state"], answer["set"], answer["kind"])
        if (answer["set"], answer["knowledge"]) not in shown:
            continue
        if taken.get(place, 0) < counts[answer["kind"]]:
            taken[place] = taken.get(place, 0) + 1
            found.append(answer)
    return found


def strongest_neurons(config: Config, run: Run) -> dict[str, list[list[float]]]:
    """The neurons of each state with the largest effect size or shift, in the form that ``charts`` takes."""
    findings = Findings(config, run)
    found = {}
    for state in findings.states():
        scores = Scores.load(run.folder / state.name / "select" / "scores.safetensors")
        sets = [findings.neurons(state, name) for name in ("ES", "SAS")]
        rows: dict[tuple[int, int], list[float]] = {}
        for by, (neurons, values) in enumerate(zip(sets, (scores.d, scores.z), strict=True), start=1):
            ranked = sorted(places_of(neurons), key=lambda place: -float(values[place[2]]))
            for layer, index, flat in ranked[:STRONGEST]:
                other = sets[2 - by]
                both = 3 if (layer, index) in other else by
                d, z = round(float(scores.d[flat]), 4), round(float(scores.z[flat]), 4)
                rows[layer, index] = [layer, index, scores.widths[layer], d, z, both]
        found[state.name] = [rows[place] for place in sorted(rows)]
    return found


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


def provenance(config: Config, run: Run) -> dict[str, Any]:
    """How the results were made: config, versions, machine, and the time and memory of each stage."""
    stages = []
    for path in sorted(run.folder.rglob("done.json"), key=lambda path: path.stat().st_mtime):
        record = read_json(path)
        figures = {"seconds": record["seconds"], "peak_memory_mb": record["peak_memory_mb"]}
        stages.append({"stage": record["stage"], **figures})
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "command": f"safeneuron run config.toml --out {run.folder.name}",
        "version": __version__,
        "versions": {
            "python": platform.python_version(),
            "device": device,
            "platform": sys.platform,
            **{package: version(package) for package in PACKAGES},
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config_toml": to_toml(config, comments=False),
        "stages": stages,
        "warnings": [
            warning
            for path in (
                run.folder / "data" / "warnings.json",
                run.folder / "T0" / "pairs" / "warnings.json",
                *sorted(run.folder.glob("*/select/warnings.json")),
                *sorted(run.folder.glob("*/align/warnings.json")),
            )
            if path.exists()
            for warning in read_json(path)["warnings"]
        ],
    }


MARKER = "comparison.json"


def write_comparison(folders: Sequence[Path], target: Path) -> list[Path]:
    """Compare finished runs, in this order, and write the files into ``target``; their paths.

    Raises ``InputError`` for a run without a report, the same run twice, or a target that holds something else.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run cannot be compared with itself, but one is named twice; name each run once")
    found = list(target.iterdir()) if target.is_dir() else []
    if found and not (target / MARKER).exists():
        raise InputError(f"{target} holds files but no comparison; give an empty or new folder with --out")
    runs = [compared_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    files = render_comparison(runs)
    write_json(target / MARKER, {"schema": 1, "kind": "comparison", "runs": [str(folder) for folder in folders]})
    for name, text in files.items():
        write_text(target / name, text)
    return [target / name for name in files]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*path[-depth:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def compared_run(folder: Path, name: str) -> Compared:
    """One finished run as the comparison takes it."""
    run = Run.open(folder)
    if not (folder / "report" / "done.json").exists():
        raise InputError(f"{folder} has no finished report to compare; make it first with: safeneuron report {folder}")
    config = read_config(folder / "config.toml")
    return Compared(name, read_json(folder / "report" / "results.json"), settings_key(config), verdicts(config, run))


def settings_key(config: Config) -> str:
    """The same for two runs that differ in the seed, the name or the look of the report alone."""
    return key_of(config.model_dump(mode="json", exclude={"seed", "name", "report"}))


def verdicts(config: Config, run: Run) -> dict[Asked, dict[str, str]]:
    """Every verdict by state and attack, and in that by the text of the request; of equal requests the first one's."""
    found: dict[Asked, dict[str, str]] = {}
    findings = Findings(config, run)
    for state in findings.states():
        for which, knowledge in [(attack.set, attack.knowledge) for attack in findings.plan(state).attacks]:
            for kind in ("harmful", "benign"):
                judged = verdicts_of(findings, state, kind, which, knowledge)
                prompts = requests_of(run, state, kind)
                by_text: dict[str, str] = {}
                for index, verdict in judged.items():
                    by_text.setdefault(prompts[index], verdict)
                found[state.name, kind, which, knowledge] = by_text
    return found


def requests_of(run: Run, state: State, kind: str) -> dict[int, str]:
    """The requests of a kind, as the unpruned state was asked them."""
    lines = read_lines(run.folder / state.name / "attack" / "ORI" / f"{kind}.jsonl")
    return {int(line["index"]): str(line["prompt"]) for line in lines}
