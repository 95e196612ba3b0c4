"""Rows of a file or a Hub dataset, each with its place there, so that every complaint about a row can name it.

``data`` makes prompts of these rows and ``pairs`` makes preference pairs of them; nothing here knows either.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from safeneuron.errors import InputError, did_you_mean

Message = dict[str, str]
"""One turn of a conversation: ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True)
class Source:
    """Where prompts or pairs come from; an empty field means: all of it, or found without being told."""

    path: str
    """``FILE.jsonl``, ``FILE.csv``, ``hub:owner/name``, ``hub:owner/name/config``, ``twins:unsafe``, ``twins:safe``, or
    a name of ``catalogue``."""
    split: str = ""
    """Hub: the split to load (``train`` if empty). Twins: ``discovery``, ``training`` or ``test``. Files have none."""
    column: str = ""
    """The column that holds the prompt."""
    count: int | None = None
    """Keep only the first so many."""
    every: int = 1
    """Of prompts: keep every so-many-th row, from the first on, before they are counted."""
    revision: str = ""
    """Hub only: a branch, a tag or a commit."""
    where: str = ""
    """Of prompts: keep the rows that have this value in this column, as in ``label = safe``."""
    category: str = ""
    """Of prompts: the category of all of them, in place of their own."""
    as_image: bool = False
    """Of prompts: each is drawn as an image (``drawing``)."""
    said: str = ""
    """Of prompts with an image: what is written beside it; for a folder of images, what is asked about each."""


LOADING: dict[str, dict[str, Any]] = {
    "Anthropic/hh-rlhf/harmless-base": {"data_dir": "harmless-base"},
    "allenai/wildjailbreak/train": {"name": "train", "delimiter": "\t", "keep_default_na": False},
}
"""Hub datasets that are not loaded by the name of a configuration alone, and how their pages say to load them."""

GATED = (
    "allenai/wildjailbreak",
    "sorry-bench/sorry-bench-202503",
    "walledai/AdvBench",
    "walledai/HarmBench",
    "walledai/StrongREJECT",
)
"""Hub datasets that are given only to users who have accepted their terms."""


class Row(NamedTuple):
    """One record of a source."""

    where: str
    """Its place: ``FILE line 3`` (of a CSV record of several lines: the last) or ``hub:owner/name row 3`` (from 0)."""
    values: dict[str, Any]
    mendable: bool
    """Whether the user can edit the row: a row of a file can be put right, a row of a Hub dataset cannot."""


class EmptyTextError(InputError):
    """A text that must say something is empty; readers skip rows of Hub datasets for it."""


def as_source(
    source: str | Path | Source, split: str = "", column: str = "", count: int | None = None, revision: str = ""
) -> Source:
    """Return ``source`` as a Source in which every given argument wins.

    Args:
        source: A path, a name, or a Source.
        split: The split, if not the source's own.
        column: The column that holds the prompt.
        count: How many rows are kept, the first ones.
        revision: Of the Hub: a branch, a tag or a commit.

    Returns:
        The completed source.

    Raises:
        InputError: For a count below 1.
    """
    source = source if isinstance(source, Source) else Source(str(source))
    source = replace(
        source,
        split=split or source.split,
        column=column or source.column,
        count=source.count if count is None else count,
        revision=revision or source.revision,
    )
    if source.count is not None and source.count < 1:
        raise InputError(f"count must be at least 1 for {source.path}, found {source.count}; leave it out to read all")
    return source


