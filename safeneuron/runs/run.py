"""Files that are whole or absent, and the run directory, whose stages know when they are done and from what.

Where several processes work together, they see one folder: the first of them writes for all, and on the others the
functions that write do nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.runtime.files import FILE_SCHEMA, discard, key_of, read_json, sha256_of, write_json, writing

DONE = "done.json"
STARTED = "started.json"


@dataclass(frozen=True)
class Stage:
    """One folder of a run: what it was made with (``settings``) and from (``inputs``: stage name -> its key)."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """The identity of the stage's results: a hash of its settings and of its inputs' keys."""
        return key_of({"settings": self.settings, "inputs": self.inputs})

    @property
    def done(self) -> bool:
        """Whether the stage has finished with these settings.

        Raises ``InputError`` naming the changed field if its work was made with other settings.
        """
        self.require_same_settings()
        return (self.folder / DONE).exists()

    def require_same_settings(self) -> None:
        """Raise ``InputError`` naming the changed field if the work in the folder was made with other settings."""
        finished = (self.folder / DONE).exists()
        begun = not finished and (self.folder / STARTED).exists()
        # A stage that stopped before it wrote anything, say at a missing file, can begin with other settings.
        if finished or (begun and any(path.name != STARTED for path in self.folder.iterdir())):
            record = read_json(self.folder / (DONE if finished else STARTED))
            if record.get("key") != self.key:
                raise InputError(self._difference(record))

    def start(self) -> None:
        """Create the folder and note the settings, so that unfinished work is only continued with the same ones."""
        write_json(self.folder / STARTED, self._record())

    def finish(self, seconds: float, peak_memory_mb: float) -> None:
        """Write ``done.json`` last, by rename: from here on the stage is skipped."""
        outputs = {
            str(path.relative_to(self.folder)): sha256_of(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name not in (DONE, STARTED)
        }
        record = {"outputs": outputs, "seconds": round(seconds, 2), "peak_memory_mb": round(peak_memory_mb)}
        write_json(self.folder / DONE, {**self._record(), **record})
        (self.folder / STARTED).unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        return {
            "schema": FILE_SCHEMA,
            "stage": self.name,
            "key": self.key,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }

    def _difference(self, record: Mapping[str, Any]) -> str:
        changed = [
            f"{name} was {old!r} and is now {new!r}"
            for name, old, new in _changes(record.get("settings"), json.loads(json.dumps(dict(self.settings))))
        ] or [f"its input {name} changed" for name, _, _ in _changes(record.get("inputs"), dict(self.inputs))]
        return (
            f"{self.folder} was made with other settings: {'; '.join(changed)}; "
            f"make it again with --redo {self.name}, or keep both with --out and another folder"
        )


def _changes(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by dotted name, in which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield prefix, old, new


class Run:
    """A run directory: one folder a model state (T0, T1, ...), in each one folder a stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def create(folder: Path) -> Run:
        """Open the run in ``folder``, making it first if it is new."""
        if not distributed.is_main():
            return Run(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            names = [path.name for path in folder.iterdir() if path.suffix != ".part"]
        if names and "run.json" not in names:
            raise InputError(f"{folder} holds files but no run; give an empty or new folder with --out")
        if not names:
            write_json(folder / "run.json", {"schema": FILE_SCHEMA, "kind": "run"})
        return Run(folder)

    @staticmethod
    def open(folder: Path) -> Run:
        """The run in an existing folder; ``InputError`` if there is none."""
        if not (folder / "run.json").is_file() or not (folder / "config.toml").is_file():
            raise InputError(
                f"{folder} is not the folder of a run (it has no run.json and config.toml); start a run with: "
                "safeneuron run CONFIG.toml"
            )
        return Run(folder)

    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
        """The stage in the folder ``name``, for example ``T0/measure``."""
        return Stage(name, self.folder / name, settings, inputs)

    def remove(self, name: str) -> None:
        """Delete a stage's folder, all of it at once, so that an interruption cannot leave a part that looks whole."""
        if distributed.is_main():
            with writing(self.folder / name):
                discard(self.folder / name)

    def log(self, line: str) -> None:
        """Append one line to the run's log."""
        path = self.folder / "log.txt"
        if distributed.is_main():
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process and those that work with it; clear away what a killed one left half-written.

        Raises ``InputError`` if another process is working on it.
        """
        if not distributed.is_main():
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        with writing(self.folder / ".lock"):
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise InputError(
                    f"another process is working on {self.folder}; wait for it, or stop it, then give the command again"
                ) from error
        try:
            with writing(self.folder):
                for leftover in list(self.folder.rglob(".*.part")):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()
