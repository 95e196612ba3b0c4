"""Files that are whole or absent, and the run directory, whose stages know when they are done and from what.

Where several processes work together, they see one folder: the first of them writes for all, and on the others the
functions that write do nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron import ranks
from safeneuron.errors import InputError

SCHEMA = 1
DONE = "done.json"
STARTED = "started.json"
FREE_SPACE = "free some space and give the same command again; finished stages are kept"
FULL_DISK_SIGNS = ("(os error 27)", "(os error 28)", "(os error 122)", "PytorchStreamWriter failed", "unexpected pos")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed over ``path``.

    Raises ``InputError`` when the disk is full or the folder cannot be written.
    """
    if not ranks.is_main():
        return
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with neighbour.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            neighbour.replace(path)
    finally:
        with suppress(OSError):
            neighbour.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new neighbour of ``folder`` to fill within the block, in any process; at its end, it takes the folder's place.

    For libraries that write folders of their own: wherever they are stopped, ``folder`` is whole or absent.
    """
    neighbour = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with writing(folder):
            neighbour.mkdir(parents=True)
            yield neighbour
            _discard(folder)
            neighbour.rename(folder)
    finally:
        shutil.rmtree(neighbour, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while ``path`` is written into one sentence for people; other errors pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if disk_full(error):
            raise InputError(f"{path} cannot be written (the disk is full); {FREE_SPACE}") from error
        if isinstance(error, OSError):
            advice = "choose a folder that you may write to, for example with --out"
            raise InputError(f"{path} cannot be written ({error.strerror or error}); {advice}") from error
        raise


def disk_full(error: Exception) -> bool:
    """Whether the error says that a disk or quota is full, or a file larger than allowed.

    The writers in Rust and C++ of the libraries report it as errors of their own, which their text betrays.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(sign in str(error) for sign in FULL_DISK_SIGNS)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all; keys keep their order. ``InputError`` for a number that is not finite."""
    with _finite(path):
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


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
    write_text(path, _jsonl(records, path))


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSONL stream."""
    text = _jsonl(records, path)
    if ranks.is_main():
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(text)


def kept_lines(path: Path, size: int, total: int) -> int:
    """Cut a JSONL stream that lacks some of its ``total`` records to whole batches of ``size``; what it has now."""
    have = read_lines(path)
    if len(have) < total:
        have = have[: len(have) // size * size]
        write_lines(path, have)
    return len(have)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a JSONL stream; a last line torn by an interruption is left out.

    A missing file has none. Raises ``InputError`` with the number of a line that is not JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); make its stage again with --redo") from error
    return records


def _jsonl(records: Iterable[Mapping[str, Any]], path: Path) -> str:
    with _finite(path):
        return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


@contextmanager
def _finite(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(
            f"{path} would hold a number that is not finite ({error}); the model overflows in its precision, use "
            "model.dtype = 'float32'"
        ) from error


def key_of(value: object) -> str:
    """A short stable hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
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
            "schema": SCHEMA,
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
        if not ranks.is_main():
            return Run(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            found = [path.name for path in folder.iterdir() if path.suffix != ".part"]
        if found and "run.json" not in found:
            raise InputError(f"{folder} holds files but no run; give an empty or new folder with --out")
        if not found:
            write_json(folder / "run.json", {"schema": SCHEMA, "kind": "run"})
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
        if ranks.is_main():
            with writing(self.folder / name):
                _discard(self.folder / name)

    def log(self, line: str) -> None:
        """Append one line to the run's log."""
        path = self.folder / "log.txt"
        if ranks.is_main():
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process and those that work with it; clear away what a killed one left half-written.

        Raises ``InputError`` if another process is working on it.
        """
        if not ranks.is_main():
            yield
            return
        # The lock's file stays: if it were deleted, two processes could hold locks on two files of this name.
        path = self.folder / ".lock"
        with writing(path):
            file = path.open("a")
        with closing(file):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is working on {self.folder}; wait for it, or stop it, then give the command again"
                ) from error
            with writing(self.folder):
                for leftover in list(self.folder.rglob(".*.part")):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in such a block for the same path."""
    lock = path.with_name(f".{path.name}.lock")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    with closing(file):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _discard(folder: Path) -> None:
    """Delete a folder that may be missing: first renamed, so that it goes at once, then bit by bit."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.part")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed)
