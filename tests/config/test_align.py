"""The table [align]: what does not go together is said."""

import pytest
from pydantic import ValidationError

from safeneuron.config.align import AlignTable


@pytest.mark.parametrize(
    ("changes", "noun"),
    [
        ({"ablate": True, "refresh": 8}, "refresh"),
        ({"ablate_reference": True}, "ablate"),
        ({"ablate": True, "ablate_reference": True, "ablate_share": 0.5}, "ablate_share"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size"),
        ({"quantise": "4bit"}, "lora_rank"),
        ({"quantise": "4bit", "lora_rank": 8, "rounds": 2}, "rounds"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, noun):
    with pytest.raises(ValidationError, match=noun):
        AlignTable(**changes)


def test_a_table_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        AlignTable().rounds = 2
