"""Exact freezing of neurons while the rest of the model is trained, in anyone's trainer.

A gradient mask alone does not freeze: decoupled weight decay and stale momentum still move the weights. A restore alone
does, but gradient clipping then counts gradients that will not be used. So both: the frozen slices' gradients are set
to zero as soon as they are accumulated (before clipping), and the slices are put back after each optimizer step.
Only the slices are stored and touched, never a mask of the size of the model. Where several processes share a
parameter, each holds and restores its own part of the slices (``runtime.sharding``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.errors import InputError
from safeneuron.neurons.layout import LINEAGE, HasNetwork, config_of, fingerprint, network_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices, require_trainable
from safeneuron.runtime import sharding
from safeneuron.training.lora import adapter_slices


class HasRunningModel(Protocol):
    """A callback that keeps an average of the model over the steps in ``running_model``, as TRL's BEMACallback does."""

    @property
    def running_model(self) -> nn.Module | None:
        """The average; ``None`` before training."""
        ...


class Freeze:
    """The slices of some neurons, held at the values they had when this object was made (Eq. 12).

    ``attach`` before training, ``detach`` after it; ``verify`` whenever a proof is wanted. Where processes share the
    model, all of them make this object, once the model has been wrapped or sharded, and all ask for ``changed``,
    ``verify`` and ``digest``, which have one answer.

    LoRA adapters of PEFT are held where they are without effect on these neurons: their slices are set to zero, which
    changes nothing that the model computes (see ``lora.adapter_slices``, also for what is refused).

    Args:
        model: The model that will be trained.
        neurons: What is frozen.
        whole_layers: Whether every neuron of a layer may be frozen.

    Raises:
        InputError: For neurons of another model, for every neuron of a layer unless that is meant, for FFN weights that
            are quantised, tied, or sharded in a way that is not understood, and where processes were given different
            neurons.
    """

    def __init__(self, model: nn.Module | HasNetwork, neurons: NeuronSet, *, whole_layers: bool = False) -> None:
        self.network = network_of(model)
        if not sharding.same_everywhere(_name_of(neurons)):
            raise InputError(
                f"the processes were given different neurons to freeze (here {neurons}); find them in one process, "
                "save them, and read them in all (NeuronSet.save, NeuronSet.load)"
            )
        sharding.settle(self.network)
        require_trainable(self.network)
        self.slices = [*owned_slices(self.network, neurons), *adapter_slices(self.network, neurons)]
        if not whole_layers:
            _require_free(neurons)
        self.parts = self._parts_in(self.network)
        self.saved = [part.values() for part in self.parts]
        self._handles: list[RemovableHandle] = []
        # Whatever trainer saves this network, its config now says whose neurons it has.
        setattr(config_of(self.network), LINEAGE, fingerprint(self.network))

    def attach(self, *optimizers: Any) -> None:
        """Mask gradients from now on, check that before every step of an optimizer, restore the slices after it.

        Args:
            optimizers: Optimizers of torch, or what accelerate or DeepSpeed made of them.

        Raises:
            InputError: If one steps in a way that cannot be followed.
        """
        steppers = [sharding.stepper(optimizer) for optimizer in optimizers]
        self._parts_now(self.network)
        for piece in self.slices:
            if piece.parameter.requires_grad:
                handle = sharding.keep_gradient_zero(piece.name, piece.parameter, piece.dim, piece.index, piece.experts)
                self._handles.append(handle)
        for optimizer in steppers:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.check_masked()))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def detach(self) -> None:
        """Take all hooks away again."""
        while self._handles:
            self._handles.pop().remove()

    def restore(self) -> None:
        """Put the frozen values back, exactly."""
        for part, saved in zip(self.parts, self.saved, strict=True):
            part.restore(saved)

    def restore_in(self, copy: nn.Module | HasNetwork) -> None:
        """Put the frozen values into a copy of the network, such as an average of its weights over the steps.

        Averaging values that never change rounds them, so that an average as it is has frozen neurons only nearly.

        Args:
            copy: A network of the same form, spread over devices in the same way.
        """
        for part, saved in zip(self._parts_now(network_of(copy)), self.saved, strict=True):
            part.restore(saved)

    def check_masked(self) -> None:
        """Fail unless the frozen parameters are still the model's own and their frozen gradients are zero.

        A hook on a parameter that the trainer has replaced never fires, and would fail silently.

        Raises:
            RuntimeError: If they are not.
        """
        loose = [
            piece.name for piece in self.slices if self.network.get_parameter(piece.name) is not piece.parameter
        ] + [part.name for part in self.parts if part.has_gradient()]
        if loose:
            raise RuntimeError(
                f"the gradients of {len(loose)} frozen parameters were not masked (first: {loose[0]}); the trainer "
                "replaced the parameters or their gradients after training began, so they cannot be frozen exactly"
            )

    def changed(self) -> list[str]:
        """Names of the parameters whose frozen slices are not bit-identical to the values held; empty is the proof."""
        now = self._parts_now(self.network)
        here = {part.name for part, saved in zip(now, self.saved, strict=True) if not _identical(part.values(), saved)}
        anywhere = sharding.together([piece.name in here for piece in self.slices])
        return [piece.name for piece, moved in zip(self.slices, anywhere, strict=True) if moved]

    def verify(self) -> None:
        """Prove that no frozen slice has changed by a single bit.

        Raises:
            RuntimeError: If one has.
        """
        changed = self.changed()
        if changed:
            raise RuntimeError(f"{len(changed)} frozen slices have changed (first: {changed[0]})")

    def digest(self) -> str:
        """SHA-256 over the frozen slices as they are in the model now; the same on one device and on many."""
        sharding.settle(self.network)
        digest = hashlib.sha256()
        for piece in self.slices:
            parameter = self.network.get_parameter(piece.name)
            digest.update(piece.name.encode())
            entries = sharding.gather_whole(piece.name, parameter, piece.dim, piece.index, piece.experts)
            digest.update(_bits(entries).cpu().numpy().tobytes())
        return digest.hexdigest()

    def _parts_in(self, network: nn.Module) -> list[sharding.Part]:
        """What is here of the slices, as the network is now, also where a parameter object is another one by now."""
        parts = []
        for piece in self.slices:
            parameter = network.get_parameter(piece.name)
            parts += sharding.local_parts(piece.name, parameter, piece.dim, piece.index, piece.experts)
        return parts

    def _parts_now(self, network: nn.Module) -> list[sharding.Part]:
        """The parts that were saved, as they are now; ``RuntimeError`` if the network is held in another way by now."""
        sharding.settle(network)
        now = self._parts_in(network)
        if [part.shape for part in now] != [saved.shape for saved in self.saved]:
            raise RuntimeError(
                "the model was spread over devices after the neurons had been frozen; freeze them when it has been"
            )
        return now


