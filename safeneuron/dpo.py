"""TRL's DPO trainer, as this project uses it: one import of TRL, which takes seconds, and one place to extend it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DPOTrainer

from safeneuron.data import Pair


class PreferenceTrainer(DPOTrainer):
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


@contextmanager
def answers_scored_alone() -> Iterator[None]:
    """Within the block TRL runs the LM head at the answers' tokens only, also on the CPU; the losses are the same.

    TRL does so where it has Triton. Elsewhere it scores the prompts' tokens too and throws them away, which on the CPU
    is a third of the time of a step.
    """
    names: dict[str, Any] = vars(trl_utils)
    as_it_was = names["_use_triton"]
    names["_use_triton"] = lambda device: device.type == "cpu" or as_it_was(device)
    try:
        yield
    finally:
        names["_use_triton"] = as_it_was
