"""Any artefact of a run in words, for ``safeneuron show``: what it is, what is in it, what it was made from."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safeneuron.config.attack_plan import AttackPlan
from safeneuron.errors import InputError
from safeneuron.reporting.formatting import Table
from safeneuron.reporting.results import RunResults
from safeneuron.reporting.terminal import result_lines, terminal_table
from safeneuron.runtime.files import read_json, read_lines


def results_at(path: Path) -> RunResults | None:
    """The results of the run at ``path``, or those in the file itself; None where there are none yet."""
    if path.name == "results.json" and path.is_file():
        return RunResults.load(path)
    if (path / "run.json").exists() and (path / "report" / "done.json").exists():
        return RunResults.load(path / "report" / "results.json")
    return None


def explain(path: Path, table: bool = True) -> Iterator[str]:
    """Lines that say what the file or folder at ``path`` is. Raises ``InputError`` if it is nothing of ours.

    Without ``table`` a run's result table is left to ``result_grid``.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run, the folder of a stage, or a file in one")
    explainer = _folder if path.is_dir() else _explainer(path)
    if explainer is None:
        raise InputError(
            f"{path} is not an artefact of safeneuron; show explains runs, and the folders and files that a run writes"
        )
    with _damage_as_input_error(path):
        yield from explainer(path)
        results = results_at(path)
        if table and results is not None:
            yield from ([""] if path.is_dir() else [])
            yield from result_lines(results)


def result_grid(path: Path) -> Table | None:
    """The result table of the run at ``path``; None where there is none yet. Raises ``InputError`` like ``explain``."""
    with _damage_as_input_error(path):
        results = results_at(path)
        return None if results is None else terminal_table(results)


@contextmanager
def _damage_as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} has the name of an artefact of safeneuron but not its form ({error!r}); it may be damaged, "
            "make its stage again with --redo"
        ) from error


def _folder(path: Path) -> Iterator[str]:
    if (path / "run.json").exists():
        yield from _run(path)
    elif (path / "done.json").exists():
        yield from _done(path / "done.json")
    elif (path / "started.json").exists():
        yield from _started(path / "started.json")
    elif (path / "config.json").exists():
        yield from _model(path)
    elif any(path.glob("*/done.json")):
        yield f"The model state {path.name}, with the finished stages:"
        for marker in sorted(path.glob("*/done.json")):
            yield f"  {marker.parent.name}: {read_json(marker)['seconds']} s"
    else:
        known = [
            (file, explainer) for file in sorted(path.iterdir()) if file.is_file() and (explainer := _explainer(file))
        ]
        if not known:
            raise InputError(f"{path} is neither a run, nor a stage, nor a model; show explains those and their files")
        for file, explainer in known:
            yield f"{file.name}:"
            yield from (f"  {line}" for line in explainer(file))


def _run(path: Path) -> Iterator[str]:
    stages = sorted(path.rglob("done.json"), key=lambda marker: marker.stat().st_mtime)
    unfinished = sorted(path.rglob("started.json"))
    yield f"A run: {len(stages)} finished stages, {len(unfinished)} unfinished."
    for marker in stages:
        record = read_json(marker)
        yield f"  {record['stage']}: {record['seconds']} s, up to {record['peak_memory_mb']} MB"
    for marker in unfinished:
        yield f"  {marker.parent.relative_to(path)}: unfinished"


def _done(path: Path) -> Iterator[str]:
    record = read_json(path)
    yield f"The finished stage {record['stage']}: {record['seconds']} s, up to {record['peak_memory_mb']} MB."
    yield f"Made from: {', '.join(record['inputs']) or 'the config alone'}. Key {record['key']}."
    yield "Files:"
    yield from (f"  {name}" for name in record["outputs"])


def _started(path: Path) -> Iterator[str]:
    yield f"An unfinished stage, {read_json(path)['stage']}; the same command continues it."


def _model(path: Path) -> Iterator[str]:
    config = read_json(path / "config.json")
    yield f"A model in Hugging Face form: {', '.join(config.get('architectures') or ['unknown architecture'])}."
    lineage = config.get("safeneuron_lineage")
    yield f"Its neurons are those of fingerprint {lineage}." if lineage else "It was not trained by safeneuron."
    record = path / "reproduce" / "record.json"
    if record.exists():
        yield from _published(record)


