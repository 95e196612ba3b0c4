"""TRL's DPO trainer, as this project uses it: one import of TRL, which takes seconds, and one place to extend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from safeneuron.data import Pair
from safeneuron.parts import PartsTrainer


class PreferenceTrainer(PartsTrainer):
    """TRL's ``DPOTrainer``; the loss is TRL's own."""


def dataset_of(pairs: Sequence[Pair]) -> Any:
    """The pairs in TRL's conversational form, as a ``datasets.Dataset``."""

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {"prompt": list(pair.prompt), "chosen": answer(pair.chosen), "rejected": answer(pair.rejected)}
            for pair in pairs
        ]
    )
