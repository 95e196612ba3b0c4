"""Files that are whole or absent, and the run directory: stages that know when they are done and what they came from."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safeneuron.errors import InputError

SCHEMA = 1
DONE = "done.json"
STARTED = "started.json"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed over ``path``.

    Raises ``InputError`` when the disk is full or the folder cannot be written.
    """
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(neighbour, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True) if path.parent.is_dir() else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while ``path`` is written into one sentence for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space and give the same command again; finished stages are kept"
        else:
            advice = "choose a folder that you may write to, for example with --out"
        raise InputError(f"{path} cannot be written ({error.strerror or error}); {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all; keys keep their order, NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ``InputError`` if it is missing, malformed, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); it may be damaged, write it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSONL, whole or not at all."""
    write_text(path, "".join(_line(record) for record in records))


def append_lines(file: IO[str], records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Append records to an open JSONL stream and push them to the disk."""
    with writing(path):
        file.write("".join(_line(record) for record in records))
        file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a JSONL stream; a last line torn by an interruption is left out."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.decode().split("\n") if line]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def key_of(value: object) -> str:
    """A short stable hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

        Raises ``InputError`` naming the changed field if it finished, or was begun, with other settings.
        """
        for marker in (DONE, STARTED):
            if (self.folder / marker).exists():
                record = read_json(self.folder / marker)
                if record["key"] != self.key:
                    raise InputError(self._difference(record))
        return (self.folder / DONE).exists()

    def start(self) -> None:
        """Create the folder and note the settings, so that unfinished work is only continued with the same ones."""
        if not (self.folder / STARTED).exists():
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
            "schema": SCHEMA,
            "stage": self.name,
            "key": self.key,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }

    def _difference(self, record: Mapping[str, Any]) -> str:
        changed = [
            f"{name} was {old!r} and is now {new!r}"
            for name, old, new in _changes(record["settings"], json.loads(json.dumps(dict(self.settings))))
        ] or [f"its input {name} changed" for name in self.inputs if record["inputs"].get(name) != self.inputs[name]]
        return (
            f"{self.name} in {self.folder.parent} was made with other settings: {'; '.join(changed)}; "
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
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder for the run with --out")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.json").exists():
            raise InputError(f"{folder} holds files but no run; give an empty or new folder with --out")
        if not (folder / "run.json").exists():
            write_json(folder / "run.json", {"schema": SCHEMA, "kind": "run"})
        return Run(folder)

    @staticmethod
    def open(folder: Path) -> Run:
        """The run in an existing folder; ``InputError`` if there is none."""
        if not (folder / "run.json").is_file() or not (folder / "config.toml").is_file():
            raise InputError(f"{folder} is not a run folder (no run.json in it); start one with: safeneuron run CONFIG.toml")
        return Run(folder)

    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
        """The stage in the folder ``name``, for example ``T0/measure``."""
        return Stage(name, self.folder / name, settings, inputs)

    def remove(self, name: str) -> None:
        """Delete a stage's folder; the marker goes first, so that an interruption cannot leave a false "done"."""
        folder = self.folder / name
        (folder / DONE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    def log(self, line: str) -> None:
        """Append one line to the run's log."""
        with writing(self.folder / "log.txt"), open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; ``InputError`` if another process is working on it."""
        path = self.folder / ".lock"
        with writing(path):
            file = open(path, "w")  # noqa: SIM115 - closed below, after the lock is released
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is working on {self.folder}; wait for it, or stop it, then give the command again"
                ) from error
            yield
        finally:
            file.close()
            with suppress(FileNotFoundError):
                path.unlink()
