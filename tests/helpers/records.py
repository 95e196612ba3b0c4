"""Records of prompts and pairs for tests: messages, files of them, and the one line that a mistake gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeneuron.errors import InputError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def message_of(call: Any, *arguments: Any, **keywords: Any) -> str:
    """Return the message of the InputError that the call must raise; it must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)