def _memory(path: Path) -> Iterator[str]:
    record = read_json(path)
    sizes = {name: f"{size / 2**30:.2f}" for name, size in record["need"].items()}
    total = sizes.pop("total")
    had = "unknown" if record["available"] is None else f"{record['available'] / 2**30:.2f} GB"
    yield f"The training was planned to need {total} GB of memory; available: {had}."
    yield f"In GB: {', '.join(f'{name} {size}' for name, size in sizes.items())}."
    checkpointing = ", with gradient checkpointing" if record["gradient_checkpointing"] else ""
    yield f"{_at_once(record['at_once'])}, up to {record['length']} tokens each{checkpointing}."
    if record["at_once_in_the_end"] != record["at_once"]:
        yield f"Memory ran out all the same; in the end: {_at_once(record['at_once_in_the_end'])}."


def _at_once(pairs: int) -> str:
    return f"{pairs} pairs of a micro-batch at once" if pairs else "All pairs of a micro-batch at once"


def _explainer(path: Path) -> Callable[[Path], Iterator[str]] | None:
    if path.suffix == ".safetensors":
        return _tensors
    if path.suffix == ".json" and path.absolute().parent.parent.name == "capability":
        return _capability
    by_name: dict[str, Callable[[Path], Iterator[str]]] = {
        "done.json": _done,
        "started.json": _started,
        "warnings.json": _warnings,
        "log.txt": lambda path: iter(path.read_text(encoding="utf-8").splitlines()),
        "report.html": lambda _: iter(["The report, to be opened in a browser; it needs no other file."]),
        "report.md": lambda _: iter(["The report as Markdown; its figures stand in figures/."]),
        "run.json": lambda _: iter(["Marks a folder as a run of safeneuron."]),
        "config.toml": _config,
        "neurons.json": _neurons,
        "frozen_neurons.json": _neurons,
        "ES.json": _neurons,
        "SAS.json": _neurons,
        "thresholds.json": _thresholds,
        "frozen.json": _frozen,
        "memory.json": _memory,
        "pruned.json": _pruned,
        "plan.json": _plan,
        "record.json": _published,
        "results.json": lambda _: iter([]),
        "comparison.html": lambda _: iter(["Several runs side by side, to be opened in a browser."]),
        "comparison.md": lambda _: iter(["Several runs side by side, as Markdown."]),
        "train.jsonl": _training,
        "pairs.jsonl": _pairs,
    }
    if path.name in by_name:
        return by_name[path.name]
    by_suffix: dict[str, Callable[[Path], Iterator[str]]] = {
        ".jsonl": _lines,
        ".csv": _csv,
        ".svg": lambda _: iter(["A figure of the report."]),
        ".png": lambda _: iter(["A figure of the report, for where no SVG can be used."]),
    }
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    if path.suffix == ".json" and (path.name.startswith("search-") or path.parent.name == "rivals"):
        return _neurons
    return _counts if path.name in ("harmful.json", "benign.json") else None


def _tensors(path: Path) -> Iterator[str]:
    from safeneuron.neurons.statistics import ActivationStats, load_tensors
    from safeneuron.selection.scores import Scores

    _, header = load_tensors(path)
    if header.get("kind") == "activation statistics":
        stats = ActivationStats.load(path)
        yield (
            f"Activation statistics: mean and variance of {sum(stats.widths):,} neurons in {len(stats.widths)} layers, "
            f"over {stats.unsafe.count} unsafe and {stats.safe.count} safe prompts (pooling: {stats.pooling})."
        )
    elif header.get("kind") == "scores":
        scores = Scores.load(path)
        yield (
            f"Scores of {len(scores.d):,} neurons: effect size {float(scores.d.min()):.2f} to "
            f"{float(scores.d.max()):.2f}; {scores.significant:,} are significantly more active on unsafe prompts "
            "(false-discovery rate 5 %)."
        )
    else:
        yield "Tensors in safetensors form, not written by a stage of safeneuron."
        return
    yield f"They belong to the model with fingerprint {header['fingerprint']}."


def _config(path: Path) -> Iterator[str]:
    from safeneuron.config.toml import read_config

    config = read_config(path)
    trainings = ["main", *config.variants] if config.align.rounds else list(config.variants)
    yield f"The config of the run {config.name!r} on the model {config.model.name!r}, seed {config.seed}."
    yield f"Trainings: {', '.join(trainings) or 'none (an audit)'}; judge: {config.judge.label}."


def _neurons(path: Path) -> Iterator[str]:
    from safeneuron.neurons.neuron_set import VISION_SUFFIX, NeuronSet

    neurons = NeuronSet.load(path)
    whose = "vision tower of the model" if neurons.fingerprint.endswith(VISION_SUFFIX) else "model"
    yield f"A neuron set: {neurons}, of the {whose} with fingerprint {neurons.fingerprint}."
    peak = max(range(len(neurons.counts)), key=neurons.counts.__getitem__)
    yield f"Most of them in layer {peak}: {neurons.counts[peak]} of {neurons.widths[peak]}."


