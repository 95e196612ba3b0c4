"""A trained state of a run as a plain Hugging Face folder: weights, model card, neurons, and a record to repeat it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron._version import __version__
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State
from safeneuron.config.tables import ModelTable
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError, did_you_mean
from safeneuron.models import embedded
from safeneuron.neurons.layout import LINEAGE
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.collect import provenance
from safeneuron.runs.findings import Findings
from safeneuron.runs.hub import Licence, legal_files, licence_in, licence_named, licence_on_hub
from safeneuron.runs.model_card import Base, finished_results, local_files, model_card
from safeneuron.runs.run import DONE, Run
from safeneuron.runtime.files import read_json, sha256_of, whole_folder, write_json, write_text
from safeneuron.runtime.progress import Progress

_SCHEMA = 1
PUBLICATION_RECORD = Path("reproduce") / "record.json"
EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Publication:
    """The folder that was written, its files, their size in bytes, and what deserves attention before it is shared."""

    folder: Path
    files: list[str]
    size: int
    warnings: list[str]


def publish(
    run: Run,
    name: str,
    out: Path | None = None,
    hub: str = "",
    licence: str = "",
    base: str = "",
    progress: Progress | None = None,
) -> Publication:
    """Write the state ``name`` of a run into ``out`` (``RUN/publish/STATE`` if not given), whole or not at all.

    The weights are those of the training, checked against its record and linked rather than copied where the disk
    allows. ``hub`` is the name under which the card says that the model can be found, ``licence`` the base model's, if
    it cannot be found out, and ``base`` the base model's name on the Hub, if the run read it from a folder.
    Raises ``InputError`` for a state that is not there, not trained, or whose neurons have not been found; for weights
    that are not those of the training; and for a folder that holds something else.
    """
    config = read_config(run.folder / "config.toml")
    state = trained_state(config, run, name)
    target = _target(out or run.folder / "publish" / state.name)
    model = run.folder / state.name / "align" / "model"
    hashes = checked_files(run, state, progress)
    neurons, frozen = _neurons(config, run, state)
    origin = base_of(config.model, base, licence)
    commands = commands_of(config, state, base, licence)
    with whole_folder(target) as here:
        for file in hashes:
            _place(model / file, here / file)
        for legal in legal_files(Path(config.model.name)) if Path(config.model.name).is_dir() else []:
            shutil.copyfile(legal, here / legal.name)
        neurons.save(here / "neurons.json")
        if frozen is not None:
            frozen.save(here / "frozen_neurons.json")
        write_text(here / "README.md", model_card(config, run, state, origin, commands, hub))
        (here / PUBLICATION_RECORD).parent.mkdir()
        shutil.copyfile(run.folder / "config.toml", here / PUBLICATION_RECORD.parent / "config.toml")
        write_json(here / PUBLICATION_RECORD, record(config, run, state, origin, commands, hashes))
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    size = sum((target / file).stat().st_size for file in files)
    return Publication(target, files, size, warnings_of(config, run, state, origin))


def trained_state(config: Config, run: Run, name: str) -> State:
    """The state of that name, which has been trained and whose neurons have been found; else ``InputError``."""
    findings = Findings(config, run)
    trained = {state.name: state for state in findings.states() if state != BASE}
    if not trained:
        raise InputError(
            f"{run.folder} trains nothing (an audit), so it has no state to publish; run a config that does"
        )
    if name == BASE.name:
        raise InputError(
            f"{name} is the base model as it was given, of which there is nothing new to publish; give one of "
            f"{', '.join(trained)} with --state"
        )
    if name not in trained:
        raise InputError(
            f"{run.folder} has no state {name!r}{did_you_mean(name, trained)}; it has {', '.join(trained)}"
        )
    state = trained[name]
    if not (run.folder / name / "align" / DONE).exists():
        ready = all((run.folder / one.name / "select" / DONE).exists() for one in findings.chain(state))
        command = ["align", str(run.folder)] if ready else _whole_run(run)
        raise InputError(f"{name} has not been trained yet; do it first with: {shlex.join(['safeneuron', *command])}")
    if not (run.folder / name / "select" / DONE).exists():
        measured = (run.folder / name / "measure" / DONE).exists()
        verbs = ["select"] if measured else ["measure", "select"]
        commands = " && ".join(shlex.join(["safeneuron", verb, str(run.folder)]) for verb in verbs)
        raise InputError(f"the safety neurons of {name} have not been found yet; do it first with: {commands}")
    return state


def checked_files(run: Run, state: State, progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of every file of the state's model, by its name in the model's folder.

    Raises ``InputError`` for one that is missing, or is not what the training wrote.
    """
    folder = run.folder / state.name / "align"
    again = shlex.join(["safeneuron", "align", str(run.folder), "--redo", f"{state.name}/align"])
    written = {
        name.removeprefix("model/"): digest
        for name, digest in read_json(folder / DONE)["outputs"].items()
        if name.startswith("model/")
    }
    for number, (name, digest) in enumerate(written.items(), start=1):
        path = folder / "model" / name
        try:
            found = sha256_of(path)
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing, so {state.name} cannot be published; train again: {again}") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        if found != digest:
            raise InputError(f"{path} has changed since it was written by the training; train again with: {again}")
        if progress is not None:
            progress(number, len(written))
    if "config.json" not in written or not any(name.endswith(".safetensors") for name in written):
        raise InputError(f"{folder / 'model'} holds no model with safetensors weights; train again with: {again}")
    return written


