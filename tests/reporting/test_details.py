"""What stands beside the results has defaults where a run may lack it."""

from __future__ import annotations

from safeneuron.reporting.details import Details
from tests.helpers.sample_results import sample_examples


def test_a_report_needs_no_details() -> None:
    assert Details() == Details((), {}, {})


def test_an_answer_without_an_image_has_none() -> None:
    assert {answer.image for answer in sample_examples()} == {""}
