"""A stand-in for the Hub's data sets."""

from __future__ import annotations

from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import pytest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for the Hub: ``rows`` is what it returns or raises, ``asked`` what it was asked for."""
    state: dict[str, Any] = {}

    def load_dataset(*names: Any, **options: Any) -> Any:
        state["asked"] = (*names, options)
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return datasets.Dataset.from_list(state["rows"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state
