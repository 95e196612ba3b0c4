"""The fine-tuning attack: a few answers that a model should not give, learnt by a LoRA adapter that can be taken off.

Qi et al. 2023, arXiv:2310.03693 (ten to a hundred examples undo an alignment); with LoRA as in Lermen et al. 2023,
arXiv:2310.20624. The answers come from the user or from a run's own folder; none are bundled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, set_seed

from safeneuron.data.rows import Row, Source, as_source, read_rows, text_at
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import answer_ids
from safeneuron.neurons.weights import has_adapters
from safeneuron.runtime import distributed
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.progress import Progress
from safeneuron.training.lora import lora_config
from safeneuron.training.settings import TrainingSettings, Watch, common_arguments, model_restored

ANSWER_COLUMNS = ("answer", "response", "completion", "output")
"""The columns in which an answer is looked for, best first."""


@dataclass(frozen=True)
class Demonstration:
    """A request and the answer that is to be learnt."""

    request: str
    answer: str


def read_demonstrations(source: str | Path | Source, count: int | None = None) -> list[Demonstration]:
    """Demonstrations from a file or a Hub data set with the column ``prompt`` and the first of ``ANSWER_COLUMNS``.

    Args:
        source: A path, the name of a data set on the Hub, or either with options.
        count: How many, from the first on; all if None.

    Raises:
        InputError: For anything that cannot be read, with file and line number.
    """
    rows = islice(read_rows(as_source(source, count=count)), count)
    return [Demonstration(text_at(row, "prompt"), text_at(row, _answer_column(row))) for row in rows]


@contextmanager
def finetuned(
    model: Model,
    demonstrations: Sequence[Demonstration],
    *,
    steps: int = 20,
    rank: int = 8,
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[list[float]]:
    """Within the block the model carries a LoRA adapter trained on the demonstrations; gives the loss of each step.

    TRL's SFT on the answers' tokens alone, AdamW with a constant learning rate, adapters on attention and FFN scaled by
    2. The base weights are neither trained nor cast and the adapter is taken off at the end, so the model is
    bit-identical afterwards, also after an exception. It is the given ``model`` itself that is attacked within the
    block. Neurons pruned around this block would be pruned from the base alone, so prune inside it. Several ranks share
    each batch.

    Args:
        model: The model that is attacked.
        demonstrations: Requests and the answers that are to be learnt.
        steps: Optimizer steps.
        rank: Of the adapter.
        learning_rate: The constant one of AdamW.
        batch_size: Demonstrations a step.
        max_length: Where a demonstration is cut off, in tokens.
        seed: For the adapter's start and the order of the data.
        progress: Counts steps.

    Raises:
        InputError: Without demonstrations, for a model that has adapters already or no chat template, for a number
            below 1, a model of which weights are offloaded, or if training diverges.
    """
    _check(model, demonstrations, steps, rank)
    require_whole(model.network, "fine-tuning")
    from peft import get_peft_model

    distributed.start_group()
    training = TrainingSettings(
        lora_rank=rank, lora_alpha=2 * rank, learning_rate=learning_rate, weight_decay=0.0, batch_size=batch_size,
        micro_batch_size=batch_size, max_length=max_length, seed=seed,
    )  # fmt: skip
    network = model.network
    set_seed(seed)
    with model_restored(network), _same_gradients(network):
        adapted: Any = get_peft_model(network, lora_config(network, training))
        try:
            with model_restored(network), TemporaryDirectory() as folder:
                arguments = _arguments(training, steps, model.device, folder)
                losses = _train(model, adapted, demonstrations, arguments, progress)
            adapted.eval()
            yield losses
        finally:
            adapted.unload()


@contextmanager
def _same_gradients(network: nn.Module) -> Iterator[None]:
    """After the block gradients are computed for the same parameters as before, and none are kept."""
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _arguments(training: TrainingSettings, steps: int, device: torch.device, folder: str) -> Any:
    """The settings as TRL's ``SFTConfig``; nothing is saved in ``folder``."""
    from trl.trainer.sft_config import SFTConfig

    arguments = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        lr_scheduler_type="constant",
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
        **common_arguments(training, device),
    )
    # Otherwise a config of accelerate that says bf16 would also hold here.
    arguments.mixed_precision = "no"
    return arguments


def _train(
    model: Model,
    adapted: Any,
    demonstrations: Sequence[Demonstration],
    arguments: Any,
    progress: Progress | None,
) -> list[float]:
    """Train the adapter; the loss of each step."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [_record(model, demonstration) for demonstration in demonstrations]
    trainer = SFTTrainer(
        model=adapted,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=model.tokenizer,
        callbacks=[Watch(Path(arguments.output_dir), progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _record(model: Model, demonstration: Demonstration) -> dict[str, Any]:
    """A demonstration as TRL takes it: messages, or token ids where the template is a processor's."""
    request = [{"role": "user", "content": demonstration.request}]
    if model.processor is None:
        return {"prompt": request, "completion": [{"role": "assistant", "content": demonstration.answer}]}
    prompt = model.encode(request)
    answer = answer_ids(model.processor, request, demonstration.answer, pictured=False)
    return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}


def _check(model: Model, demonstrations: Sequence[Demonstration], steps: int, rank: int) -> None:
    if not demonstrations:
        raise InputError("there are no answers to fine-tune on; give a file with prompts and answers")
    if steps < 1 or rank < 1:
        raise InputError(f"the fine-tuning attack needs steps and rank of at least 1, found {steps} and {rank}")
    if has_adapters(model.network):
        raise InputError(f"{model.name} carries adapters already; merge them into the model before it is attacked")
    if not model.has_template:
        raise InputError(
            f"the tokenizer of {model.name} has no chat template, which the answers need; set one or use a chat model"
        )


def _answer_column(row: Row) -> str:
    for name in ANSWER_COLUMNS:
        if name in row.values:
            return name
    raise InputError(
        f"{row.where}: none of the columns {', '.join(row.values)} is known to hold answers; rename it to one of: "
        f"{', '.join(ANSWER_COLUMNS)}"
    )
