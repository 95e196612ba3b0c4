"""TRL's DPO trainer, as this project uses it: one import of TRL, which takes seconds, and one place to extend it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from math import ceil
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from safeneuron.data.types import Pair
from safeneuron.models.model import Model
from safeneuron.models.vision import ImageTokens, answer_ids, image_features, joined_images, pixels_at
from safeneuron.neurons.layout import network_of
from safeneuron.training.microbatches import Inputs, PartsTrainer, pair_count

POOL = 100
"""About so many micro-batches are sorted together. More gain next to nothing, and with fewer pairs to meet, the same
ones would meet in every epoch of a large data set."""


class LengthBuckets(Sampler[int]):
    """The places of a data set in an order whose every ``size`` neighbours, from the first on, are of like length.

    ``lengths`` is the padded length of each item. ``epoch`` is asked for when an epoch begins, rather than set from
    outside, because accelerate does not reach the sampler when training is resumed on several processes. There whole
    micro-batches are dealt to the processes in turn, the last ones filled up with the first items of the epoch.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Only the last micro-batch may be smaller, as it is for whoever cuts the order into micro-batches again.
        return chain.from_iterable(buckets(self.lengths, self.size, f"{self.seed} {self.epoch()}"))


def buckets(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """The places 0, 1, ... of ``lengths``, each once, in micro-batches of ``size`` of like length and random order.

    What does not fill a micro-batch is the last one; its length is any, so that no kind of pair is always there.
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches: list[list[int]] = []
    rest: list[int] = []
    for pool in _pools(order, size):
        # The sort is stable, so that equally long items meet others in the next epoch.
        pool.sort(key=lengths.__getitem__)
        over = len(pool) % size
        if over:
            start = size * generator.randint(0, len(pool) // size)
            rest, pool = pool[start : start + over], pool[:start] + pool[start + over :]
        batches += [pool[start : start + size] for start in range(0, len(pool), size)]
    generator.shuffle(batches)
    return [*batches, rest] if rest else batches


def _pools(order: list[int], size: int) -> Iterator[list[int]]:
    """Cut the order into pools of about as many whole micro-batches; only the last one has any that is not whole."""
    count = ceil(len(order) / size)
    each = size * max(1, ceil(count / max(1, round(count / POOL))))
    return (order[start : start + each] for start in range(0, len(order), each))


PAIR = "pair"
"""The column that holds each pair's place in the list of pairs."""
PICTURES = "pictures"
"""The name, in a micro-batch, of what the vision tower is given for each pair, ``None`` for one without a picture."""
BY_LENGTH = "group_by_length"
"""The ``train_sampling_strategy`` that asks for buckets; transformers' own sampler of that name knows no pairs."""


class PreferenceTrainer(PartsTrainer):
    """TRL's ``DPOTrainer``; the loss is TRL's own.

    With ``train_sampling_strategy="group_by_length"`` pairs of like length share a micro-batch. The share of padding
    in what has gone through the model since the last record is logged as ``padding``. Pairs of token ids are taken as
    they are. With ``PreferenceCollator`` they may have pictures; those with one share no pass with those without.
    """

    _places = 0
    _filled: Tensor | int = 0

    def __init__(self, *, ref_model: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(ref_model=ref_model, **settings)
        if ref_model is None and self.ref_model is not None:
            raise RuntimeError("TRL has loaded another reference than the given model")
        # Its log-probabilities are in the data set by now.
        self.ref_model = None
        # TRL prints its log where it shows no bars.
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Also keep FSDP2 from rounding log-probabilities, and the sum of the ranks' gradients, to bfloat16.

        accelerate asks for both when the model computes in bfloat16. Weights are still gathered as bfloat16.
        """
        super().create_accelerator_and_postprocess()
        plugin = vars(self.accelerator.state).get("fsdp_plugin")
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            computing = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=computing, reduce_dtype=torch.float32)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch forward and backward, with its padding counted."""
        mask = inputs["attention_mask"]
        self._places += mask.numel()
        self._filled = self._filled + mask.sum().detach()
        return super().training_step(model, inputs, num_items_in_batch)

    def kinds(self, inputs: Inputs) -> list[list[int]]:
        """The pairs without a picture, and those with one, as far as there are any."""
        has_image = [features is not None for features in inputs.get(PICTURES, [None] * pair_count(inputs))]
        kinds = [[pair for pair, image in enumerate(has_image) if image == wanted] for wanted in (False, True)]
        return [pairs for pairs in kinds if pairs]

    def completed(self, part: Inputs) -> Inputs:
        """The part with its pictures as the model takes them, once for each row."""
        features = part.get(PICTURES)
        rest = {name: value for name, value in part.items() if name != PICTURES}
        if not features or features[0] is None:
            return rest
        lengths = rest["attention_mask"].sum(dim=1).tolist()
        together = joined_images([*features, *features], lengths, rest["input_ids"].shape[1], "right")
        policy: Any = network_of(cast("nn.Module", self.model))
        return rest | pixels_at(together, policy)

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *arguments)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*columns, PAIR]))  # type: ignore[assignment]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the trainer logs, and the share of padding."""
        if self._places:
            logs = {**logs, "padding": 1 - float(self._filled) / self._places}
            self._places, self._filled = 0, 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args: Any = self.args
        if args.train_sampling_strategy != BY_LENGTH:
            sampler: Sampler[int] | None = super()._get_train_sampler(dataset)
            return sampler
        lengths = padded_lengths(dataset, args.max_length)
        # The state counts epochs in fractions; what is before the point is the epoch that begins or is gone on with.
        return LengthBuckets(lengths, args.train_batch_size, args.seed, lambda: int(self.state.epoch or 0))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the reference's log-probabilities of both answers, which all ranks compute together.

        TRL's own hands them to the other ranks in a file that these cannot see when the pairs come from memory.
        """
        args: Any = self.args
        if args.train_sampling_strategy == BY_LENGTH:
            # The longest pairs come first: memory that suffices for them suffices for all.
            lengths = padded_lengths(dataset, args.max_length)
            dataset = dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
        reference: Any = self.ref_model or self.model
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        gathered: tuple[list[Tensor], list[Tensor]] = ([], [])
        for batch in self.accelerator.prepare(loader):
            local = self.compute_ref_log_probs(reference, batch)
            for logps, more in zip(gathered, self.accelerator.gather_for_metrics(tuple(local)), strict=True):
                logps.append(more.cpu())
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), gathered, strict=True):
            dataset = dataset.add_column(column, torch.cat(values).numpy())
        return dataset


def padded_lengths(dataset: Any, max_length: int | None) -> list[int]:
    """The tokens to which TRL pads both sides of each pair of its tokenised data set, if the pair is alone."""
    lengths = (
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    )
    return [length if max_length is None else min(length, max_length) for length in lengths]


class PreferenceCollator(DataCollatorForPreference):
    """TRL's collator of pairs of token ids, which also makes what the vision tower is given of their pictures."""

    def __init__(self, model: Model, prompts: Sequence[list[int]], max_length: int) -> None:
        super().__init__(pad_token_id=int(model.tokenizer.pad_token_id), max_length=max_length)
        self.model = model
        self.prompts = prompts

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro-batch of these pairs."""
        batch: dict[str, Any] = super().torch_call(examples)
        prompts = [self.prompts[example[PAIR]] for example in examples]
        processor = self.model.processor
        if processor is not None and any(isinstance(prompt, ImageTokens) for prompt in prompts):
            batch[PICTURES] = [
                image_features(processor, prompt) if isinstance(prompt, ImageTokens) else None for prompt in prompts
            ]
        return batch


def data_of(model: Model, pairs: Sequence[Pair], max_length: int) -> tuple[Any, PreferenceCollator | None]:
    """The pairs as a ``datasets.Dataset``, and who makes batches of them; ``None`` stands for TRL's own collator.

    TRL turns texts into tokens itself, but for a model with a processor it is done here: its template has another form,
    and the tokens of a picture must be those that the model is measured and attacked with.
    """
    processor = model.processor
    if processor is None:
        return dataset_of(pairs), None
    prompts = [model.encode(pair.prompt, pair.image) for pair in pairs]
    records = [
        {
            PAIR: place,
            "prompt_ids": list(prompts[place]),
            "chosen_ids": answer_ids(processor, pair.prompt, pair.chosen, pair.image is not None),
            "rejected_ids": answer_ids(processor, pair.prompt, pair.rejected, pair.image is not None),
        }
        for place, pair in enumerate(pairs)
    ]
    return Dataset.from_list(records), PreferenceCollator(model, prompts, max_length)


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
