"""Preference optimisation with frozen neurons: TRL's DPO, an explicit reference, and a proof (Eq. 11-12, Algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.freezing import Freeze, FreezeNeurons
from safeneuron.models import Model, bfloat16_pays, quiet
from safeneuron.neurons import NeuronSet

Progress = Callable[[int, int], None]
COMPLETE = "complete"


@dataclass(frozen=True)
class Alignment:
    """What a round of alignment did: the new model, its training log, and the proof of the freeze.

    ``free_change`` is |theta_after - theta_before| / |theta_before| over all parameters outside the frozen slices.
    """

    model: Model
    log: list[dict[str, float]]
    steps: int
    frozen_count: int
    frozen_identical: bool
    frozen_sha256: str
    free_change: float


def align(
    model: Model,
    pairs: Sequence[Pair],
    frozen: NeuronSet | None,
    ablated: NeuronSet | None = None,
    ablate_share: float = 1.0,
    beta: float = 0.1,
    learning_rate: float = 5e-6,
    weight_decay: float = 0.05,
    epochs: float = 3.0,
    batch_size: int = 8,
    micro_batch_size: int = 8,
    warmup_share: float = 0.1,
    max_length: int = 1024,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
    precision: str = "auto",
    seed: int = 0,
    checkpoints: Path | None = None,
    save_every: int = 0,
    progress: Progress | None = None,
) -> Alignment:
    """Train ``model`` on preference pairs with TRL's DPO while the neurons in ``frozen`` stay as they are (Eq. 11-12).

    The given model is the explicit DPO reference and is not changed; the result is a new one, trained in float32 master
    weights (``precision``: ``bfloat16`` computes under autocast, ``float32`` does not, ``auto`` chooses by the device).
    ``ablated`` neurons are zero in the policy's forward passes (Algorithm 1; never in the reference's), in the share
    ``ablate_share`` of the optimizer steps. One step sees ``batch_size`` pairs, ``micro_batch_size`` at a time.

    With ``checkpoints`` and ``save_every`` steps, interrupted training continues from the last checkpoint there.
    Raises ``InputError`` for no pairs, a neuron set of another model, a loss that is not finite, or training that
    changed nothing.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    quiet()
    if not pairs:
        raise InputError("there are no preference pairs to train on; check [pairs] in the config")
    reference = model.network
    restore_dtype = reference.dtype
    set_seed(seed)
    policy = copy.deepcopy(reference).float()
    reference.float()
    proof = Freeze(policy, frozen) if frozen is not None else None
    before = proof.digest() if proof is not None else ""
    arguments = _arguments(
        model, len(pairs), beta, learning_rate, weight_decay, epochs, batch_size, micro_batch_size, warmup_share,
        max_length, max_grad_norm, gradient_checkpointing, precision, seed, checkpoints, save_every,
    )  # fmt: skip
    watch = _Watch(progress)
    callbacks: list[TrainerCallback] = [watch]
    if frozen is not None:
        callbacks.append(FreezeNeurons(frozen))
    if ablated is not None:
        callbacks.append(_Ablate(ablated, ablate_share))
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=dataset_of(pairs),
        processing_class=model.tokenizer,
        callbacks=callbacks,
    )
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    finally:
        _unpatch(reference, restore_dtype)
    identical = proof is None or (not proof.changed() and proof.digest() == before)
    assert identical, "frozen neurons changed in spite of FreezeNeurons"
    # In the precision of the given checkpoint the frozen slices are the given ones, bit for bit, on the disk too.
    _unpatch(policy, model.stored_dtype)
    policy.eval()
    change = _free_change(policy, reference, proof)
    if change == 0.0:
        raise InputError(
            "training changed none of the free parameters; the learning rate or the number of steps is too small "
            f"(learning_rate = {learning_rate}, {trainer.state.global_step} steps)"
        )
    return Alignment(
        model=Model(policy, model.tokenizer, model.name, model.source, model.stored_dtype),
        log=_training_log(trainer.state.log_history),
        steps=trainer.state.global_step,
        frozen_count=len(frozen) if frozen is not None else 0,
        frozen_identical=identical,
        frozen_sha256=before,
        free_change=change,
    )


