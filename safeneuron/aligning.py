"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, pruned
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
    sft_weight: float = 0.0,
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

    The given model, as it is in memory, is the DPO reference; it is not touched. The result is a new one, trained in
    float32 master weights (``precision``: ``bfloat16`` computes under autocast, ``float32`` does not, ``auto`` chooses
    by the device). ``ablated`` neurons are zero in the policy's forward passes (Algorithm 1; never in the reference's),
    in the share ``ablate_share`` of the optimizer steps. One step sees ``batch_size`` pairs, ``micro_batch_size`` at a
    time. ``sft_weight`` adds so many times the mean negative log-likelihood of a chosen answer's token to the loss.

    With ``checkpoints`` and ``save_every`` steps, interrupted training continues from the last checkpoint there.
    Raises ``InputError`` for pairs that cannot be trained on, a neuron set of another model, a loss or weights that are
    not finite, or training that changed nothing.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    quiet()
    _check_pairs(model, pairs, max_length)
    if ablated is not None:
        ablated.require(model.fingerprint, model.widths)
    set_seed(seed)
    with ExitStack() as cleanup:
        folder = checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
        arguments = _arguments(
            model, len(pairs), beta, sft_weight, learning_rate, weight_decay, epochs, batch_size, micro_batch_size,
            warmup_share, max_length, max_grad_norm, gradient_checkpointing, precision, seed, folder,
            save_every if checkpoints is not None else 0,
        )  # fmt: skip
        policy = copy.deepcopy(model.network).train(False)
        _store_in(torch.float32, policy)
        setattr(policy.config, LINEAGE, model.fingerprint)
        proof = Freeze(policy, frozen) if frozen is not None else None
        digest = proof.digest() if proof is not None else ""
        cleanup.enter_context(_borrowed(policy))
        callbacks: list[TrainerCallback] = []
        if frozen is not None:
            callbacks.append(cleanup.enter_context(closing(FreezeNeurons(frozen))))
        if ablated is not None:
            callbacks.append(cleanup.enter_context(closing(_Ablate(ablated, ablate_share))))
        # The last one, so that a checkpoint is marked as whole only after the freeze has been proved.
        callbacks.append(_Watch(folder, progress))
        trainer = DPOTrainer(
            model=policy,
            args=arguments,
            train_dataset=dataset_of(pairs),
            processing_class=model.tokenizer,
            callbacks=callbacks,
        )
        # The reference's log-probabilities have just been computed, with the policy as it was given.
        assert trainer.ref_model is None, "TRL has loaded another reference than the given model"
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    _store_in(_lasting_dtype(model), policy)
    identical = proof is None or not proof.changed()
    assert identical, "frozen neurons changed in spite of FreezeNeurons"
    change = _free_change(policy, model.network, proof)
    if not 0.0 < change < math.inf:
        raise InputError(
            f"the free parameters have changed by {change:g} of their size after {trainer.state.global_step} steps; "
            f"expected more than nothing and less than infinity, use a learning rate {'below' if change else 'above'} "
            f"{learning_rate:g}"
        )
    return Alignment(
        model=Model(policy, model.tokenizer, model.name, model.source, policy.dtype),
        log=_training_log(trainer.state.log_history),
        steps=trainer.state.global_step,
        frozen_count=len(frozen) if frozen is not None else 0,
        frozen_identical=identical,
        frozen_sha256=digest,
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
    model: Model, pair_count: int, beta: float, sft_weight: float, learning_rate: float, weight_decay: float,
    epochs: float, batch_size: int, micro_batch_size: int, warmup_share: float, max_length: int, max_grad_norm: float,
    gradient_checkpointing: bool, precision: str, seed: int, folder: Path, save_every: int,
) -> Any:  # fmt: skip
    from trl.trainer.dpo_config import DPOConfig

    if batch_size % micro_batch_size:
        raise InputError(f"batch_size ({batch_size}) must be a multiple of micro_batch_size ({micro_batch_size})")
    if precision not in ("auto", "bfloat16", "float32"):
        raise InputError(f"precision {precision!r} is unknown; expected auto, bfloat16 or float32")
    steps = max(1, round(epochs * pair_count / batch_size))
    return DPOConfig(
        output_dir=str(folder),
        beta=beta,
        loss_type=["sigmoid", "sft"] if sft_weight else ["sigmoid"],
        loss_weights=[1.0, sft_weight] if sft_weight else None,
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
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
        seed=seed,
        data_seed=seed,
    )


class _Watch(TrainerCallback):
    """Report progress after each step, mark whole checkpoints, stop before training that diverged is saved."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder = folder
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # From a checkpoint of the last step, the trainer would go on with one step more than was asked for.
        if state.global_step >= state.max_steps:
            control.should_save = False
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (self.folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise InputError(
                    f"training has diverged: {name} is {value} at step {state.global_step}; use a smaller learning "
                    "rate or precision = 'float32'"
                )


class _Ablate(TrainerCallback):
    """Algorithm 1: the neurons are zero in the policy's forward passes of the given share of the steps.

    Which steps depends on their number alone, evenly spread, so that resumed training ablates the same ones.
    """

    def __init__(self, neurons: NeuronSet, share: float) -> None:
        self.neurons = neurons
        self.share = share
        self._block = ExitStack()

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
            self._block.enter_context(pruned(model, self.neurons))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let all neurons be active again, also after a step that ended with an exception."""
        self._block.close()


def _check_pairs(model: Model, pairs: Sequence[Pair], max_length: int) -> None:
    if not pairs:
        raise InputError("there are no preference pairs to train on; check [pairs] in the config")
    if not model.tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {model.name} has no chat template, which the pairs need; set one or use a chat model"
        )
    if not any(len(model.encode(pair.prompt)) < max_length for pair in pairs):
        raise InputError(
            f"none of the {len(pairs)} prompts leaves room for an answer within max_length = {max_length} tokens; "
            "use a larger one"
        )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end.

    The others are removed: the trainer, which keeps only the newest, would count them.
    """
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            whole[int(checkpoint.name.removeprefix("checkpoint-"))] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return str(whole[max(whole)]) if whole else None


@contextmanager
def _borrowed(network: PreTrainedModel) -> Iterator[None]:
    """Within the block a trainer may patch the model and its settings; afterwards both are as they were."""
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


def _lasting_dtype(model: Model) -> torch.dtype:
    """The precision of the given checkpoint, in which the frozen slices are the given ones, bit for bit.

    float32, in which the policy was trained, if the given weights have been changed in memory to values that the
    checkpoint's precision cannot hold.
    """
    dtype = model.stored_dtype
    exact = all(torch.equal(given.to(dtype).to(given.dtype), given) for given in model.network.parameters())
    return dtype if exact else torch.float32


def _store_in(dtype: torch.dtype, network: nn.Module) -> None:
    # Parameters only: the rotary frequencies, which are buffers, are float32 in a model of any precision.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def _free_change(policy: nn.Module, reference: nn.Module, proof: Freeze | None) -> float:
    """Relative L2 change of the parameters; frozen slices add nothing to the numerator, being identical."""
    change = size = 0.0
    for after, before in zip(policy.parameters(), reference.parameters(), strict=True):
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return (change / size) ** 0.5 if size > 0 else 0.0


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