class FreezeNeurons(TrainerCallback):
    """Freeze neurons in any transformers or TRL trainer: ``Trainer(..., callbacks=[FreezeNeurons(neurons)])``.

    The frozen slices keep the values they have when training begins, bit for bit, and a proof is made at every save and
    at the end. Checkpoints carry a digest of them: training that goes on from one proves first that they are still the
    first ones. After training that ended with an exception, ``close`` takes the hooks off the model.

    Args:
        neurons: What is frozen.
        whole_layers: Whether every neuron of a layer may be frozen.
        averages: Callbacks that keep an averaged copy of the model, which is then made exact too.

    Raises:
        InputError: As ``Freeze`` does, and for a checkpoint of another training; once training begins.
        RuntimeError: When the trainer does not let the neurons be frozen.
    """

    def __init__(
        self, neurons: NeuronSet, *, whole_layers: bool = False, averages: Sequence[HasRunningModel] = ()
    ) -> None:
        self.neurons = neurons
        self.whole_layers = whole_layers
        self.averages = averages
        self._freeze: Freeze | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach after the trainer has prepared model and optimizer, so that the hooks sit on the real parameters."""
        if model is None or optimizer is None:
            raise InputError("FreezeNeurons needs a trainer that hands its model and optimizer to its callbacks")
        self.close()
        self._freeze = self._freeze_as_at_first(model, state)
        self._freeze.attach(optimizer)

    def _freeze_as_at_first(self, model: nn.Module, state: TrainerState) -> Freeze:
        """The freeze, with its digest noted in the trainer's state at the first start and compared on every other."""
        # What transformers declares as a list of callbacks is a mapping from names to what they want to be saved.
        notes: Any = state.stateful_callbacks
        name = _name_of(self.neurons)
        first = notes.get(name)
        if state.global_step and first is None:
            raise InputError(
                f"the checkpoint of step {state.global_step} was not trained with these {len(self.neurons)} neurons "
                "frozen, so they may have moved; resume with the neurons that it was started with, or begin a new "
                "training from its weights"
            )
        if first is not None:
            # The network was made anew, and its weights, which have been trained since, do not say whose they are.
            setattr(config_of(network_of(model)), LINEAGE, self.neurons.fingerprint)
        freeze = Freeze(model, self.neurons, whole_layers=self.whole_layers)
        digest = freeze.digest()
        if first not in (None, digest):
            raise InputError(
                f"the frozen neurons in the checkpoint of step {state.global_step} are not those of the first start "
                f"(expected sha256 {first}, found {digest}); resume from an earlier checkpoint, with the model in the "
                "precision that it was started in"
            )
        notes[name] = digest
        return freeze

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep averages exact, whichever callback comes first."""
        self._restore_averages()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove that what is being saved is frozen."""
        self.freeze.verify()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove it a last time, and leave the model without hooks."""
        self.close()
        self._restore_averages()
        self.freeze.verify()

    def close(self) -> None:
        """Leave the model without hooks."""
        if self._freeze is not None:
            self._freeze.detach()

    def _restore_averages(self) -> None:
        for average in self.averages:
            if average.running_model is not None:
                self.freeze.restore_in(average.running_model)

    @property
    def freeze(self) -> Freeze:
        """The freeze in force; only once training has begun."""
        if self._freeze is None:
            raise RuntimeError("the neurons are frozen when training begins; it has not begun")
        return self._freeze


@contextmanager
def frozen(
    model: nn.Module | HasNetwork,
    neurons: NeuronSet,
    optimizer: Any,
    *more: Any,
    whole_layers: bool = False,
) -> Iterator[Freeze]:
    """Freeze neurons within the block, for a hand-written loop with one optimizer or more; verified at its end.

    Args:
        model: The model that the block trains.
        neurons: What is frozen.
        optimizer: The optimizer; all others that step follow as ``more``.
        more: Further optimizers.
        whole_layers: Whether every neuron of a layer may be frozen.

    Returns:
        A context manager that gives the ``Freeze``.

    Raises:
        InputError: As ``Freeze`` does.
        RuntimeError: When the loop does not let the neurons be frozen, or a slice has changed at the end.
    """
    freeze = Freeze(model, neurons, whole_layers=whole_layers)
    freeze.attach(optimizer, *more)
    try:
        yield freeze
    finally:
        freeze.detach()
    freeze.verify()


def _require_free(neurons: NeuronSet) -> None:
    """Raise ``InputError`` where no neuron of a layer is left to be trained."""
    whole = [layer for layer, channels in neurons.layers().items() if len(channels) == neurons.widths[layer]]
    if whole:
        where = f"layer{'s' * (len(whole) > 1)} {', '.join(map(str, whole))}"
        raise InputError(
            f"the neuron set covers every neuron of {'all layers' if len(whole) == len(neurons.widths) else where}, so "
            "that nothing of the FFN there could be trained; freeze fewer neurons (a smaller density or higher "
            "thresholds), or say with whole_layers=True that it is meant"
        )


def _name_of(neurons: NeuronSet) -> str:
    """What the set is called in a trainer's state; the label makes no difference."""
    content = f"{neurons.fingerprint} {neurons.widths} {neurons.flat.tolist()}"
    return f"safeneuron {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _identical(first: Tensor, second: Tensor) -> bool:
    """Equality of bits in the wider of the two precisions, also for NaN and for -0."""
    wider = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(_bits(first.to(wider)), _bits(second.to(wider)))


def _bits(values: Tensor) -> Tensor:
    """The values as integers of the same size."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.element_size()])
