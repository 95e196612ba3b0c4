"""Prompts, preference pairs and bundled texts: the nouns, how prompts are read, and what is checked before their use.

Pairs are read and mixed in ``pairs``; the files and Hub datasets behind both are read in ``rows``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path
from typing import Any

from safeneuron.data.catalogue import prompts_by_name
from safeneuron.data.images import images_in, opened
from safeneuron.data.rows import (
    EmptyTextError,
    Row,
    Source,
    as_source,
    checked_text,
    messages_at,
    read_rows,
    refuse_options,
    shortened,
    text_at,
    value_at,
)
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError, did_you_mean

PROMPT_COLUMNS = (
    *("prompt", "question", "instruction", "text", "goal", "behavior", "harmful", "query", "forbidden_prompt"),
    "messages",
)
"""The columns in which a prompt is looked for, best first; upper and lower case are the same."""

CATEGORY_COLUMNS = ("category", "topic", "type")
TWIN_COLUMNS = {"twins:unsafe": "harmful", "twins:safe": "harmless"}
LANGUAGES = ("de",)
"""Some of the twins are bundled in these languages too: ``twins:unsafe-de`` and ``twins:safe-de`` are German."""
TWIN_SPLITS = ("discovery", "training", "test")

SMALL_CLASS = 32
"""With fewer prompts in a class, the means and deviations of its activations are mostly noise."""


@dataclass(frozen=True)
class Refusal:
    """A bundled answer that declines a request; without a category it fits every request."""

    text: str
    category: str = ""


def read_prompts(
    source: str | Path | Source, *, split: str = "", column: str = "", count: int | None = None, revision: str = ""
) -> list[Prompt]:
    """Read the prompts of a source; a keyword that is given wins over the field of a ``Source``.

    A source is a file, ``hub:owner/name``, a name of ``catalogue.PROMPT_SETS``, bundled, or a folder of images, with
    the question about each as ``said``. The prompt is the given column, or the first of ``PROMPT_COLUMNS`` that the
    first row has; of a conversation it is the first user turn. A column ``image`` holds the path of an image, relative
    to the file, and ``said`` what is written beside it, if that is not the prompt.
    ``category`` (or ``topic``, ``type``) and ``id`` are kept. An empty prompt in a file is an error; in a Hub dataset,
    which the user cannot edit, its row is skipped. ``count`` keeps the first so many, or all if there are fewer; a
    ``Source`` may also keep every so-many-th, those ``where`` a column has a value, and give them a category. Raises
    InputError for anything that cannot be read, with file and line number.
    """
    source = prompts_by_name(as_source(source, split, column, count, revision))
    if source.path.startswith("twins:"):
        found = _twins(source)
    elif Path(source.path).expanduser().is_dir():
        found = _image_prompts(source)
    else:
        found = _prompts(_rows_where(read_rows(source), source.where), source)
    prompts = list(islice(islice(found, 0, None, source.every), source.count))
    if not prompts:
        reason = f"no row has {source.where}, or its prompt is empty" if source.where else "every prompt is empty"
        raise InputError(f"{source.path} holds no prompts: {reason}")
    if source.as_image:
        # Drawn here and not for each use, so that what is kept of a run is what the model saw.
        from safeneuron.data.typography import drawn_prompts

        prompts = drawn_prompts(prompts, source.said)
    return [replace(prompt, category=source.category) for prompt in prompts] if source.category else prompts


def check_classes(unsafe: Sequence[Prompt], safe: Sequence[Prompt], least: int = 2) -> list[str]:
    """Return a warning for each small class.

    Args:
        unsafe: The harmful prompts.
        safe: The harmless ones.
        least: How many each must have at least.

    Returns:
        Sentences for the user.

    Raises:
        InputError: For a class with fewer than ``least`` prompts.
    """
    warnings = []
    for name, prompts in (("unsafe", unsafe), ("safe", safe)):
        if len(prompts) < least:
            raise InputError(f"expected at least {least} {name} prompts, found {len(prompts)}; add {name} prompts")
        if len(prompts) < SMALL_CLASS:
            warnings.append(f"only {len(prompts)} {name} prompts: below {SMALL_CLASS}, chance alone selects neurons")
    return warnings


def check_splits(**named: Sequence[Prompt]) -> list[str]:
    """Return a warning for each list that repeats a prompt and for each two lists that share one.

    Texts are the same when they differ only in case and spacing. A prompt that is both unsafe and safe, or both for
    finding neurons and for testing, makes results look other than they are; only the user knows whether it is meant.
    """
    texts = {name: {prompt.key: prompt.text for prompt in prompts} for name, prompts in named.items()}
    warnings = []
    for position, (name, mine) in enumerate(texts.items()):
        repeats = len(named[name]) - len(mine)
        if repeats:
            warnings.append(f"{repeats} of the {len(named[name])} prompts in '{name}' repeat an earlier one")
        for other, theirs in list(texts.items())[position + 1 :]:
            shared = [text for key, text in mine.items() if key in theirs]
            if shared:
                example = shortened(shared[0])
                warnings.append(f"'{name}' and '{other}' share {len(shared)} prompts, for example '{example}'")
    return warnings


def refusals() -> list[Refusal]:
    """Return the bundled refusals."""
    return list(_bundled_refusals())


def fitting_refusal(prompt: Prompt, seed: int) -> str:
    """Return a refusal that fits the prompt: one of its category or one that fits every request, as the hash decides.

    Where there are both, half of the prompts get each kind, so that answers are to the point but not all of one mould.
    The choice depends on the text and the seed alone, so it is the same on every machine and in every order.
    """
    fitting = [r.text for r in _bundled_refusals() if r.category.casefold() == prompt.category.casefold() != ""]
    general = [r.text for r in _bundled_refusals() if not r.category]
    draw = int.from_bytes(hashlib.sha256(f"{seed}\n{prompt.text}".encode()).digest()[:8], "big")
    pool = fitting if fitting and (draw % 2 or not general) else general
    return pool[draw // 2 % len(pool)]


def benign_text() -> str:
    """Return the bundled ordinary prose."""
    return _bundled("benign_text.txt").read_text("utf-8")


def image_of_row(row: Row, path: str) -> Any:
    """The image in the column ``image`` of a row, ``None`` without one; of a file, relative to the folder it is in.

    Raises InputError for a file that is missing or no image, or a value that names none.
    """
    column = _first_present(row, ("image",))
    value = row.values.get(column) if column else None
    if value is None or value == "":
        return None
    # The library of Hub datasets gives an image as its bytes, or as a path, or as an image of Pillow.
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = str(Path(path).expanduser().parent / Path(value).expanduser())
    elif not isinstance(value, bytes) and not hasattr(value, "getbands"):
        raise InputError(f"{row.where}: 'image' must be the path of an image, found {shortened(repr(value))}")
    opened(value, row.where)
    return value


def read_twins(source: str) -> tuple[list[Prompt], list[Prompt]]:
    """Harmful and harmless prompts of a file with the columns ``harmful`` and ``harmless``, or of a bundled language.

    Args:
        source: A file, or one of ``LANGUAGES``.

    Returns:
        The harmful prompts and the harmless ones, in the same order.

    Raises:
        InputError: For anything else; see ``read_prompts``.
    """
    if source in LANGUAGES:
        unsafe, safe = (read_prompts(f"{name}-{source}") for name in TWIN_COLUMNS)
    else:
        unsafe, safe = (read_prompts(source, column=column) for column in TWIN_COLUMNS.values())
    return unsafe, safe


def _image_prompts(source: Source) -> Iterator[Prompt]:
    """A prompt for each image in a folder, with one question; the name of a subfolder is the category."""
    options = {"split": source.split, "column": source.column, "revision": source.revision, "where": source.where}
    refuse_options(source, "is a folder of images", options)
    if not source.said:
        raise InputError(
            f"{source.path} is a directory; to ask about each image in it, give the question, as in said = 'Describe "
            "the image.', else name a .jsonl or .csv file in it"
        )
    if source.as_image:
        raise InputError(f"{source.path} is a folder of images, so there is no text to draw; leave as_image out")
    root = Path(source.path).expanduser()
    for path in images_in(root):
        opened(path)
        inside = path.relative_to(root)
        yield Prompt(source.said, str(inside.parent) if len(inside.parts) > 1 else "", str(inside), str(path))


def _rows_where(rows: Iterator[Row], condition: str) -> Iterator[Row]:
    """The rows that have the value in the column that a condition such as ``label = safe`` names."""
    if not condition:
        return rows
    column, equals, value = (part.strip() for part in condition.partition("="))
    if not column or not equals:
        raise InputError(f"'where' must name a column and its value, as in 'label = safe', found '{condition}'")
    return (row for row in rows if str(value_at(row, column)) == value)


def _prompts(rows: Iterator[Row], source: Source) -> Iterator[Prompt]:
    column = source.column
    for row in rows:
        # The first row decides which column it is, also when that row itself is then skipped.
        column = column or _prompt_column(row)
        try:
            text = _request(row, column)
        except EmptyTextError:
            if row.mendable:
                raise
            continue
        image = image_of_row(row, source.path)
        said = (source.said or _label(row, "said")) if image is not None else ""
        yield Prompt(text, _label(row, _first_present(row, CATEGORY_COLUMNS)), _label(row, "id"), image, said)


def _prompt_column(row: Row) -> str:
    column = _first_present(row, PROMPT_COLUMNS)
    if not column:
        raise InputError(
            f"{row.where}: none of the columns {', '.join(row.values)} is known to hold prompts; name it as 'column', "
            f"or rename it to one of: {', '.join(PROMPT_COLUMNS)}"
        )
    return column


def _first_present(row: Row, names: Sequence[str]) -> str:
    """Return the row's own spelling of the first of ``names`` that it has, or nothing."""
    spelling = {name.casefold(): name for name in row.values}
    return next((spelling[name] for name in names if name in spelling), "")