def dataset_of(pairs: Sequence[Pair]) -> Any:
    """The pairs in TRL's conversational form, as a ``datasets.Dataset``."""
    from datasets import Dataset

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {"prompt": list(pair.prompt), "chosen": answer(pair.chosen), "rejected": answer(pair.rejected)}
            for pair in pairs
        ]
    )


def _arguments(
    model: Model, pair_count: int, beta: float, learning_rate: float, weight_decay: float, epochs: float,
    batch_size: int, micro_batch_size: int, warmup_share: float, max_length: int, max_grad_norm: float,
    gradient_checkpointing: bool, precision: str, seed: int, checkpoints: Path | None, save_every: int,
) -> Any:  # fmt: skip
    from trl.trainer.dpo_config import DPOConfig

    if batch_size % micro_batch_size:
        raise InputError(f"batch_size ({batch_size}) must be a multiple of micro_batch_size ({micro_batch_size})")
    steps = max(1, round(epochs * pair_count / batch_size))
    saving = checkpoints is not None and save_every > 0
    return DPOConfig(
        output_dir=str(checkpoints) if checkpoints is not None else "unused",
        beta=beta,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        warmup_steps=round(warmup_share * steps),
        lr_scheduler_type="cosine",
        max_length=max_length,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        bf16=precision == "bfloat16" or (precision == "auto" and bfloat16_pays(model.device)),
        use_cpu=model.device.type == "cpu",
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=micro_batch_size,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saving else "no",
        save_steps=save_every if saving else 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
        seed=seed,
        data_seed=seed,
    )


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Report progress after each step, mark whole checkpoints, stop at once when the loss is no longer a number."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise InputError(
                f"the training loss is {loss} at step {state.global_step}; use a smaller learning rate or "
                "precision = 'float32'"
            )


class _Ablate(TrainerCallback):  # type: ignore[misc]
    """Algorithm 1: the neurons are zero in the policy's forward passes of the given share of the steps.

    Which steps depends on their number alone, evenly spread, so that resumed training ablates the same ones.
    """

    def __init__(self, neurons: NeuronSet, share: float) -> None:
        self.neurons = neurons
        self.share = share
        self._block: AbstractContextManager[None] | None = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        step = state.global_step
        if int((step + 1) * self.share) > int(step * self.share):
            assert model is not None, "the trainer hands its model to callbacks"
            self._block = pruned(model, self.neurons)
            self._block.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None


def _last_checkpoint(folder: Path | None) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = list(folder.glob(f"checkpoint-*/{COMPLETE}")) if folder is not None else []
    return str(max(whole, key=lambda path: int(path.parent.name.split("-")[1])).parent) if whole else None


def _unpatch(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Take away the forward that TRL put on the object, and return to the precision it had."""
    vars(network).pop("forward", None)
    network.to(dtype)


def _free_change(policy: nn.Module, reference: nn.Module, proof: Freeze | None) -> float:
    """Relative L2 change of the parameters; frozen slices add nothing to the numerator, being identical."""
    change = size = 0.0
    for after, before in zip(policy.parameters(), reference.parameters(), strict=True):
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return float((change / size) ** 0.5) if size > 0 else 0.0


def _training_log(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {
            "step": entry["step"],
            "loss": entry["loss"],
            "accuracy": entry.get("rewards/accuracies", 0.0),
            "margin": entry.get("rewards/margins", 0.0),
            "grad_norm": entry.get("grad_norm", 0.0),
            "learning_rate": entry.get("learning_rate", 0.0),
        }
        for entry in history
        if "loss" in entry
    ]
