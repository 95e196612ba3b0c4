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
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.adapters import adapter_slices
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, HasNetwork, Slice, fingerprint, network_of, owned_slices
from safeneuron.neurons import NeuronSet


class Freeze:
    """The slices of some neurons, held at the values they had when this object was made.

    LoRA adapters of PEFT are held where they are without effect on these neurons: their slices are set to zero, which
    changes nothing that the model computes (see ``adapters.adapter_slices``, also for what is refused).

    ``attach`` before training, ``detach`` after it; ``verify`` whenever a proof is wanted.
    """

    def __init__(self, model: nn.Module | HasNetwork, neurons: NeuronSet) -> None:
        self.network = network_of(model)
        self.slices = [*owned_slices(self.network, neurons), *adapter_slices(self.network, neurons)]
        self.saved = [self._values(piece) for piece in self.slices]
        self._handles: list[RemovableHandle] = []
        # Whatever trainer saves this network, its config now says whose neurons it has.
        setattr(self.network.config, LINEAGE, fingerprint(self.network))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask gradients from now on, check that before every step of ``optimizer``, restore the slices after it."""
        for piece in self.slices:
            if piece.parameter.requires_grad:
                handle = piece.parameter.register_post_accumulate_grad_hook(_mask(piece))  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.check_masked()))
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
        """Fail unless the frozen parameters are still the model's own and their frozen gradients are zero.

        A hook on a parameter that the trainer has replaced never fires, and would fail silently.
        """
        loose = [
            piece.name
            for piece in self.slices
            if self.network.get_parameter(piece.name) is not piece.parameter or _has_gradient(piece)
        ]
        if loose:
            raise RuntimeError(
                f"the gradients of {len(loose)} frozen parameters were not masked (first: {loose[0]}); the trainer "
                "replaced the parameters or their gradients after training began, so they cannot be frozen exactly"
            )

    def changed(self) -> list[str]:
        """Names of the parameters whose frozen slices are not bit-identical to the values held; empty is the proof."""
        return [
            piece.name
            for piece, saved in zip(self.slices, self.saved, strict=True)
            if not _identical(self._values(piece), saved)
        ]

    def verify(self) -> None:
        """Raise ``RuntimeError`` if any frozen slice has changed by a single bit."""
        changed = self.changed()
        if changed:
            raise RuntimeError(f"{len(changed)} frozen slices have changed (first: {changed[0]})")

    def digest(self) -> str:
        """SHA-256 over the frozen slices as they are in the model now."""
        digest = hashlib.sha256()
        for piece in self.slices:
            digest.update(piece.name.encode())
            digest.update(_bits(self._values(piece)).cpu().numpy().tobytes())
        return digest.hexdigest()

    def _values(self, piece: Slice) -> Tensor:
        """A copy of the slice as it is in the model now, also where the parameter object is another one by now."""
        return self.network.get_parameter(piece.name).detach().index_select(piece.dim, piece.index)


class FreezeNeurons(TrainerCallback):
    """Freeze neurons in any transformers or TRL trainer: ``Trainer(..., callbacks=[FreezeNeurons(neurons)])``.

    The frozen slices keep the values they have when training begins, bit for bit, and a proof is made at every save and
    at the end. Raises ``InputError`` when the neurons belong to another model, ``RuntimeError`` when the trainer does
    not let them be frozen. After training that ended with an exception, ``close`` takes the hooks off the model.
    """

    def __init__(self, neurons: NeuronSet) -> None:
        self.neurons = neurons
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
        self._freeze = Freeze(model, self.neurons)
        self._freeze.attach(getattr(optimizer, "optimizer", optimizer))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove that what is being saved is frozen."""
        self.freeze.verify()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prove it a last time, and leave the model without hooks."""
        self.close()
        self.freeze.verify()

    def close(self) -> None:
        """Leave the model without hooks."""
        if self._freeze is not None:
            self._freeze.detach()

    @property
    def freeze(self) -> Freeze:
        """The freeze in force; only once training has begun."""
        assert self._freeze is not None, "training has not begun"
        return self._freeze


@contextmanager
def frozen(model: nn.Module | HasNetwork, neurons: NeuronSet, optimizer: torch.optim.Optimizer) -> Iterator[Freeze]:
    """Freeze neurons within the block, for a hand-written training loop; verified at its end."""
    freeze = Freeze(model, neurons)
    freeze.attach(optimizer)
    try:
        yield freeze
    finally:
        freeze.detach()
    freeze.verify()


def _mask(piece: Slice) -> Callable[[nn.Parameter], None]:
    def mask(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "the hook runs after the gradient was accumulated"
        parameter.grad.index_fill_(piece.dim, piece.index, 0)

    return mask


def _has_gradient(piece: Slice) -> bool:
    """Whether any entry would be moved; NaN is what clipping makes of zero when another gradient is not finite."""
    gradient = piece.parameter.grad
    return gradient is not None and bool((gradient.index_select(piece.dim, piece.index).abs() > 0).any())


def _identical(first: Tensor, second: Tensor) -> bool:
    """Equality of bits in the wider of the two precisions, also for NaN and for -0."""
    wider = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(_bits(first.to(wider)), _bits(second.to(wider)))


def _bits(values: Tensor) -> Tensor:
    """The values as integers of the same size."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.element_size()])