def base_of(table: ModelTable, base: str = "", licence: str = "") -> Base:
    """The model that a run begins with; ``base`` and ``licence`` win over what can be found out."""
    if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise InputError(f"--base expects the base model's name on the Hub, OWNER/NAME, but found {base!r}")
    chosen = licence_named(licence) if licence else None
    folder = Path(table.name)
    if table.name == embedded.NAME:
        return Base(embedded.LABEL, base or EMBEDDED_HUB, chosen or Licence("apache-2.0"))
    if folder.is_dir():
        return Base(base or folder.resolve().name, base, chosen or licence_in(folder))
    return Base(base or table.name, base or table.name, chosen or licence_on_hub(table.name, table.revision))


def commands_of(config: Config, state: State, base: str = "", licence: str = "") -> list[str]:
    """The commands that make this folder again, given in a copy of it."""
    folder = f"runs/{config.name}"
    options = [*(("--base", base) if base else ()), *(("--license", licence) if licence else ())]
    return [
        shlex.join(["safeneuron", "run", "reproduce/config.toml", "--out", folder]),
        shlex.join(["safeneuron", "publish", folder, "--state", state.name, *options]),
    ]


def record(
    config: Config, run: Run, state: State, base: Base, commands: list[str], hashes: dict[str, str]
) -> dict[str, Any]:
    """Everything beside the config that is needed to repeat the training, and to see whether that succeeded."""
    made = provenance(config, run)
    stages = {done["stage"]: done for path in run.folder.rglob(DONE) if (done := read_json(path))}
    files = {name: done["settings"]["files"] for name, done in stages.items() if "files" in done["settings"]}
    return {
        "schema": _SCHEMA,
        "kind": "publication",
        "safeneuron": __version__,
        "created": made.created,
        "run": config.name,
        "state": state.name,
        "seed": config.seed,
        "base": {
            "name": base.label,
            "hub": base.hub,
            "revision": config.model.revision,
            "license": base.licence.id,
        },
        "fingerprint": Findings(config, run).neurons(state).fingerprint,
        "versions_when_published": made.versions,
        "commands": commands,
        "model_sha256": hashes,
        "training": read_json(run.folder / state.name / "align" / "frozen.json"),
        "stage_keys": {name: stages[name]["key"] for name in sorted(stages)},
        "source_sha256": {name: _flat(found) for name, found in files.items()},
    }


def warnings_of(config: Config, run: Run, state: State, base: Base) -> list[str]:
    """What the user should know before anybody else sees the folder."""
    found = []
    if not base.licence.known:
        found.append(
            f"the licence of {base.label} is unknown, and the card says so; find it, and give it with --license"
        )
    if finished_results(run, state) is None:
        report = shlex.join(["safeneuron", *_whole_run(run)])
        found.append(
            f"the run has no report that knows {state.name}, so the card has no results; make it with: {report}"
        )
    if local := local_files(config):
        found.append(
            f"reproduce/config.toml names {len(local)} places of this machine (first: {local[0]}); look at it before "
            "you share the folder"
        )
    return found


def _target(folder: Path) -> Path:
    """The folder to write, which is new, empty, or one that was published before."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PUBLICATION_RECORD).is_file():
        raise InputError(f"{folder} holds files that were not published by safeneuron; give a new folder with --out")
    return folder


def _neurons(config: Config, run: Run, state: State) -> tuple[NeuronSet, NeuronSet | None]:
    """The set found on the state, and the one that was frozen in its training; both fit its model."""
    findings, align = Findings(config, run), run.folder / state.name / "align"
    own = findings.neurons(state)
    frozen = findings.frozen(config.variant(state.variant), findings.safety_neurons(findings.chain(state)))
    lineage = read_json(align / "model" / "config.json").get(LINEAGE)
    recorded = read_json(align / "frozen.json")["frozen"]
    count = len(frozen) if frozen is not None else 0
    if own.fingerprint != lineage or count != recorded:
        raise InputError(
            f"the neurons in {run.folder} are not those of the model in {align}: expected fingerprint {lineage} and "
            f"{recorded} frozen, found {own.fingerprint} and {count}; train again with --redo {state.name}/align"
        )
    return own, frozen.labelled("frozen") if frozen is not None else None


def _place(source: Path, target: Path) -> None:
    """Put a file into the published folder; weights, which nobody edits, are linked where the disk allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
        except OSError:
            # Another disk, or one that knows no links; whatever is wrong beside that, copying will say.
            target.unlink(missing_ok=True)
        else:
            return
    shutil.copyfile(source, target)


def _flat(files: dict[str, Any]) -> dict[str, str]:
    """Hashes of source files by their bare names; the stage ``data`` keeps them by role."""
    found: dict[str, str] = {}
    for name, value in files.items():
        found |= _flat(value) if isinstance(value, dict) else {Path(name).name: value}
    return found


def _whole_run(run: Run) -> list[str]:
    return ["run", str(run.folder / "config.toml"), "--out", str(run.folder)]
