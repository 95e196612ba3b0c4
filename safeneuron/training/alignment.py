"""Preference optimisation with frozen neurons: TRL's DPO, the given model as reference, and a proof (Eq. 11-12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed

from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import vision_parameters
from safeneuron.neurons.interventions import pruned
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
from safeneuron.training.lora import Adapter, adapters_of, add_adapters, lora_config, require_unpacked
from safeneuron.training.policy import (
    base_of_adapters,
    checkpoint_dtype,
    free_change,
    gathered,
    plain_copy,
    sharing_weights,
    store_in,
    untrained,
)
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


_DEFAULT = TrainingSettings()


@dataclass(frozen=True)
class Alignment:
    """What a round of alignment did: the new model, its training log, and the proof of the freeze.

    Attributes:
        model: The aligned model, in the precision of the given checkpoint where that holds the frozen values exactly.
        log: One record a step: loss, accuracy, margin, gradient norm, learning rate and share of padding.
        steps: The optimizer steps that were done.
        frozen_count: The number of frozen neurons.
        frozen_identical: Whether their slices are bit-identical to the given ones; otherwise there is no result.
        frozen_sha256: The digest of these slices; empty without any.
        free_change: ``|after - before| / |before|`` over all parameters outside the frozen slices.
        at_once: How many pairs were in one pass at the end, 0 for a whole micro-batch: fewer than were asked for if
            memory ran out.
        warnings: What of the data was not used.
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
    *,
    ablation: Ablation | None = None,
    refresh: Refresh | None = None,
    freeze_rest: bool = False,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Train ``model`` on preference pairs with TRL's DPO while the neurons in ``frozen`` stay as they are (Eq. 11-12).

    The given model, as it is in memory, is the DPO reference; it is not touched. The result is a new one, trained in
    float32 master weights. Of a vision-language model the vision tower and the projector stay as they are; its pairs
    may have images.

    With ``training.lora_rank`` adapters are trained, in float32, and merged in float32. The given model may then be in
    4 bits: it counts as the plain model that it computes as, and the result, which is plain, is on the CPU.

    Several ranks, which must see the same folder ``checkpoints``, share each batch (DDP), or also the weights being
    trained (FSDP2, when accelerate says so); all of them get the whole result.

    Args:
        model: The model as given.
        pairs: What is preferred; pairs whose prompt alone fills ``training.max_length`` are left out with a warning.
        frozen: The neurons that stay; ``None`` for plain DPO.
        training: The settings; the defaults are those of the config.
        ablation: Neurons at zero in the policy's forward passes (Algorithm 1).
        refresh: Neurons at zero there that are found again while the policy is trained.
        freeze_rest: Whether what belongs to no neuron is frozen too, so that with the complement of a set as
            ``frozen`` the set alone is trained (SN-Tune).
        checkpoints: A folder for them; with ``training.save_every`` interrupted training goes on from the last one.
        progress: Is told the steps that are done.

    Returns:
        The aligned model with the log of its training and the proof of the freeze.

    Raises:
        InputError: For pairs that cannot be trained on, a neuron set of another model, a model in 4 bits without
            ``lora_rank``, a model of which weights are offloaded, a loss or weights that are not finite, or training
            that changed nothing.
        RuntimeError: If a frozen slice has changed by a single bit.
    """
    require_trainable_settings(training, refresh is not None)
    distributed.start_group()
    _check(model, pairs, training, freeze_rest)
    if ablation is not None:
        ablation.neurons.require(model.fingerprint, model.widths)
    roomy = _with_room(model, pairs, training.max_length)
    set_seed(training.seed)
    task = _Task(model, roomy, frozen, training, ablation, refresh, freeze_rest, checkpoints, progress)
    policy, state, at_once = task.trained()
    given = dequantised(model.network)
    store_in(checkpoint_dtype(given, model.stored_dtype), policy.network.parameters())
    if policy.proof is not None:
        policy.proof.verify()
    change = free_change(policy.network, given, policy.proof, {id(parameter) for parameter in policy.fixed})
    _check_change(change, state.global_step, training.learning_rate)
    return Alignment(
        model=replace(model, network=policy.network, stored_dtype=policy.network.dtype),
        log=training_log(state.log_history),
        steps=state.global_step,
        frozen_count=len(frozen) if frozen is not None else 0,
        frozen_identical=True,
        frozen_sha256=policy.digest,
        free_change=change,
        at_once=at_once,
        warnings=_warnings(len(pairs) - len(roomy), len(pairs), training.max_length),
    )


class _Guarded(NamedTuple):
    """A network with what of it must stay as it is: frozen slices with their digest, and whole parameters."""

    network: PreTrainedModel
    proof: Freeze | None
    digest: str
    fixed: list[nn.Parameter]


@dataclass(frozen=True)
class _Task:
    """One training, as ``align`` was asked for it."""

    model: Model
    pairs: Sequence[Pair]
    frozen: NeuronSet | None
    training: TrainingSettings
    ablation: Ablation | None
    refresh: Refresh | None
    freeze_rest: bool
    checkpoints: Path | None
    progress: Progress | None

    def trained(self) -> tuple[_Guarded, TrainerState, int]:
        """The trained weights as a plain network, the trainer's state, and how many pairs were in one pass at last."""
        adapted = self.training.lora_rank > 0
        network = base_of_adapters(self.model, self.training) if adapted else plain_copy(self.model)
        if is_sharded() and not adapted:
            network.cpu()  # FSDP2 takes it to the GPU in shards.
        # Of adapters the slices are guarded by the callback alone: what they are merged into is another network.
        policy = _Guarded(network, None, "", []) if adapted else self.guarded(network)
        del network
        state, at_once, adapters = self.train(policy)
        # The memory of the optimizer is needed for what is put together next.
        hand_back_memory()
        if adapted:
            policy = self.guarded(plain_copy(self.model))
            add_adapters(adapters, policy.network)
        elif any(isinstance(parameter, DTensor) for parameter in policy.network.parameters()):
            # The proof compares with the values of the given model, before the trained ones take their place.
            whole = self.guarded(plain_copy(self.model))
            policy = whole._replace(network=gathered(policy.network, whole.network))
        return policy, state, at_once

    def guarded(self, network: PreTrainedModel) -> _Guarded:
        """The network with what must stay of it, as it is now; the vision tower and the projector always must."""
        proof = Freeze(network, self.frozen, whole_layers=self.freeze_rest) if self.frozen is not None else None
        fixed = vision_parameters(network)
        if self.freeze_rest:
            fixed = [*fixed, *parameters_of_no_neuron(network)]
        elif self.training.freeze_routers:
            fixed = [*fixed, *routers(network)]
        return _Guarded(network, proof, proof.digest() if proof is not None else "", [*fixed])

    def train(self, policy: _Guarded) -> tuple[TrainerState, int, list[Adapter]]:
        """Train the policy's network; the trainer's state, how many pairs were in one pass, and the adapters."""
        with ExitStack() as cleanup:
            folder = self.checkpoints or Path(cleanup.enter_context(TemporaryDirectory()))
            cleanup.enter_context(model_restored(policy.network))
            cleanup.enter_context(answers_scored_alone())
            cleanup.enter_context(untrained(policy.fixed))
            callbacks: list[TrainerCallback] = []
            if self.frozen is not None:
                freeze = FreezeNeurons(self.frozen, whole_layers=self.freeze_rest)
                callbacks.append(cleanup.enter_context(closing(freeze)))
            if self.ablation is not None:
                callbacks.append(cleanup.enter_context(closing(AblateSteps(self.ablation))))
            # The last one, so that a checkpoint is marked as whole only after the freeze has been proved.
            callbacks.append(Watch(folder, self.progress))
            trainer = self.trainer(policy.network, folder, callbacks)
            sharded = trainer.is_fsdp_enabled
            trainer.train(resume_from_checkpoint=distributed.from_main(lambda: last_checkpoint(folder, sharded)))
            return trainer.state, trainer.at_once, adapters_of(policy.network)

    def trainer(self, network: PreTrainedModel, folder: Path, callbacks: list[TrainerCallback]) -> PreferenceTrainer:
        """The trainer of the network, with the reference's log-probabilities computed.

        That is done while the trainer is made, with the policy as it was given. To weights that will be spread over the
        ranks TRL wants another object, or it loads one by the model's name.
        """
        from safeneuron.training.dpo import PreferenceTrainer, data_of
        from safeneuron.training.refresh import RefreshTrainer

        model, training, ablation = self.model, self.training, self.ablation
        reference = sharing_weights(network) if is_sharded() and not training.lora_rank else None
        dataset, collator = data_of(model, self.pairs, training.max_length)
        judged_by = network if reference is None else reference
        with pruned(judged_by, ablation.neurons if ablation is not None and ablation.reference else None):
            settings = {
                "model": network,
                "ref_model": reference,
                "args": arguments_of(
                    training, len(self.pairs), model.device, folder, save=self.checkpoints is not None
                ),
                "train_dataset": dataset,
                "data_collator": collator,
                "processing_class": model.tokenizer,
                "callbacks": callbacks,
                "peft_config": lora_config(network, training) if training.lora_rank else None,
                "at_once": training.at_once,
            }
            if self.refresh is None:
                trainer = PreferenceTrainer(**settings)
            else:
                trainer = RefreshTrainer(refresh=self.refresh, given=model, **settings)
        # On weights in 4 bits TRL puts the adapters into bfloat16, where small steps are lost.
        store_in(torch.float32, (parameter for parameter in network.parameters() if parameter.requires_grad))
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
