"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from safeneuron import ranks
from safeneuron.ablating import AblateSteps, Ablation, Refresh
from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, parameters_of_no_neuron, pruned
from safeneuron.freezing import Freeze, FreezeNeurons
from safeneuron.models import Model, quiet
from safeneuron.neurons import NeuronSet
from safeneuron.training import (
    Progress,
    Training,
    Watch,
    arguments_of,
    borrowed,
    is_sharded,
    last_checkpoint,
    require_trainable,
    training_log,
)

DEFAULT = Training()


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
    training: Training = DEFAULT,
    ablation: Ablation | None = None,
    refresh: Refresh | None = None,
    freeze_rest: bool = False,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Train ``model`` on preference pairs with TRL's DPO while the neurons in ``frozen`` stay as they are (Eq. 11-12).

    The given model, as it is in memory, is the DPO reference; it is not touched. The result is a new one, trained in
    float32 master weights. ``ablation`` sets neurons to zero in the policy's forward passes (Algorithm 1); ``refresh``
    does so with neurons that are found again while it is trained. ``freeze_rest`` also freezes what belongs to no
    neuron, so that with the complement of a set as ``frozen`` the set alone is trained (SN-Tune).

    With ``checkpoints`` and ``training.save_every``, interrupted training continues from the last checkpoint there.
    Several ranks, which must see the same folder there, share each batch (DDP), or also the weights being trained
    (FSDP2, when accelerate says so); all of them get the whole result.

    Raises ``InputError`` for pairs that cannot be trained on, a neuron set of another model, a loss or weights that are
    not finite, or training that changed nothing.
    """
    from safeneuron.dpo import PreferenceTrainer, answers_scored_alone, dataset_of
    from safeneuron.refreshing import RefreshTrainer

    quiet()
    require_trainable(training, refresh is not None)
    ranks.start_group()
    _check_pairs(model, pairs, training.max_length)
    if ablation is not None:
        ablation.neurons.require(model.fingerprint, model.widths)
    set_seed(training.seed)
    with ExitStack() as cleanup:
        folder = checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
        policy = copy.deepcopy(model.network).train(False)
        _store_in(torch.float32, policy)
        setattr(policy.config, LINEAGE, model.fingerprint)
        proof = Freeze(policy, frozen, whole_layers=freeze_rest) if frozen is not None else None
        digest = proof.digest() if proof is not None else ""
        cleanup.enter_context(borrowed(policy))
        cleanup.enter_context(answers_scored_alone())
        fixed = parameters_of_no_neuron(policy) if freeze_rest else []
        cleanup.enter_context(_untrained(fixed))
        callbacks: list[TrainerCallback] = []
        if frozen is not None:
            callbacks.append(cleanup.enter_context(closing(FreezeNeurons(frozen, whole_layers=freeze_rest))))
        if ablation is not None:
            callbacks.append(cleanup.enter_context(closing(AblateSteps(ablation))))
        # The last one, so that a checkpoint is marked as whole only after the freeze has been proved.
        callbacks.append(Watch(folder, progress))
        # The reference's log-probabilities are computed while the trainer is made, with the policy as it was given. To
        # weights that will be spread over the ranks TRL wants another object, or it loads one by the model's name.
        reference = _sharing_weights(policy) if is_sharded() else None
        judged_by = policy if reference is None else reference
        with pruned(judged_by, ablation.neurons if ablation is not None and ablation.reference else None):
            trainer = (PreferenceTrainer if refresh is None else RefreshTrainer)(
                model=policy,
                ref_model=reference,
                args=arguments_of(training, len(pairs), model.device, folder, checkpoints is not None),
                train_dataset=dataset_of(pairs),
                processing_class=model.tokenizer,
                callbacks=callbacks,
            )
        assert reference is not None or trainer.ref_model is None, (
            "TRL has loaded another reference than the given model"
        )
        trainer.ref_model = reference = None
        if isinstance(trainer, RefreshTrainer):
            assert refresh is not None, "the class was chosen by it"
            trainer.refresh = refresh
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=ranks.from_main(lambda: last_checkpoint(folder)))
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        policy, proof = _gathered(policy, model, frozen, freeze_rest)
        fixed = parameters_of_no_neuron(policy) if freeze_rest else []
    _store_in(_lasting_dtype(model), policy)
    identical = proof is None or not proof.changed()
    assert identical, "frozen neurons changed in spite of FreezeNeurons"
    change = _free_change(policy, model.network, proof, {id(parameter) for parameter in fixed})
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


def _sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """The same model as another object whose weights are the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, dict(weights))


def _gathered(
    trained: nn.Module, model: Model, frozen: NeuronSet | None, whole_layers: bool
) -> tuple[PreTrainedModel, Freeze | None]:
    """The trained weights, which are spread over the ranks, as a plain network on each, and the proof of its freeze.

    One parameter after the other is gathered; the proof compares with the values of the given ``model``.
    """
    whole = copy.deepcopy(model.network).train(False)
    _store_in(torch.float32, whole)
    setattr(whole.config, LINEAGE, model.fingerprint)
    proof = Freeze(whole, frozen, whole_layers=whole_layers) if frozen is not None else None
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            now = trained.get_parameter(name)
            parameter.copy_(now.full_tensor() if isinstance(now, DTensor) else now)
    return whole, proof


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


@contextmanager
def _untrained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradient is computed for these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _free_change(policy: nn.Module, reference: nn.Module, proof: Freeze | None, fixed: Collection[int]) -> float:
    """Relative L2 change of what was trained; ``fixed`` holds the ids of the policy's parameters that were not.

    Frozen slices add nothing to the numerator, being identical.
    """
    change = size = 0.0
    for after, before in zip(policy.parameters(), reference.parameters(), strict=True):
        if id(after) in fixed:
            assert torch.equal(after.to(before.dtype), before), "a parameter that was not to be trained has changed"
            continue
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return (change / size) ** 0.5 if size > 0 else 0.0
