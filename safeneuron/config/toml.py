"""Configs as TOML: the bundled presets, reading with changes from the command line, writing back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from safeneuron.config.schema import Config, sentence_of
from safeneuron.errors import InputError, did_you_mean


def presets() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(Path(str(path)).stem for path in _folder().iterdir() if str(path).endswith(".toml"))


def read_config(name: str | Path, changes: Sequence[str] = ()) -> Config:
    """The config in a TOML file, or the bundled one of that name, with ``table.key=value`` changes applied.

    Args:
        name: The path of a file, which goes before a bundled config of its name.
        changes: ``table.key=value``, the value as TOML or as plain text; the last one wins.

    Raises:
        InputError: For a missing or malformed file, an unknown key (with the nearest known one) or a value out of
            range.
    """
    path = Path(name)
    if str(name) in presets() and not path.is_file():
        text = (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"the config {str(name)!r} cannot be read ({error.strerror}); expected a TOML file or one of the "
                f"bundled configs {', '.join(presets())}{did_you_mean(str(name), presets())}"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"the config {str(name)!r} is not UTF-8 text; save it as UTF-8") from error
    return parse_config(text, str(name), changes)


def parse_config(text: str, origin: str, changes: Sequence[str] = ()) -> Config:
    """The config in a TOML text.

    Args:
        text: The TOML.
        origin: Names it in errors.
        changes: As in ``read_config``.

    Raises:
        InputError: As ``read_config`` does.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{origin} is not valid TOML: {error}; correct that line") from error
    for change in changes:
        _apply(values, change)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(sentence_of(error, origin)) from error


def to_toml(config: Config, comments: bool = True) -> str:
    """The complete config as TOML, each key with its meaning in a comment; keys without a value are commented out.

    Args:
        config: What is written.
        comments: Whether the meanings are.
    """
    lines = list(_table_lines(config, "", comments))
    return "\n".join(lines).strip() + "\n"


def _folder() -> Any:
    return files("safeneuron.config") / "presets"


def _apply(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--set expects table.key=value, for example align.rounds=2, but found {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = name.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {change!r}: {table!r} is a value, not a table")
    values[key] = value


def _table_lines(table: BaseModel, prefix: str, comments: bool) -> Iterator[str]:
    deeper: list[tuple[str, Any, str]] = []
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel) or name == "variants":
            deeper.append((name, value, field.description or ""))
            continue
        if comments:
            yield f"# {field.description}"
        yield f"{name} = {_value(value)}" if value is not None else f"# {name} ="
    for name, value, description in deeper:
        full = f"{prefix}{name}"
        yield ""
        if comments:
            yield f"# {description}"
        if isinstance(value, BaseModel):
            yield f"[{full}]"
            yield from _table_lines(value, f"{full}.", comments)
        else:
            for key, changes in value.items():
                yield f"[{full}.{key}]"
                yield from (f"{changed} = {_value(to)}" for changed, to in changes.items())
                yield ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # The escapes of JSON are those of TOML, but for one character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(name)} = {_value(item)}" for name, item in value.items()) + " }"
    if isinstance(value, BaseModel):
        items = value.model_dump().items()
        given = {name: item for name, item in items if item not in ("", None) and item is not False}
        return "{ " + ", ".join(f"{name} = {_value(item)}" for name, item in given.items()) + " }"
    return "[" + ", ".join(_value(item) for item in value) + "]"
