"""Tests, in folders as the packages that they test."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def rarely(*values: Any) -> Any:
    """A case of a parametrized test that is slow, beside others that are fast."""
    return pytest.param(*values, marks=pytest.mark.slow)
