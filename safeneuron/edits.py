"""What an attack does to some neurons: zero, their mean, a clamp to any value, or a factor; all in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.statistics import ActivationStats

Change = Callable[[Tensor], Tensor]
"""What is made of a layer's activations ``[row, token, neuron]``."""
_NOTHING = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Edit:
    """Some neurons, and what becomes of their activations at every token: a' = factor * a + value.

    ``values`` is ``[chosen neuron]`` in the order of ``neurons.flat``, or ``None`` for nothing to add. With a factor of
    0 what the neuron says is not asked at all, so that it may even be infinite. Make one with ``zero``, ``mean``,
    ``clamp``, ``opposite`` or ``scale``.
    """

    neurons: NeuronSet
    factor: float = 0.0
    values: Tensor | None = None
    name: str = "zero"

    @staticmethod
    def zero(neurons: NeuronSet) -> Edit:
        """The neurons are silent: a' = 0, the paper's attack."""
        return Edit(neurons)

    @staticmethod
    def scale(neurons: NeuronSet, factor: float) -> Edit:
        """The neurons are weaker or stronger: a' = factor * a. A factor of 1 changes nothing, 0 is ``zero``."""
        return Edit(neurons, factor, name=f"scale {factor:g}" if factor else "zero")

    @staticmethod
    def clamp(neurons: NeuronSet, values: Tensor | float, name: str = "clamp") -> Edit:
        """The neurons always say the same: a' = value, one for all or one for each, ``[chosen neuron]``.

        Raises ``InputError`` for another number of values, or for values that are not finite.
        """
        each = torch.as_tensor(values, dtype=torch.float64)
        if each.dim() and each.shape != (len(neurons),):
            raise InputError(
                f"a clamp needs one value, or one for each of the {len(neurons)} neurons in order, found a tensor of "
                f"shape {tuple(each.shape)}"
            )
        if not torch.isfinite(each).all():
            raise InputError("a clamp needs finite values, found some that are not; look at where they come from")
        return Edit(neurons, 0.0, each.expand(len(neurons)).clone(), name)

    @staticmethod
    def mean(neurons: NeuronSet, stats: ActivationStats) -> Edit:
        """The neurons say what they say on benign prompts: a' = their mean over ``stats.safe``."""
        return Edit.clamp(neurons, stats.safe.mean[_checked(neurons, stats).flat], "mean")

    @staticmethod
    def opposite(neurons: NeuronSet, stats: ActivationStats, strength: float = 1.0) -> Edit:
        """The neurons say the opposite of what harmful prompts make them say: a' = -strength * mean over them.

        The sign-flipped anchor of "A Single Neuron Is Sufficient" (2605.08513), which beats zero with one neuron.
        """
        anchor = stats.unsafe.mean[_checked(neurons, stats).flat]
        return Edit.clamp(neurons, -strength * anchor, f"opposite x{strength:g}")

    def layer(self, layer: int, first: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The chosen channels of a layer, ``[channel]``, and the value to add to each, ``[channel]`` float64.

        Of one FFN of the layer they are those of its ``width`` channels from ``first`` on, counted from there.
        """
        channels = self.neurons.layer(layer)
        start = int((self.neurons.flat < sum(self.neurons.widths[:layer])).sum())
        values = torch.zeros(len(channels)).double() if self.values is None else self.values[start:][: len(channels)]
        if width is None:
            return channels, values
        here = (channels >= first) & (channels < first + width)
        return channels[here] - first, values[here]


def _checked(neurons: NeuronSet, stats: ActivationStats) -> NeuronSet:
    return neurons.require(stats.fingerprint, stats.widths)


def everywhere(edit: Edit, layer: int, first: int = 0, width: int | None = None) -> Change | None:
    """What the edit makes of a layer's activations in all rows; ``None`` where it changes nothing.

    ``first`` and ``width`` are those of one FFN of the layer, of whose activations it is then.
    """
    channels, values = edit.layer(layer, first, width)
    if not len(channels):
        return None
    if edit.values is None and edit.factor == 0:
        return lambda activations: activations.index_fill(-1, channels.to(activations.device), 0)

    def change(activations: Tensor) -> Tensor:
        index = channels.to(activations.device)
        new = values.to(activations).expand(*activations.shape[:-1], -1)
        if edit.factor:
            new = edit.factor * activations.index_select(-1, index) + new
        return activations.index_copy(-1, index, new)

    return change


def by_row(
    edits: Sequence[Edit | None], rows: Sequence[int], layer: int, first: int = 0, width: int | None = None
) -> Change | None:
    """What several edits make of a layer's activations, row ``r`` being under ``edits[rows[r]]``.

    ``first`` and ``width`` are as for ``everywhere``.
    """
    parts = [edit.layer(layer, first, width) if edit is not None else _NOTHING for edit in edits]
    sizes = torch.tensor([len(parts[number][0]) for number in rows])
    if not int(sizes.sum()):
        return None
    factor_of = [edit.factor if edit is not None else 1.0 for edit in edits]
    at_rows = torch.arange(len(rows)).repeat_interleave(sizes)
    factors = torch.tensor([factor_of[number] for number in rows]).repeat_interleave(sizes)
    channels = torch.cat([parts[number][0] for number in rows])
    values = torch.cat([parts[number][1] for number in rows])
    silent = factors == 0

    def change(activations: Tensor) -> Tensor:
        device = activations.device
        place = (at_rows.to(device), slice(None), channels.to(device))
        new = values.to(activations)[:, None]
        if not bool(silent.all()):
            moved = factors.to(activations)[:, None] * activations[place] + new
            new = torch.where(silent.to(device)[:, None], new, moved)
        changed = activations.clone()
        changed[place] = new
        return changed

    return change
