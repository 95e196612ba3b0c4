"""The most used families, built tiny: recorded, pruned and frozen; and the probe. All others: make architectures."""

from __future__ import annotations

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.helpers import architectures


@pytest.mark.parametrize("name", architectures.MOST_USED)
def test_most_used_families_work(name):
    result = architectures.check(name, MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]])
    assert result.outcome == "works", result.told
