"""What every part's record has in common: to the JSON of a run folder and back, and the rows of its CSV tables.

The dataclasses themselves stand beside the code that fills them, one record a part. Within Python an undefined number
is NaN; in JSON, which has no NaN, it is null; in CSV it is empty.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from safeneuron.errors import InputError

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that is NaN where it is undefined, as null in JSON is read."""
TableRow = dict[str, Any]
"""One row of a CSV table, by the names of its columns."""


@dataclass(frozen=True)
class JsonRecord:
    """Numbers with names that are written as one JSON object and read back."""

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON.

        Returns:
            The fields in their order, nested records as objects, NaN as None.
        """
        record: dict[str, Any] = finite(asdict(self))
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The record that ``to_json`` wrote.

        Args:
            record: The JSON object; keys that this version does not know are left out.

        Raises:
            InputError: If a key is missing or holds something else.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(record))
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise InputError(
                f"numbers of the analysis do not fit this version at {place} ({fault['msg']}); make the part again "
                "with --redo"
            ) from error


@dataclass(frozen=True)
class PartRecord(JsonRecord, ABC):
    """All numbers of one part of the analysis: what ``numbers.json`` holds."""

    @abstractmethod
    def tables(self) -> dict[str, list[TableRow]]:
        """The CSV tables of the part.

        Returns:
            The rows of each table by its name, which is that of its file.
        """


def rows_of(records: Iterable[Any]) -> list[TableRow]:
    """Each dataclass as a row, with a column a field."""
    return [asdict(record) for record in records]


def flat(record: TableRow) -> TableRow:
    """A record as one row: a column of a nested record has the name of its field in front."""
    row: TableRow = {}
    for key, value in record.items():
        row |= {f"{key}_{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return row


def finite(value: Any) -> Any:
    """The same with None for NaN, which JSON cannot hold."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
