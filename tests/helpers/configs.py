"""What the tests of configs share: the sentence that a config is refused with."""

from __future__ import annotations

import pytest

from safeneuron.config.toml import parse_config
from safeneuron.errors import InputError


def refusal(text: str, *changes: str) -> str:
    """The sentence that a config is refused with; it is one line and names where the config came from."""
    with pytest.raises(InputError) as error:
        parse_config(text, "my.toml", changes)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message
