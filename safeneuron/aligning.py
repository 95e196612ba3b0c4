"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from safeneuron.ablating import AblateSteps, Ablation
from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, pruned
from safeneuron.freezing import Freeze, FreezeNeurons
from safeneuron.models import Model, quiet
from safeneuron.neurons import NeuronSet
from safeneuron.training import Progress, Training, Watch, arguments_of, borrowed, last_checkpoint, training_log

DEFAULT = Training()


@dataclass(frozen=True)
class Alignment:
    """What a round of alignment did: the new model, its training log, and the proof of the freeze.

    ``free_change`` is |theta_after - theta_before| / |theta_before| over all parameters outside the frozen slices.
    ``at_once`` is the largest number of pairs in one pass at its end, 0 for a whole micro-batch; less than was asked for
    if memory ran out.
    """

    model: Model
    log: list[dict[str, float]]
    steps: int
    frozen_count: int
    frozen_identical: bool
    frozen_sha256: str
    free_change: float
    at_once: int


def align(
    model: Model,
    pairs: Sequence[Pair],
    frozen: NeuronSet | None,
    training: Training = DEFAULT,
    ablation: Ablation | None = None,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Train ``model`` on preference pairs with TRL's DPO while the neurons in ``frozen`` stay as they are (Eq. 11-12).

    The given model, as it is in memory, is the DPO reference; it is not touched. The result is a new one, trained in
    float32 master weights. ``ablation`` sets neurons to zero in the policy's forward passes (Algorithm 1).

    With ``checkpoints`` and ``training.save_every``, interrupted training continues from the last checkpoint there.
    Raises ``InputError`` for pairs that cannot be trained on, a neuron set of another model, a loss or weights that are
    not finite, or training that changed nothing.
    """
    from safeneuron.dpo import PreferenceTrainer, dataset_of

    quiet()
    _check_pairs(model, pairs, training.max_length)
    if ablation is not None:
        ablation.neurons.require(model.fingerprint, model.widths)
    set_seed(training.seed)
    with ExitStack() as cleanup:
        folder = checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
        policy = copy.deepcopy(model.network).train(False)
        _store_in(torch.float32, policy)
        setattr(policy.config, LINEAGE, model.fingerprint)
        proof = Freeze(policy, frozen) if frozen is not None else None
        digest = proof.digest() if proof is not None else ""
        cleanup.enter_context(borrowed(policy))
        callbacks: list[TrainerCallback] = []
        if frozen is not None:
            callbacks.append(cleanup.enter_context(closing(FreezeNeurons(frozen))))
        if ablation is not None:
            callbacks.append(cleanup.enter_context(closing(AblateSteps(ablation))))
        # The last one, so that a checkpoint is marked as whole only after the freeze has been proved.
        callbacks.append(Watch(folder, progress))
        # The reference's log-probabilities are computed while the trainer is made, with the policy as it was given.
        with pruned(policy, ablation.neurons if ablation is not None and ablation.reference else None):
            trainer = PreferenceTrainer(
                model=policy,
                args=arguments_of(training, len(pairs), model.device, folder, checkpoints is not None),
                train_dataset=dataset_of(pairs),
                processing_class=model.tokenizer,
                callbacks=callbacks,
            )
        # The reference may have shown already that fewer fit into memory.
        trainer.at_once = min(filter(None, (training.at_once, trainer.at_once)), default=0)
        assert trainer.ref_model is None, "TRL has loaded another reference than the given model"
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    _store_in(_lasting_dtype(model), policy)
    identical = proof is None or not proof.changed()
    assert identical, "frozen neurons changed in spite of FreezeNeurons"
    change = _free_change(policy, model.network, proof)
    if not 0.0 < change < math.inf:
        raise InputError(
            f"the free parameters have changed by {change:g} of their size after {trainer.state.global_step} steps; "
            f"expected more than nothing and less than infinity, use a learning rate {'below' if change else 'above'} "
            f"{training.learning_rate:g}"
        )
    return Alignment(
        model=Model(policy, model.tokenizer, model.name, model.source, policy.dtype),
        log=training_log(trainer.state.log_history),
        steps=trainer.state.global_step,
        frozen_count=len(frozen) if frozen is not None else 0,
        frozen_identical=identical,
        frozen_sha256=digest,
        free_change=change,
        at_once=trainer.at_once,
    )


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