def read_rows(source: Source) -> Iterator[Row]:
    """Return the rows of a file or a Hub dataset, at least one.

    Args:
        source: What to read; its split and revision are for the Hub alone.

    Returns:
        The rows, one after the other, each with its place.

    Raises:
        InputError: For what cannot be read, is empty or malformed; it names place and mistake.
    """
    if source.path.startswith("hub:"):
        return _at_least_one(_hub_rows(source), source.path)
    refuse_options(source, "is a file", {"split": source.split, "revision": source.revision})
    path = Path(source.path).expanduser()
    content = _read_bytes(path)
    if path.suffix.lower() == ".jsonl":
        return _at_least_one(_jsonl_rows(content, str(path)), str(path))
    if path.suffix.lower() == ".csv":
        return _at_least_one(_csv_rows(content, str(path)), str(path))
    raise InputError(f"{path} is neither a .jsonl nor a .csv file; convert it to one of them")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; blank lines do not count. Raises InputError with file and line number."""
    rows = _jsonl_rows(_read_bytes(Path(path).expanduser()), str(path))
    return [row.values for row in _at_least_one(rows, str(path))]


def refuse_options(source: Source, kind: str, options: dict[str, str]) -> None:
    """Raise InputError when an option is set that has no meaning for this kind of source, rather than ignore it."""
    for name, value in options.items():
        if value:
            raise InputError(f"{source.path} {kind}, for which '{name}' has no meaning, found '{value}'; leave it out")


def value_at(row: Row, column: str) -> Any:
    """Return what stands in a column.

    Args:
        row: The row.
        column: The column's name.

    Returns:
        The value as it was read.

    Raises:
        InputError: When the row has no such column.
    """
    if column not in row.values:
        hint = did_you_mean(column, row.values)
        raise InputError(f"{row.where}: there is no column '{column}'{hint}, found: {', '.join(row.values)}")
    return row.values[column]


def text_at(row: Row, column: str) -> str:
    """Return the text in a column.

    Args:
        row: The row.
        column: The column's name.

    Returns:
        The text, unchanged.

    Raises:
        EmptyTextError: When there is none.
        InputError: When it is something else, or the column is not there.
    """
    value = value_at(row, column)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{row.where}: '{column}' must be text, found {shortened(repr(value))}")
    return checked_text(row, column, value or "")


def messages_at(row: Row, column: str) -> tuple[Message, ...]:
    """Return the conversation in a column, roles and contents only. Raises InputError when it is not one."""
    messages = value_at(row, column)
    if not isinstance(messages, list):
        raise InputError(f"{row.where}: '{column}' must be a list of messages, found {shortened(repr(messages))}")
    for message in messages:
        parts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            found = shortened(repr(message))
            raise InputError(f"{row.where}: a message in '{column}' needs the texts role and content, found {found}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def checked_text(row: Row, column: str, text: str) -> str:
    """Return ``text`` unchanged. Raises EmptyTextError when it is empty or only space."""
    if not text.strip():
        raise EmptyTextError(f"{row.where}: '{column}' is empty; fill it in or remove the row")
    return text


def shortened(text: str, length: int = 60) -> str:
    """Return ``text`` on one line and no longer than ``length`` characters, for quoting in a message."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _at_least_one(rows: Iterator[Row], name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise InputError(f"{name} is empty; it must hold at least one row")
    return chain([first], rows)


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a .jsonl or .csv file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        hint = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        forms = "a source is FILE.jsonl, FILE.csv, hub:owner/name, twins:unsafe or twins:safe"
        raise InputError(f"{path} does not exist{hint}; {forms}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _lines(content: bytes, name: str) -> Iterator[str]:
    """Yield the lines with their ends; they are decoded one by one so that a bad byte can be placed."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{name} line {number}"
            raise InputError(f"{where}: the text is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _jsonl_rows(content: bytes, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(content, name), start=1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected one JSON object, but the line is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected a JSON object with named columns, found {shortened(repr(values))}")
        yield Row(where, values, mendable=True)


def _csv_rows(content: bytes, name: str) -> Iterator[Row]:
    reader = csv.DictReader(_lines(content, name), strict=True)
    try:
        for values in reader:
            where = f"{name} line {reader.line_num}"
            # DictReader keeps the cells beyond the last column under None.
            surplus = values.pop(None, None)
            if surplus is not None:
                columns = len(reader.fieldnames or ())
                raise InputError(f"{where}: more cells than the {columns} columns; put texts with commas in quotes")
            yield Row(where, values, mendable=True)
    except csv.Error as error:
        # An open quote runs to the end of the file, so the place to look at is where the record begins.
        raise InputError(f"{name} after line {reader.line_num}: the record is not CSV ({error})") from error


def _hub_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of a Hub dataset; a folder of its name in the working directory goes first, as in ``datasets``."""
    # The library takes seconds to import, and only users of Hub datasets should wait for it.
    import datasets  # type: ignore[import-untyped, unused-ignore]

    parts = source.path.removeprefix("hub:").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"expected hub:owner/name or hub:owner/name/config, found {source.path}")
    options = LOADING.get("/".join(parts), {"name": parts[2] if len(parts) == 3 else None})
    try:
        dataset: Iterable[dict[str, Any]] = datasets.load_dataset(
            "/".join(parts[:2]), split=source.split or "train", revision=source.revision or None, **options
        )
    # What datasets 5 raises: its own errors, OSError (offline, missing, gated, HTTP), ValueError (split, configuration,
    # malformed name) and RuntimeError (datasets that need a script).
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause = shortened(str(error) or type(error).__name__, 300).rstrip(".")
        name = "/".join(parts[:2])
        page = f"https://huggingface.co/datasets/{name}"
        access = f"; it is gated: accept its terms on {page}, then log in with `hf auth login`" if name in GATED else ""
        raise InputError(f"{source.path} cannot be loaded: {cause}{access}") from error
    for number, values in enumerate(_undecoded(dataset)):
        yield Row(f"{source.path} row {number}", values, mendable=False)


def _undecoded(dataset: Any) -> Any:
    """The data set with its images as the bytes of their files: decoded, a thousand of them would fill the memory."""
    import datasets

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset
