"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import vision_parameters
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import LINEAGE
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import parameters_of_no_neuron, routers
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import hand_back_memory
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.patches import answers_scored_alone
from safeneuron.runtime.progress import Progress
from safeneuron.runtime.quantization import dequantised, has_four_bits
from safeneuron.training.ablation import AblateSteps, Ablation, Refresh
from safeneuron.training.freezing import Freeze, FreezeNeurons
from safeneuron.training.lora import adapters_of, add_adapters, lora_config, require_unpacked
from safeneuron.training.settings import (
    TrainingSettings,
    Watch,
    arguments_of,
    is_sharded,
    last_checkpoint,
    model_restored,
    require_trainable_settings,
    training_log,
)

if TYPE_CHECKING:
    from safeneuron.training.dpo import PreferenceTrainer


def plain_copy(model: Model) -> PreTrainedModel:
    """A copy of the given network in float32, which may be changed and remembers whose neurons it has."""
    plain = dequantised(model.network)
    if plain is model.network:
        plain = copy.deepcopy(plain)
    store_in(torch.float32, plain.parameters())
    setattr(plain.config, LINEAGE, model.fingerprint)
    plain.train(False)
    return plain


def base_of_adapters(model: Model, training: TrainingSettings) -> PreTrainedModel:
    """A copy of the given network for adapters: in 4 bits, if it is, or else in the precision that loses nothing.

    That is bfloat16 where training computes in it and the checkpoint was stored in it, with half the memory of float32.
    FSDP2 wants one precision for all.
    """
    base = copy.deepcopy(model.network)
    if not has_four_bits(base):
        lasting = checkpoint_dtype(base, model.stored_dtype)
        small = lasting == torch.bfloat16 and training.computes_in_bfloat16(model.device) and not is_sharded()
        store_in(torch.bfloat16 if small else torch.float32, base.parameters())
    setattr(base.config, LINEAGE, model.fingerprint)
    base.train(False)
    return base


def sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """The same model as another object whose weights are the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, dict(weights))


def gathered(
    trained: nn.Module, model: Model, frozen: NeuronSet | None, whole_layers: bool
) -> tuple[PreTrainedModel, Freeze | None]:
    """The trained weights, which are spread over the ranks, as a plain network on each, and the proof of its freeze.

    One parameter after the other is gathered; the proof compares with the values of the given ``model``.
    """
    whole = plain_copy(model)
    proof = Freeze(whole, frozen, whole_layers=whole_layers) if frozen is not None else None
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            now = trained.get_parameter(name)
            parameter.copy_(now.full_tensor() if isinstance(now, DTensor) else now)
    return whole, proof


def checkpoint_dtype(network: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The precision of the given checkpoint, in which the frozen slices are the given ones, bit for bit.

    float32, in which the policy was trained, if the given weights have been changed in memory to values that the
    checkpoint's precision cannot hold.
    """
    exact = all(torch.equal(given.to(dtype).to(given.dtype), given) for given in network.parameters())
    return dtype if exact else torch.float32


def store_in(dtype: torch.dtype, parameters: Iterable[nn.Parameter]) -> None:
    """Keep the parameters in this precision from now on."""
    # Parameters only: the rotary frequencies, which are buffers, are float32 in a model of any precision.
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


@contextmanager
def untrained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradient is computed for these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def free_change(policy: nn.Module, reference: nn.Module, proof: Freeze | None, fixed: Collection[int]) -> float:
    """Relative L2 change of what was trained; ``fixed`` holds the ids of the policy's parameters that were not.

    Frozen slices add nothing to the numerator, being identical.
    """
    change = size = 0.0
    for (name, after), before in zip(policy.named_parameters(), reference.parameters(), strict=True):
        if id(after) in fixed:
            if not torch.equal(after.to(before.dtype), before):
                raise RuntimeError(f"the parameter {name}, which was not to be trained, has changed")
            continue
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return (change / size) ** 0.5 if size > 0 else 0.0


_DEFAULT = TrainingSettings()


@dataclass(frozen=True)
class Alignment:
    """What a round of alignment did: the new model, its training log, and the proof of the freeze.

    ``free_change`` is |theta_after - theta_before| / |theta_before| over all parameters outside the frozen slices.
    ``warnings`` says what of the data was not used, ``at_once`` how many pairs were in one pass at its end, 0 for a
    whole micro-batch: fewer than was asked for if memory ran out.
    """

    model: Model
    log: list[dict[str, float]]
    steps: int
    frozen_count: int
    frozen_identical: bool
    frozen_sha256: str
    free_change: float
    at_once: int
    warnings: tuple[str, ...] = ()