def _thresholds(path: Path) -> Iterator[str]:
    record = read_json(path)
    yield f"Thresholds used: effect size above {record['effect_size']:.3g}, shift z-score above {record['shift']:.3g}."
    if record.get("unscored"):
        yield f"{record['unscored']:,} neurons were not scored: too few prompts were routed to their experts."


def _frozen(path: Path) -> Iterator[str]:
    record = read_json(path)
    kind = f"freeze = {record['freeze']!r}, ablate = {record['ablate']}"
    yield f"Proof of a training of {record['steps']} steps with {kind}."
    kept = "bit-identical to the start" if record["frozen_identical"] else "NOT identical to the start"
    start = "" if record.get("quantise", "none") == "none" else f" in {record['quantise']}"
    yield f"{record['frozen']:,} frozen neurons, {kept}{start}."
    yield f"All other weights moved by {record['free_change']:.3%} (relative L2)."


def _published(path: Path) -> Iterator[str]:
    record = read_json(path)
    yield f"Published as the state {record['state']} of the run {record['run']!r} by safeneuron {record['safeneuron']}."
    yield f"Trained from {record['base']['name']} (licence: {record['base']['license']}). To make it again:"
    yield from (f"  {command}" for command in record["commands"])


def _pruned(path: Path) -> Iterator[str]:
    record = read_json(path)
    perplexity = f"perplexity of the benign text {record['perplexity']:.4g}"
    yield f"An attack that prunes {record['neurons']:,} neurons; {perplexity}."


def _plan(path: Path) -> Iterator[str]:
    plan = AttackPlan.from_json(read_json(path))
    yield f"The plan of the {len(plan.answered)} attacks on the state, in order, with the neurons that each touches:"
    for attack in plan.attacks:
        same = f", the same as {attack.equal_to}" if attack.equal_to else ""
        yield f"  {attack.set} ({attack.knowledge}): {attack.size:,}{same}"


def _capability(path: Path) -> Iterator[str]:
    record = read_json(path)
    pruned = "with nothing pruned" if path.absolute().parent.name == "ORI" else "with its safety neurons pruned"
    score = f"{record['value']:.1%} ± {record['stderr']:.1%} ({record['metric']})"
    yield f"A capability benchmark, {record['task']}, {pruned}: {score} on {record['n']:,} questions."
    yield f"{record['shots']} examples before each question; questions from: {record['source']}."


def _warnings(path: Path) -> Iterator[str]:
    warnings = read_json(path)["warnings"]
    yield f"{len(warnings)} warnings about the data{':' if warnings else '.'}"
    yield from (f"  {warning}" for warning in warnings)


def _csv(path: Path) -> Iterator[str]:
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines(keepends=True)))
    yield f"A table of the report: {len(rows) - 1} rows with the columns {', '.join(rows[0])}."


def _training(path: Path) -> Iterator[str]:
    log = read_lines(path)
    first, last = log[0]["loss"], log[-1]["loss"]
    yield f"The log of {len(log)} training steps: loss {first:.4f} at the first, {last:.4f} at the last."


def _pairs(path: Path) -> Iterator[str]:
    counts = Counter(record["source"] for record in read_lines(path))
    sources = ", ".join(f"{count} {name}" for name, count in counts.items())
    yield f"{sum(counts.values())} preference pairs: {sources}."
    yield "They may hold harmful answers of the model: keep them in the run's folder."


def _counts(path: Path) -> Iterator[str]:
    record = read_json(path)
    kind = "ASR" if path.name == "harmful.json" else "over-refusal"
    verdicts = ("refused", "complied", "harmless", "incoherent", "cannot say")
    found = ", ".join(f"{record[name]} {name}" for name in verdicts)
    yield f"Verdicts on {record['n']} answers: {found}."
    yield f"{kind} {record['rate']:.1%}, 95 % interval {record['low']:.1%} to {record['high']:.1%}."


def _lines(path: Path) -> Iterator[str]:
    records = read_lines(path)
    if records and "verdict" in records[0]:
        counts = Counter(record["verdict"] for record in records)
        yield "Verdicts: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + "."
    elif records and ("response" in records[0] or "answer" in records[0]):
        yield f"{len(records)} answers of an attacked model. They may be harmful: keep them in the run's folder."
    else:
        yield f"{len(records)} records with the fields {', '.join(records[0]) if records else '(none)'}."
