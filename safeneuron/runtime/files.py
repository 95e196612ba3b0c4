"""Files that are whole or absent, their digests, and locks on folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safeneuron.errors import InputError
from safeneuron.runtime import distributed

FILE_SCHEMA = 1
FREE_SPACE = "free some space and give the same command again; finished stages are kept"
FULL_DISK_SIGNS = ("(os error 27)", "(os error 28)", "(os error 122)", "PytorchStreamWriter failed", "unexpected pos")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed over ``path``.

    Raises ``InputError`` when the disk is full or the folder cannot be written.
    """
    if not distributed.is_main():
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
            discard(folder)
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
    if distributed.is_main():
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


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in such a block for the same path."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with writing(Path(lock.lock_file)):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def discard(folder: Path) -> None:
    """Delete a folder that may be missing: first renamed, so that it goes at once, then bit by bit."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.part")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed)
