"""Records from JSON and back: keys of later versions, aliases, and what is refused with its place."""

from __future__ import annotations

import pytest

from safeneuron.errors import InputError
from safeneuron.reporting.records import CapabilityScore, JudgeAgreement, TrainingStep, read_record, write_record

AGREEMENT = {
    "judges": ["a", "b"],
    "n": 2,
    "cannot_say": 0,
    "agreement": 0.5,
    "kappa": None,
    "complied": {"agreement": 0.5, "kappa": 0.1},
    "refused": {"agreement": None, "kappa": None},
    "counts": [{"verdicts": ["complied", "refused"], "n": 1}],
}


def test_a_record_is_written_as_it_was_read() -> None:
    for form, record in (
        (JudgeAgreement, AGREEMENT),
        (TrainingStep, {"step": 1, "loss": 0.1 + 0.2}),
        (CapabilityScore, {"n": 3, "value": 1 / 3, "stderr": 0.0, "metrics": {"acc,none": [0.5, 0.1]}}),
    ):
        assert write_record(read_record(form, record)) == record


def test_keys_of_a_later_version_are_left_out() -> None:
    assert write_record(read_record(TrainingStep, {"step": 1, "speed": 2})) == {"step": 1}


@pytest.mark.parametrize("record", [{}, {"step": "1"}, {"step": 1, "loss": "low"}, [], None])
def test_what_has_another_form_is_refused(record: object) -> None:
    with pytest.raises(InputError, match="form"):
        read_record(TrainingStep, record)