def _request(row: Row, column: str) -> str:
    value = value_at(row, column)
    if not isinstance(value, list):
        return text_at(row, column)
    if value and all(isinstance(turn, str) for turn in value):
        return checked_text(row, column, value[0])
    turns = [message["content"] for message in messages_at(row, column) if message["role"] == "user"]
    return checked_text(row, column, turns[0] if turns else "")


def _label(row: Row, column: str) -> str:
    """Return a category or id as text; datasets also number them, and some put tables there, which are no label."""
    value = row.values.get(column, "")
    return str(value) if isinstance(value, str | int) else ""


def _twins(source: Source) -> Iterator[Prompt]:
    name, _, language = source.path.partition("-")
    if name not in TWIN_COLUMNS or ("-" in source.path and language not in LANGUAGES):
        known = [f"{name}{end}" for end in ("", *(f"-{one}" for one in LANGUAGES)) for name in TWIN_COLUMNS]
        hint = did_you_mean(source.path, known)
        raise InputError(f"expected one of {', '.join(known)} for the bundled prompts, found '{source.path}'{hint}")
    refuse_options(source, "is bundled", {"column": source.column, "revision": source.revision, "where": source.where})
    if source.split and source.split not in TWIN_SPLITS:
        hint = did_you_mean(source.split, TWIN_SPLITS)
        raise InputError(f"{source.path} has the splits {', '.join(TWIN_SPLITS)}, found '{source.split}'{hint}")
    for values in _bundled_records(f"twins-{language}.jsonl" if language else "twins.jsonl"):
        if source.split in ("", values["split"]):
            yield Prompt(values[TWIN_COLUMNS[name]], values["category"], values["id"])


@cache
def _bundled_refusals() -> tuple[Refusal, ...]:
    return tuple(Refusal(values["text"], values["category"]) for values in _bundled_records("refusals.jsonl"))


def _bundled_records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in _bundled(name).read_text("utf-8").rstrip("\n").split("\n")]


def _bundled(name: str) -> Traversable:
    return files("safeneuron.data") / "bundled" / name
