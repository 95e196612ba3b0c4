"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
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
from safeneuron.adapters import adapters_of, add_adapters, lora_config
from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, parameters_of_no_neuron, pruned
from safeneuron.freezing import Freeze, FreezeNeurons
from safeneuron.models import Model, quiet
from safeneuron.neurons import NeuronSet
from safeneuron.quantising import dequantised, has_four_bits
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

    With ``training.lora_rank`` adapters are trained, in float32, and merged in float32. The given model may then be in
    4 bits: it counts as the plain model that it computes as, and the result, which is plain, is on the CPU.

    With ``checkpoints`` and ``training.save_every``, interrupted training continues from the last checkpoint there.
    Several ranks, which must see the same folder there, share each batch (DDP), or also the weights being trained
    (FSDP2, when accelerate says so); all of them get the whole result.

    Raises ``InputError`` for pairs that cannot be trained on, a neuron set of another model, a model in 4 bits without
    ``lora_rank``, a loss or weights that are not finite, or training that changed nothing.
    """
    from safeneuron.dpo import PreferenceTrainer, answers_scored_alone, dataset_of
    from safeneuron.refreshing import RefreshTrainer

    quiet()
    require_trainable(training)
    ranks.start_group()
    _check_pairs(model, pairs, training.max_length)
    if has_four_bits(model.network) and not training.lora_rank:
        raise InputError(
            f"the weights of {model.name} are in 4 bits, so they cannot be trained; set lora_rank to train adapters on "
            "them, or load the model without quantise"
        )
    if freeze_rest and training.lora_rank and training.lora_targets != "ffn":
        raise InputError(
            f"with everything but the safety neurons frozen, adapters have no place outside the FFNs; expected "
            f"lora_targets = 'ffn', found {training.lora_targets!r}; change it"
        )
    if ablation is not None:
        ablation.neurons.require(model.fingerprint, model.widths)
    set_seed(training.seed)
    with ExitStack() as cleanup:
        folder = checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
        policy = _base_of_adapters(model, training) if training.lora_rank else _plain_copy(model)
        held = frozen if not training.lora_rank else None
        proof = Freeze(policy, held, whole_layers=freeze_rest) if held is not None else None
        digest = proof.digest() if proof is not None else ""
        cleanup.enter_context(borrowed(policy))
        cleanup.enter_context(answers_scored_alone())
        fixed = parameters_of_no_neuron(policy) if freeze_rest and not training.lora_rank else []
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
        reference = _sharing_weights(policy) if is_sharded() and not training.lora_rank else None
        judged_by = policy if reference is None else reference
        with pruned(judged_by, ablation.neurons if ablation is not None and ablation.reference else None):
            trainer = (PreferenceTrainer if refresh is None else RefreshTrainer)(
                model=policy,
                ref_model=reference,
                args=arguments_of(training, len(pairs), model.device, folder, checkpoints is not None),
                train_dataset=dataset_of(pairs),
                processing_class=model.tokenizer,
                callbacks=callbacks,
                peft_config=lora_config(policy, training) if training.lora_rank else None,
            )
        assert reference is not None or trainer.ref_model is None, (
            "TRL has loaded another reference than the given model"
        )
        trainer.ref_model = reference = None
        if isinstance(trainer, RefreshTrainer):
            assert refresh is not None, "the class was chosen by it"
            trainer.refresh = refresh
        trainer.remove_callback(PrinterCallback)
        # On weights in 4 bits TRL puts the adapters into bfloat16, where small steps are lost.
        _store_in(torch.float32, (one for one in policy.parameters() if one.requires_grad))
        trainer.train(resume_from_checkpoint=ranks.from_main(lambda: last_checkpoint(folder)))
        adapters = adapters_of(policy)
    if training.lora_rank:
        policy = _plain_copy(model)
        proof = Freeze(policy, frozen, whole_layers=freeze_rest) if frozen is not None else None
        digest = proof.digest() if proof is not None else ""
        fixed = parameters_of_no_neuron(policy) if freeze_rest else []
        add_adapters(adapters, policy)
    elif any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        policy, proof = _gathered(policy, model, frozen)
    given = dequantised(model.network)
    _store_in(_lasting_dtype(given, model.stored_dtype), policy.parameters())
    identical = proof is None or not proof.changed()
    assert identical, "frozen neurons changed in spite of FreezeNeurons"
    change = _free_change(policy, given, proof, {id(parameter) for parameter in fixed})
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


def _plain_copy(model: Model) -> PreTrainedModel:
    """A copy of the given network in float32, which may be changed and remembers whose neurons it has."""
    plain = dequantised(model.network)
    if plain is model.network:
        plain = copy.deepcopy(plain)
    _store_in(torch.float32, plain.parameters())
    setattr(plain.config, LINEAGE, model.fingerprint)
    plain.train(False)
    return plain


def _base_of_adapters(model: Model, training: Training) -> PreTrainedModel:
    """A copy of the given network for adapters: in 4 bits, if it is, or else in the precision that loses nothing.

    That is bfloat16 where training computes in it and the checkpoint was stored in it, with half the memory of float32.
    FSDP2 wants one precision for all.
    """
    base = copy.deepcopy(model.network)
    if not has_four_bits(base):
        lasting = _lasting_dtype(base, model.stored_dtype)
        small = lasting == torch.bfloat16 and training.computes_in_bfloat16(model.device) and not is_sharded()
        _store_in(torch.bfloat16 if small else torch.float32, base.parameters())
    setattr(base.config, LINEAGE, model.fingerprint)
    base.train(False)
    return base


def _sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """The same model as another object whose weights are the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, dict(weights))


def _gathered(trained: nn.Module, model: Model, frozen: NeuronSet | None) -> tuple[PreTrainedModel, Freeze | None]:
    """The trained weights, which are spread over the ranks, as a plain network on each, and the proof of its freeze.

    One parameter after the other is gathered; the proof compares with the values of the given ``model``.
    """
    whole = _plain_copy(model)
    proof = Freeze(whole, frozen) if frozen is not None else None
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            now = trained.get_parameter(name)
            parameter.copy_(now.full_tensor() if isinstance(now, DTensor) else now)
    return whole, proof


def _lasting_dtype(network: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The precision of the given checkpoint, in which the frozen slices are the given ones, bit for bit.

    float32, in which the policy was trained, if the given weights have been changed in memory to values that the
    checkpoint's precision cannot hold.
    """
    exact = all(torch.equal(given.to(dtype).to(given.dtype), given) for given in network.parameters())
    return dtype if exact else torch.float32


def _store_in(dtype: torch.dtype, parameters: Iterable[nn.Parameter]) -> None:
    # Parameters only: the rotary frequencies, which are buffers, are float32 in a model of any precision.
    for parameter in parameters:
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
