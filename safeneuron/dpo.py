"""TRL's DPO trainer, as this project uses it: one import of TRL, which takes seconds, and one place to extend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DPOTrainer

from safeneuron.data import Pair


class PreferenceTrainer(DPOTrainer):
    """TRL's ``DPOTrainer``; the loss is TRL's own."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the reference's log-probabilities of both answers, which all ranks compute together.

        TRL's own hands them to the other ranks in a file that these cannot see when the pairs come from memory.
        """
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for batch in self.accelerator.prepare(loader):
            own = self.compute_ref_log_probs(self.ref_model or self.model, batch)  # type: ignore[no-untyped-call]
            for logps, more in zip(found, self.accelerator.gather_for_metrics(tuple(own)), strict=True):
                logps.append(more.cpu())
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), found, strict=True):
            dataset = dataset.add_column(column, torch.cat(values).numpy())
        return dataset


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
