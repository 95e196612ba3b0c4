"""Making a training fit: the order of the ways, the margin, and what is said when there is none."""

from __future__ import annotations

import pytest

from safeneuron.errors import InputError
from safeneuron.planning.memory import (
    GB,
    MARGIN,
    WASTE,
    Device,
    Need,
    available,
    fits,
    gigabytes,
    needs,
    plan_training,
    require_fit,
)
from safeneuron.training.settings import TrainingSettings

ASKED = TrainingSettings(batch_size=16, micro_batch_size=8)


def need(training: TrainingSettings) -> Need:
    """10 GB, and for each pair at a time 4 GB, or 1 with checkpointing; nothing is wasted."""
    each = 1 if training.gradient_checkpointing else 4
    pairs = training.at_once or training.micro_batch_size
    return {"weights": 10 * GB / (1 + WASTE), "activations": each * pairs * GB / (1 + WASTE)}


def device(gigabytes: float | None) -> Device:
    return Device("cuda", None if gigabytes is None else gigabytes * GB * MARGIN, bfloat16=True)


@pytest.mark.parametrize(
    ("memory", "at_once", "checkpointing"),
    [(50, 0, False), (42, 0, False), (41, 4, False), (20, 2, False), (14, 1, False), (13.9, 2, True), (11, 1, True)],
)
def test_fewer_pairs_come_before_checkpointing(memory, at_once, checkpointing):
    made = plan_training(ASKED, device(memory), 100, need)
    assert made.fits
    assert (made.training.at_once, made.training.gradient_checkpointing) == (at_once, checkpointing)
    assert made.changed == (memory < 42)


def test_checkpointing_that_was_asked_for_stays():
    asked = TrainingSettings(batch_size=16, micro_batch_size=8, gradient_checkpointing=True)
    assert plan_training(asked, device(18), 100, need).training == asked
    assert plan_training(asked, device(15), 100, need).training.at_once == 4


def test_all_else_of_the_training_stays():
    made = plan_training(ASKED, device(14), 100, need).training
    assert {**vars(made), "at_once": 0} == vars(ASKED)


def test_nothing_is_changed_if_that_is_not_wanted():
    made = plan_training(ASKED, device(14), 100, need, change=False)
    assert made.training == ASKED
    assert not made.fits
    assert not made.changed


def test_unknown_memory_is_not_a_reason_to_change_anything():
    made = plan_training(ASKED, device(None), 100, need)
    assert made.training == ASKED
    assert made.fits
    assert available(made.device) == "an unknown amount"


def test_what_fits_in_no_way_is_explained():
    made = plan_training(ASKED, device(5), 700, need)
    with pytest.raises(InputError) as refusal:
        require_fit(made, "T1/align")
    assert str(refusal.value) == (
        "T1/align needs 11.0 GB (weights 9.5, activations 1.0) even with 1 pair at a time and gradient checkpointing "
        "of 700 tokens each, and there are 5.5 GB; train adapters (lora_rank) instead of all weights, use more or "
        "larger devices, or a smaller max_length"
    )
    require_fit(plan_training(ASKED, device(11), 700, need), "T1/align")


def test_the_sentence_and_the_record_say_the_same():
    made = plan_training(ASKED, device(20), 700, need)
    assert (
        made.sentence() == "18.0 GB (weights 9.5, activations 7.6) of 22.0 GB; 2 pairs at a time, up to 700 tokens each"
    )
    record = made.to_record()
    assert record["need"]["total"] == 18 * GB
    assert (record["at_once"], record["gradient_checkpointing"], record["changed"]) == (2, False, True)
    assert record["available"] == round(22 * GB)


def test_the_margin_is_kept():
    one = {"weights": 10 * GB / (1 + WASTE)}
    assert fits(one, Device("cpu", 11.01 * GB, False))
    assert not fits(one, Device("cpu", 10.99 * GB, False))


def test_small_parts_are_not_listed():
    assert needs({"weights": 2 * GB, "frozen": 1000.0}) == "2.1 GB (weights 2.0)"
    assert needs({"frozen": 1000.0}) == "0.0 GB"
    assert gigabytes(1234 * GB) == "1,234.0 GB"
