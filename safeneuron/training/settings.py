"""How a model is trained on preference pairs: the settings, what they are to TRL, checkpoints, and what is watched."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.config.align import AlignTable
from safeneuron.config.schema import sentence_of
from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import bfloat16_pays
from safeneuron.runtime.progress import Progress

COMPLETE = "complete"
_TABLE = AlignTable()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of one training; the defaults are those of the table [align], the paper's where it has any.

    What they mean stands in the table too (``safeneuron config``). Of processes that share a batch, ``batch_size``
    counts the pairs of all, ``micro_batch_size`` those of each. ``precision`` is that of computing: ``bfloat16`` under
    autocast, ``float32``, or ``auto``, which chooses by the device; the weights being trained are always float32.

    Args:
        at_once: The largest number of pairs of a micro-batch in one pass, 0 for all. Like ``gradient_checkpointing`` it
            changes what memory is needed, and the results only by rounding.
        seed: Of the order of the pairs and of dropout.

    Raises:
        InputError: For values out of range or that do not go together.
    """

    beta: float = _TABLE.beta
    sft_weight: float = _TABLE.sft_weight
    learning_rate: float = _TABLE.learning_rate
    weight_decay: float = _TABLE.weight_decay
    epochs: float = _TABLE.epochs
    batch_size: int = _TABLE.batch_size
    micro_batch_size: int = _TABLE.micro_batch_size
    warmup_share: float = _TABLE.warmup_share
    max_length: int = _TABLE.max_length
    bucketing: bool = _TABLE.bucketing
    max_grad_norm: float = _TABLE.max_grad_norm
    freeze_routers: bool = _TABLE.freeze_routers
    gradient_checkpointing: bool = _TABLE.gradient_checkpointing
    lora_rank: int = _TABLE.lora_rank
    lora_alpha: int = _TABLE.lora_alpha
    lora_dropout: float = _TABLE.lora_dropout
    lora_targets: str = _TABLE.lora_targets
    precision: str = _TABLE.precision
    save_every: int = _TABLE.save_every
    at_once: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        # The table's own checks are the only ones.
        values = {name: value for name, value in asdict(self).items() if name in AlignTable.model_fields}
        try:
            AlignTable.model_validate(values)
        except ValidationError as error:
            raise InputError(sentence_of(error, "the settings of a training", AlignTable)) from error

    @classmethod
    def of(cls, table: AlignTable, seed: int) -> TrainingSettings:
        """The settings of the training that a table [align], or a variant of it, describes."""
        names = {field.name for field in fields(cls)}
        return cls(**table.model_dump(include=names), seed=seed)

    def micro_batch(self) -> int:
        """Pairs in one forward pass of this rank: as near to ``micro_batch_size`` as divides its share of a batch.

        Raises:
            InputError: If the ranks cannot have equal shares.
        """
        share, left = divmod(self.batch_size, distributed.world())
        if left:
            raise InputError(
                f"batch_size ({self.batch_size}) must be a multiple of the number of processes ({distributed.world()}) "
                "that share each batch; change align.batch_size or the number of processes"
            )
        return max(size for size in range(1, min(share, self.micro_batch_size) + 1) if share % size == 0)

    def steps(self, pair_count: int) -> int:
        """Number of optimizer steps over so many pairs."""
        return max(1, round(self.epochs * pair_count / self.batch_size))

    def computes_in_bfloat16(self, device: torch.device) -> bool:
        """Whether the forward and backward passes run under bfloat16 autocast there."""
        return self.precision == "bfloat16" or (self.precision == "auto" and bfloat16_pays(device))


def common_arguments(training: TrainingSettings, device: torch.device) -> dict[str, Any]:
    """What every trainer of TRL is told in the same words: batches, rate, seeds, and to keep quiet.

    Args:
        training: The settings.
        device: Where the policy lies.

    Returns:
        Arguments of ``DPOConfig`` and of ``SFTConfig``, by name.
    """
    micro_batch = training.micro_batch()
    return {
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": training.batch_size // (micro_batch * distributed.world()),
        "max_length": training.max_length,
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "seed": training.seed,
        "data_seed": training.seed,
    }


