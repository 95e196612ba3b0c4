"""Exact freezing of neurons while the rest of the model is trained, in anyone's trainer.

A gradient mask alone does not freeze: decoupled weight decay and stale momentum still move the weights. A restore alone
does, but gradient clipping then counts gradients that will not be used. So both: the frozen slices' gradients are set
to zero as soon as they are accumulated (before clipping), and the slices are put back after each optimizer step.
Only the slices are stored and touched, never a mask of the size of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, HasNetwork, Slice, fingerprint, network_of, owned_slices
from safeneuron.neurons import NeuronSet


class Freeze:
    """The slices of some neurons, held at the values they had when this object was made.

    ``attach`` before training, ``detach`` after it; ``verify`` whenever a proof is wanted.
    """

    def __init__(self, model: nn.Module | HasNetwork, neurons: NeuronSet) -> None:
        network = network_of(model)
        self.slices = owned_slices(network, neurons)
        self.saved = [piece.parameter.detach().index_select(piece.dim, piece.index) for piece in self.slices]
        self._masked: set[int] = set()
        self._handles: list[Any] = []
        # Whatever trainer saves this network, its config now says whose neurons it has.
        setattr(network.config, LINEAGE, fingerprint(network))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask gradients from now on, and restore the slices after every step of ``optimizer``."""
        for number, piece in enumerate(self.slices):
            if piece.parameter.requires_grad:
                self._handles.append(piece.parameter.register_post_accumulate_grad_hook(self._mask(number, piece)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def detach(self) -> None:
        """Take all hooks away again."""
        while self._handles:
            self._handles.pop().remove()

    def restore(self) -> None:
        """Put the frozen values back, exactly."""
        with torch.no_grad():
            for piece, saved in zip(self.slices, self.saved, strict=True):
                piece.parameter.index_copy_(piece.dim, piece.index, saved)

    def check_masked(self) -> None:
        """Fail unless every frozen gradient has been masked since ``attach``: hooks that never fire fail silently."""
        silent = [
            piece.name
            for number, piece in enumerate(self.slices)
            if piece.parameter.requires_grad and number not in self._masked
        ]
        if silent:
            raise RuntimeError(
                f"the gradients of {len(silent)} frozen parameters were never masked (first: {silent[0]}); the trainer "
                "replaced the parameters after training began, so they cannot be frozen exactly"
            )

    def changed(self) -> list[str]:
        """Names of the parameters whose frozen slices are not bit-identical to the values held; empty is the proof."""
        return [
            piece.name
            for piece, saved in zip(self.slices, self.saved, strict=True)
            if not torch.equal(_bits(piece.parameter.detach().index_select(piece.dim, piece.index)), _bits(saved))
        ]

    def verify(self) -> None:
        """Raise ``RuntimeError`` if any frozen slice has changed by a single bit."""
        changed = self.changed()
        if changed:
            raise RuntimeError(f"{len(changed)} frozen slices have changed (first: {changed[0]}); nothing was saved")

    def digest(self) -> str:
        """SHA-256 over the frozen slices as they are in the model now."""
        digest = hashlib.sha256()
        for piece in self.slices:
            values = piece.parameter.detach().index_select(piece.dim, piece.index)
            digest.update(piece.name.encode())
            digest.update(_bits(values).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _mask(self, number: int, piece: Slice) -> Callable[[nn.Parameter], None]:
        def mask(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None, "the hook runs after the gradient was accumulated"
            parameter.grad.index_fill_(piece.dim, piece.index, 0)
            self._masked.add(number)

        return mask


class FreezeNeurons(TrainerCallback):  # type: ignore[misc]
    """Freeze neurons in any transformers or TRL trainer: ``Trainer(..., callbacks=[FreezeNeurons(neurons)])``.

    The frozen slices keep the values they have when training begins, bit for bit, and a proof is made at every save and
    at the end. Raises ``InputError`` when the neurons belong to another model, ``RuntimeError`` when the trainer does not
    let them be frozen.
    """

    def __init__(self, neurons: NeuronSet) -> None:
        self.neurons = neurons
        self._freeze: Freeze | None = None
        self._checked = False

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
        self._freeze = Freeze(model, self.neurons)
        self._freeze.attach(getattr(optimizer, "optimizer", optimizer))
        self._checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the first step, make sure that every hook has fired."""
        if not self._checked:
            self.freeze.check_masked()
            self._checked = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove that what is being saved is frozen."""
        self.freeze.verify()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove it a last time, and leave the model without hooks."""
        self.freeze.detach()
        self.freeze.verify()

    @property
    def freeze(self) -> Freeze:
        """The freeze in force; only once training has begun."""
        assert self._freeze is not None, "training has not begun"
        return self._freeze


@contextmanager
def frozen(
    model: nn.Module | HasNetwork, neurons: NeuronSet, optimizer: torch.optim.Optimizer
) -> Iterator[Freeze]:
    """Freeze neurons within the block, for a hand-written training loop; verified at its end."""
    freeze = Freeze(model, neurons)
    freeze.attach(optimizer)
    try:
        yield freeze
    finally:
        freeze.detach()
    freeze.verify()


def _bits(values: Tensor) -> Tensor:
    """The values as integers of the same size: equality of bits, also for NaN and for -0."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(sizes[values.element_size()])
