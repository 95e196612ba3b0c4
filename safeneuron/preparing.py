"""Before a run goes on: are its finished stages still what the config asks for, and which are to be made again?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeneuron.config import Config, to_toml
from safeneuron.errors import InputError, nearest
from safeneuron.pipeline import Pipeline, Watcher
from safeneuron.runs import Run, read_json, write_text
from safeneuron.states import State


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
            raise InputError(f"--redo {wanted}: the run has no such stage{nearest(wanted, present)}; it has {known}")
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