def arguments_of(training: TrainingSettings, pair_count: int, device: torch.device, folder: Path, save: bool) -> Any:
    """The settings as TRL's ``DPOConfig``; checkpoints go to ``folder`` if ``save`` and ``training.save_every`` say so.

    The reference's log-probabilities are computed before the first step, so that no reference stays in memory.
    """
    from trl.trainer.dpo_config import DPOConfig

    steps = training.steps(pair_count)
    saving = save and training.save_every > 0
    half = training.computes_in_bfloat16(device)
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=training.beta,
        loss_type=["sigmoid", "sft"] if training.sft_weight else ["sigmoid"],
        loss_weights=[1.0, training.sft_weight] if training.sft_weight else None,
        max_steps=steps,
        warmup_steps=round(training.warmup_share * steps),
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length" if training.bucketing else "random",
        max_grad_norm=training.max_grad_norm,
        # accelerate may have been told to do the same for every layer it shards, and not both can.
        gradient_checkpointing=training.gradient_checkpointing
        and not (is_sharded() and _asked("FSDP_ACTIVATION_CHECKPOINTING")),
        # TRL sets every dropout to zero unless it is told not to, that of the adapters too.
        disable_dropout=not training.lora_dropout,
        bf16=half,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=training.at_once or training.micro_batch(),
        save_strategy="steps" if saving else "no",
        save_steps=training.save_every if saving else steps,
        save_total_limit=1,
        **common_arguments(training, device),
    )
    # Otherwise a config of accelerate that says bf16 would also hold for training that is to be in float32.
    arguments.mixed_precision = "bf16" if half else "no"
    return arguments


def is_sharded() -> bool:
    """Whether accelerate was told to spread the weights of what is trained over the ranks, with FSDP."""
    return distributed.world() > 1 and _asked("ACCELERATE_USE_FSDP")


def require_trainable_settings(training: TrainingSettings, refresh: bool) -> None:
    """Make sure that the ranks, as they were launched, can train so.

    Args:
        training: The settings.
        refresh: Whether neurons are found again while the model is trained.

    Raises:
        InputError: If they cannot: DeepSpeed, FSDP1, unequal shares of a batch, or ``refresh`` with FSDP2.
    """
    training.micro_batch()
    if distributed.world() > 1 and _asked("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "align does not work with DeepSpeed, whose copies of the weights it cannot put together exactly; use FSDP2 "
            "or plain DDP, or FreezeNeurons in a trainer of your own"
        )
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "align does not work with FSDP1, whose flat parameters have no neurons that could be frozen; set "
            "fsdp_version: 2 in the config of accelerate"
        )
    if is_sharded() and refresh:
        raise InputError(
            "align.refresh does not work with FSDP2, under which the model cannot be measured while it is trained; use "
            "plain DDP, or another variant"
        )


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


class Watch(TrainerCallback):
    """Report progress after each step, mark whole checkpoints, stop before training that diverged is saved.

    Args:
        folder: Where the checkpoints are.
        progress: Is told the steps that are done.

    Raises:
        InputError: While training, for a loss or gradient that is not finite.
    """

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder = folder
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell how far the training is."""
        # From a checkpoint of the last step, the trainer would go on with one step more than was asked for.
        if state.global_step >= state.max_steps:
            control.should_save = False
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as written to its end, by all ranks."""
        distributed.barrier()
        if distributed.is_main():
            (self.folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise ``InputError`` for a loss or gradient that is not finite."""
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise InputError(
                    f"training has diverged: {name} is {value} at step {state.global_step}; use a smaller learning "
                    "rate or precision = 'float32'"
                )


def last_checkpoint(folder: Path, sharded: bool = False) -> str | None:
    """The newest checkpoint that was written to its end.

    The others are removed: the trainer, which keeps only the newest, would count them. Raises ``InputError`` if it is
    one of training whose weights were spread over the ranks and these are not, or the other way round.
    """
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            whole[int(checkpoint.name.removeprefix("checkpoint-"))] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    if not whole:
        return None
    newest = whole[max(whole)]
    if sharded != any(newest.glob("pytorch_model_fsdp*")):
        was, now = ("without", "with") if sharded else ("with", "without")
        raise InputError(
            f"{newest} is from training {was} FSDP2, which cannot go on {now} it; start it as before, or make it again "
            "with --redo align"
        )
    return str(newest)


@contextmanager
def model_restored(network: PreTrainedModel) -> Iterator[None]:
    """Within the block a trainer may patch the model and its settings; afterwards both are as they were.

    Args:
        network: The model, which may come out of the block with other weights.
    """
    attributes, settings = set(vars(network)), dict(vars(network.config))
    generation = copy.deepcopy(network.generation_config)
    try:
        yield
    finally:
        network.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
        network.disable_input_require_grads()  # type: ignore[no-untyped-call]
        for name in set(vars(network)) - attributes:
            delattr(network, name)
        vars(network.config).update(settings)
        network.generation_config = generation
        network.train(False)


def training_log(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The trainer's history as one record a step, under names that say what they are."""
    return [
        {
            "step": entry["step"],
            "loss": entry["loss"],
            "accuracy": entry.get("rewards/accuracies", 0.0),
            "margin": entry.get("rewards/margins", 0.0),
            "grad_norm": entry.get("grad_norm", 0.0),
            "learning_rate": entry.get("learning_rate", 0.0),
            "padding": entry.get("padding", 0.0),
        }
        for entry in history
        if "loss" in entry
    ]
