"""Records go to JSON and come back; what is undefined is NaN in Python and null in JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from safeneuron.analysis.records import JsonRecord, Number, finite, flat, rows_of
from safeneuron.errors import InputError


@dataclass(frozen=True)
class Inner:
    mean: Number
    count: int | None


@dataclass(frozen=True)
class Outer(JsonRecord):
    name: str
    values: list[Number]
    inner: list[Inner]
    by_name: dict[str, Inner] | None = None


RECORD = Outer("x", [1.5, math.nan], [Inner(math.nan, None), Inner(0.25, 3)], {"a": Inner(1.0, 1)})


def test_json_has_null_where_a_number_is_undefined():
    text = json.dumps(RECORD.to_json(), allow_nan=False)
    assert json.loads(text)["values"] == [1.5, None]
    assert json.loads(text)["inner"][0] == {"mean": None, "count": None}


def test_what_is_read_back_is_typed():
    again = Outer.from_json(json.loads(json.dumps(RECORD.to_json())))
    assert again.inner[1] == Inner(0.25, 3)
    assert again.by_name == {"a": Inner(1.0, 1)}
    assert math.isnan(again.values[1])
    assert math.isnan(again.inner[0].mean)
    assert again.to_json() == RECORD.to_json()


def test_keys_of_other_versions_are_left_out_and_defaults_fill_in():
    assert Outer.from_json({"name": "x", "values": [], "inner": [], "new": 1}) == Outer("x", [], [])


@pytest.mark.parametrize("change", [{"values": ["word"]}, {"inner": [{"mean": 1}]}, {"name": None}])
def test_a_record_of_another_form_is_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Outer.from_json({**RECORD.to_json(), **change})


def test_rows_by_hand():
    assert rows_of([Inner(1.0, 2)]) == [{"mean": 1.0, "count": 2}]
    assert flat({"a": 1, "b": {"c": 2, "d": 3}}) == {"a": 1, "b_c": 2, "b_d": 3}
    assert finite({"a": (math.nan, 1.0), "b": [{"c": math.nan}]}) == {"a": [None, 1.0], "b": [{"c": None}]}