def align(
    model: Model,
    pairs: Sequence[Pair],
    frozen: NeuronSet | None,
    training: TrainingSettings = _DEFAULT,
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
    neuron, so that with the complement of a set as ``frozen`` the set alone is trained (SN-Tune). Of a vision-language
    model the vision tower and the projector stay as they are; its pairs may have images.

    With ``training.lora_rank`` adapters are trained, in float32, and merged in float32. The given model may then be in
    4 bits: it counts as the plain model that it computes as, and the result, which is plain, is on the CPU.

    With ``checkpoints`` and ``training.save_every``, interrupted training continues from the last checkpoint there.
    Several ranks, which must see the same folder there, share each batch (DDP), or also the weights being trained
    (FSDP2, when accelerate says so); all of them get the whole result.

    Raises ``InputError`` for pairs that cannot be trained on, a neuron set of another model, a model in 4 bits without
    ``lora_rank``, a model of which weights are offloaded, a loss or weights that are not finite, or training that
    changed nothing.
    """
    require_trainable_settings(training, refresh is not None)
    distributed.start_group()
    _check(model, pairs, training, freeze_rest)
    if ablation is not None:
        ablation.neurons.require(model.fingerprint, model.widths)
    roomy = _with_room(model, pairs, training.max_length)
    set_seed(training.seed)
    held = frozen if not training.lora_rank else None
    with ExitStack() as cleanup:
        folder = checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
        policy = base_of_adapters(model, training) if training.lora_rank else plain_copy(model)
        if is_sharded() and not training.lora_rank:
            policy.cpu()  # FSDP2 takes it to the GPU in shards.
        proof = Freeze(policy, held, whole_layers=freeze_rest) if held is not None else None
        digest = proof.digest() if proof is not None else ""
        cleanup.enter_context(model_restored(policy))
        cleanup.enter_context(answers_scored_alone())
        fixed = _fixed(policy, training, freeze_rest) if not training.lora_rank else []
        cleanup.enter_context(untrained(fixed))
        callbacks: list[TrainerCallback] = []
        if frozen is not None:
            callbacks.append(cleanup.enter_context(closing(FreezeNeurons(frozen, whole_layers=freeze_rest))))
        if ablation is not None:
            callbacks.append(cleanup.enter_context(closing(AblateSteps(ablation))))
        # The last one, so that a checkpoint is marked as whole only after the freeze has been proved.
        callbacks.append(Watch(folder, progress))
        arguments = arguments_of(training, len(roomy), model.device, folder, checkpoints is not None)
        trainer = _trainer(policy, model, roomy, training, arguments, ablation, refresh, callbacks)
        sharded = trainer.is_fsdp_enabled
        trainer.train(resume_from_checkpoint=distributed.from_main(lambda: last_checkpoint(folder, sharded)))
        adapters = adapters_of(policy)
    state, at_once = trainer.state, trainer.at_once
    # The memory of its optimizer is needed for what is put together next.
    del trainer
    hand_back_memory()
    if training.lora_rank:
        policy = plain_copy(model)
        proof = Freeze(policy, frozen, whole_layers=freeze_rest) if frozen is not None else None
        digest = proof.digest() if proof is not None else ""
        fixed = _fixed(policy, training, freeze_rest)
        add_adapters(adapters, policy)
    elif any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        policy, proof = gathered(policy, model, frozen, freeze_rest)
        fixed = _fixed(policy, training, freeze_rest)
    given = dequantised(model.network)
    store_in(checkpoint_dtype(given, model.stored_dtype), policy.parameters())
    if proof is not None:
        proof.verify()
    change = free_change(policy, given, proof, {id(parameter) for parameter in fixed})
    _check_change(change, state.global_step, training.learning_rate)
    return Alignment(
        model=replace(model, network=policy, stored_dtype=policy.dtype),
        log=training_log(state.log_history),
        steps=state.global_step,
        frozen_count=len(frozen) if frozen is not None else 0,
        frozen_identical=True,
        frozen_sha256=digest,
        free_change=change,
        at_once=at_once,
        warnings=_warnings(len(pairs) - len(roomy), len(pairs), training.max_length),
    )


def _fixed(policy: PreTrainedModel, training: TrainingSettings, freeze_rest: bool) -> list[nn.Parameter]:
    """Whole parameters that are not trained; the vision tower and the projector never are."""
    sight = vision_parameters(policy)
    if freeze_rest:
        return [*sight, *parameters_of_no_neuron(policy)]
    return [*sight, *(routers(policy) if training.freeze_routers else [])]


def _trainer(
    policy: PreTrainedModel,
    model: Model,
    pairs: Sequence[Pair],
    training: TrainingSettings,
    arguments: Any,
    ablation: Ablation | None,
    refresh: Refresh | None,
    callbacks: list[TrainerCallback],
) -> PreferenceTrainer:
    """The trainer of ``policy``, with the reference's log-probabilities computed.

    That is done while the trainer is made, with the policy as it was given. To weights that will be spread over the
    ranks TRL wants another object, or it loads one by the model's name.
    """
    from safeneuron.training.dpo import PreferenceTrainer, data_of
    from safeneuron.training.refresh import RefreshTrainer

    reference = sharing_weights(policy) if is_sharded() and not training.lora_rank else None
    dataset, collator = data_of(model, pairs, training.max_length)
    judged_by = policy if reference is None else reference
    with pruned(judged_by, ablation.neurons if ablation is not None and ablation.reference else None):
        settings = {
            "model": policy,
            "ref_model": reference,
            "args": arguments,
            "train_dataset": dataset,
            "data_collator": collator,
            "processing_class": model.tokenizer,
            "callbacks": callbacks,
            "peft_config": lora_config(policy, training) if training.lora_rank else None,
            "at_once": training.at_once,
        }
        if refresh is None:
            trainer = PreferenceTrainer(**settings)
        else:
            trainer = RefreshTrainer(refresh=refresh, given=model, **settings)
    # On weights in 4 bits TRL puts the adapters into bfloat16, where small steps are lost.
    store_in(torch.float32, (one for one in policy.parameters() if one.requires_grad))
    return trainer


def _check(model: Model, pairs: Sequence[Pair], training: TrainingSettings, freeze_rest: bool) -> None:
    _check_pairs(model, pairs)
    require_whole(model.network, "align")
    if has_four_bits(model.network) and not training.lora_rank:
        raise InputError(
            f"the weights of {model.name} are in 4 bits, so they cannot be trained; set lora_rank to train adapters on "
            "them, or load the model without quantise"
        )
    require_unpacked(
        model.network,
        "align trains plain weights or adapters that it merges; load an unpacked checkpoint (quantise = '4bit' for "
        "QLoRA), or train adapters beside FreezeNeurons in a trainer of your own",
    )
    if freeze_rest and training.lora_rank and training.lora_targets != "ffn":
        raise InputError(
            f"with everything but the safety neurons frozen, adapters have no place outside the FFNs; expected "
            f"lora_targets = 'ffn', found {training.lora_targets!r}; change it"
        )


def _check_change(change: float, steps: int, learning_rate: float) -> None:
    if not 0.0 < change < math.inf:
        raise InputError(
            f"the free parameters have changed by {change:g} of their size after {steps} steps; expected more than "
            f"nothing and less than infinity, use a learning rate {'below' if change else 'above'} {learning_rate:g}"
        )


def _check_pairs(model: Model, pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise InputError("there are no preference pairs to train on; check [pairs] in the config")
    if not model.has_template:
        raise InputError(
            f"the tokenizer of {model.name} has no chat template, which the pairs need; set one or use a chat model"
        )
    for number, pair in enumerate(pairs, start=1):
        if pair.chosen == pair.rejected:
            raise InputError(
                f"pair {number} of {len(pairs)}{f' (from {pair.source})' if pair.source else ''} has the same chosen "
                "and rejected answer, from which nothing can be learnt; leave it out"
            )


def _with_room(model: Model, pairs: Sequence[Pair], max_length: int) -> list[Pair]:
    """The pairs whose prompt leaves room for an answer; TRL would leave the others out without a word."""
    roomy = [pair for pair in pairs if len(model.encode(pair.prompt, pair.image)) < max_length]
    if not roomy:
        raise InputError(
            f"none of the {len(pairs)} prompts leaves room for an answer within max_length = {max_length} tokens; "
            "use a larger one"
        )
    return roomy


def _warnings(long: int, given: int, max_length: int) -> tuple[str, ...]:
    if not long:
        return ()
    return (f"{long} of {given} pairs were not trained on: their prompt alone fills max_length = {max_length} tokens",)
