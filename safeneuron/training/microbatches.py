"""Micro-batches in parts that fit into memory: the gradients and the loss are those of the whole, to rounding.

How many pairs are in one pass is thereby a matter of memory alone. Which pairs share a micro-batch and an optimizer
step, and so the training, does not depend on the machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.dpo_trainer import DPOTrainer

from safeneuron.errors import InputError
from safeneuron.runtime.devices import Halving, hand_back_memory, out_of_memory

ADVICE = (
    "use gradient_checkpointing = true, a smaller max_length, adapters instead of all weights, or a device with more "
    "memory"
)
Inputs = dict[str, Any]
Metrics = dict[str, list[float]]


class PartsTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` with at most ``at_once`` pairs in one pass; 0 is as many as a micro-batch has.

    When memory runs out in a pass, ``at_once`` is halved and the optimizer step goes on: its gradients are set to zero,
    since half a backward pass may have been added to them, and its micro-batches so far are run again in smaller parts.
    On several processes, which would have to do so together, it ends with an ``InputError`` instead.

    A subclass that does something to a pass overrides ``part_step``, which sees one part. What it decides for each pair
    or row of a micro-batch it decides in ``training_step`` and puts into ``inputs`` before it calls the one here, as a
    tensor with an entry for each pair or row: that is split like everything else, and is the same when a part is run
    again. ``whole`` is the micro-batch that the part is from.
    """

    whole: Inputs
    _begun: list[Inputs]

    def __init__(self, *, at_once: int = 0, **settings: Any) -> None:
        # The log-probabilities of the reference are computed in here, in parts too.
        self.at_once = at_once
        super().__init__(**settings)

    def get_batch_samples(self, *arguments: Any) -> Any:
        """The micro-batches of the next optimizer step."""
        self._begun = []
        return super().get_batch_samples(*arguments)

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; its loss, as a share of the optimizer step's."""
        self._begun.append(self._prepare_inputs(inputs))
        logged, tokens = dict(self._metrics["train"]), self._total_train_tokens
        waiting = self._begun[-1:]
        while True:
            try:
                for whole in waiting:
                    # What an earlier micro-batch logs when it is run again has been logged before.
                    self._metrics["train"], self._total_train_tokens = defaultdict(list), tokens
                    loss = self._in_parts(model, whole, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error)
            # Only here, where the exception is gone, are the tensors of the failed pass free.
            model.zero_grad()
            hand_back_memory()
            waiting = self._begun
        new = self._metrics["train"]
        self._metrics["train"] = defaultdict(list, logged)
        for name, values in new.items():
            # The tokens seen so far are a count; all others are means over the micro-batch.
            self._metrics["train"][name] = values if name == "num_tokens" else [*logged.get(name, []), *values]
        return loss

    def part_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one part of a micro-batch."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        return loss

    def kinds(self, inputs: Inputs) -> list[list[int]]:
        """The pairs of a micro-batch, apart where they cannot share a pass; here they all can."""
        return [list(range(pair_count(inputs)))]

    def completed(self, part: Inputs) -> Inputs:
        """A part as the model takes it; a subclass may put in what is made for each pass only."""
        return part

    def compute_ref_log_probs(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and the rejected answers under the reference, ``[pair]`` each."""

        def work(pairs: Sequence[int]) -> Any:
            part = self.completed(part_of(inputs, pairs))
            return DPOTrainer.compute_ref_log_probs(self, model, part)  # type: ignore[no-untyped-call]

        halving, kinds = self._halving(), self.kinds(inputs)
        logps = [torch.stack(part) for kind in kinds for part in halving.over(kind, work)]
        self._set_at_once(halving)
        order = torch.tensor([pair for kind in kinds for pair in kind]).argsort()
        chosen, rejected = torch.cat(logps, dim=1)[:, order.to(logps[0].device)]
        return chosen, rejected

    def _in_parts(self, model: nn.Module, whole: Inputs, num_items_in_batch: Any) -> Tensor:
        self.whole, count = whole, pair_count(whole)
        parts = self._all_parts(whole)
        if len(parts) == 1:
            return self.part_step(model, self.completed(whole), num_items_in_batch)
        accumulation, weights = self.current_gradient_accumulation_steps, self.loss_weights
        losses: list[Tensor] = []
        logged: list[tuple[int, Metrics]] = []
        try:
            for pairs in parts:
                part = part_of(whole, pairs)
                # The trainer divides a loss by this number, so that the part's counts by its share of the pairs.
                self.current_gradient_accumulation_steps = accumulation * count / len(pairs)  # type: ignore[assignment]
                self.loss_weights = [
                    weight * (self._share_of_tokens(part) * count / len(pairs) if kind == "sft" else 1.0)
                    for kind, weight in zip(self.loss_types, weights, strict=True)
                ]
                self._metrics["train"] = defaultdict(list)
                # DDP adds up the gradients of all processes in the last pass, once.
                alone = isinstance(model, DistributedDataParallel) and pairs is not parts[-1]
                with self.accelerator.no_sync(model) if alone else nullcontext():
                    losses.append(self.part_step(model, self.completed(part), num_items_in_batch))
                logged.append((len(pairs), self._metrics["train"]))
        finally:
            self.current_gradient_accumulation_steps, self.loss_weights = accumulation, weights
        self._metrics["train"] = defaultdict(list, merged(logged))
        return torch.stack(losses).sum()

    def _share_of_tokens(self, part: Inputs) -> float:
        """What share of the chosen answers' tokens a part has: TRL's sft loss is a mean over tokens, not pairs."""
        mine, all_of_them = (
            int(inputs["completion_mask"][: pair_count(inputs), 1:].sum()) for inputs in (part, self.whole)
        )
        return mine / all_of_them

    def _all_parts(self, whole: Inputs) -> list[Sequence[int]]:
        return [part for kind in self.kinds(whole) for part in self._halving().parts(kind)]

    def _halving(self) -> Halving[int]:
        return Halving("training", ADVICE, most=self.at_once)

    def _halve(self, error: BaseException) -> None:
        halving = self._halving()
        # The part that failed is one of these, and no part to come need be larger than half of the largest.
        halving.halve(max((part for whole in self._begun for part in self._all_parts(whole)), key=len), error)
        self._set_at_once(halving)

    def _set_at_once(self, halving: Halving[int]) -> None:
        if halving.most != self.at_once and self.accelerator.distributed_type != DistributedType.NO:
            raise InputError(
                f"training ran out of memory on one of {self.accelerator.num_processes} processes, which cannot halve "
                "their micro-batches alone; use a smaller micro_batch_size, or gradient_checkpointing = true"
            )
        self.at_once = halving.most


def pair_count(inputs: Inputs) -> int:
    """Pairs in a batch of TRL, whose rows are all chosen answers and then all rejected ones."""
    return len(inputs["input_ids"]) // 2


def part_of(inputs: Inputs, pairs: Sequence[int]) -> Inputs:
    """Some pairs of a batch as a batch of their own, without the padding that they do not need.

    Tensors and lists with an entry for each pair or for each row are split, and tensors of the shape of the token ids
    are cut.
    """
    count, shape = pair_count(inputs), inputs["input_ids"].shape
    if len(pairs) == count:
        return inputs
    rows = [*pairs, *(count + pair for pair in pairs)]
    width = int(inputs["attention_mask"][rows].sum(dim=1).max())

    def split(value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return [value[pair] for pair in pairs]
        if not isinstance(value, Tensor) or not value.dim() or len(value) not in (count, 2 * count):
            return value
        piece = value[rows] if len(value) == 2 * count else value[list(pairs)]
        return piece[:, :width] if value.shape == shape else piece

    return {name: split(value) for name, value in inputs.items()}


def merged(logged: Sequence[tuple[int, Metrics]]) -> Metrics:
    """What a micro-batch has logged, from what its parts have: (number of pairs, values) of each.

    Means over pairs are exact; means over tokens, which TRL only logs, are taken as if all pairs were equally long.
    """
    names = dict.fromkeys(name for _, metrics in logged for name in metrics)
    metrics_of_all: Metrics = {}
    for name in names:
        values = [(size, value) for size, metrics in logged for value in metrics.get(name, [])]
        mean = sum(size * value for size, value in values) / sum(size for size, _ in values)
        metrics_of_all[name] = [values[-1][1] if name == "num_tokens" else mean]
    return metrics_of_all
