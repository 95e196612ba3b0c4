"""A set of neurons of one model: plain set algebra, sizes, a random control, and a JSON form that knows its model.

A neuron is a pair (layer, channel). Inside, it is one number: layers are laid end to end, so that neuron ``j`` of layer
``l`` is ``offset[l] + j``. That makes every operation a vector operation and lets layers differ in width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.runtime.files import read_json, write_json

_SCHEMA: Literal[1] = 1
VISION_SUFFIX = "-eyes"
"""How a fingerprint ends that is of a model's vision tower and projector, and not of its text decoder."""


@dataclass(frozen=True)
class NeuronSetRecord:
    """The file of a neuron set: the model's fingerprint and neurons a layer, and the set's channels by layer."""

    schema: Literal[1]
    kind: Literal["neurons"]
    fingerprint: str
    label: str
    # One number a layer.
    widths: list[int]
    count: int
    # The keys are numbers of layers that have any; channels ascend.
    neurons: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Some of the neurons of the model whose fingerprint is ``fingerprint``.

    ``widths`` is the number of neurons of each layer; ``flat`` holds the chosen ones, sorted, each once, as int64.
    """

    flat: Tensor
    widths: tuple[int, ...]
    fingerprint: str
    label: str = ""

    @staticmethod
    def of(layers: Mapping[int, Iterable[int]], widths: Iterable[int], fingerprint: str, label: str = "") -> NeuronSet:
        """The set with the given channels in each layer; layers that are not named hold none.

        Args:
            layers: The channels of each layer, in any order.
            widths: The number of neurons of each layer of the model.
            fingerprint: The model's.
            label: The name of the set.

        Raises:
            InputError: For a layer or channel that the model does not have.
        """
        widths = tuple(widths)
        offsets = _offsets(widths)
        flat = []
        for layer, channels in layers.items():
            channels = list(channels)
            if not 0 <= layer < len(widths):
                raise InputError(f"neuron set names layer {layer}, but the model has layers 0 to {len(widths) - 1}")
            if channels and not 0 <= min(channels) <= max(channels) < widths[layer]:
                raise InputError(
                    f"neuron set names channels {min(channels)} to {max(channels)} in layer {layer}, "
                    f"which has channels 0 to {widths[layer] - 1}"
                )
            flat += [offsets[layer] + channel for channel in channels]
        return NeuronSet(torch.tensor(sorted(set(flat)), dtype=torch.int64), widths, fingerprint, label)

    @staticmethod
    def of_mask(mask: Tensor, widths: tuple[int, ...], fingerprint: str, label: str = "") -> NeuronSet:
        """The set of the true entries of a boolean vector ``[neuron]`` over all layers laid end to end."""
        if mask.shape != (sum(widths),):
            raise ValueError(f"mask of shape {tuple(mask.shape)} for {sum(widths)} neurons; expected one entry each")
        return NeuronSet(mask.nonzero().flatten().cpu(), widths, fingerprint, label)

    def __len__(self) -> int:
        return len(self.flat)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, NeuronSet)
            and (self.fingerprint, self.widths) == (other.fingerprint, other.widths)
            and torch.equal(self.flat, other.flat)
        )

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, neuron: tuple[int, int]) -> bool:
        layer, channel = neuron
        return 0 <= layer < len(self.widths) and bool((self.layer(layer) == channel).any())

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._with(torch.cat([self.flat, (other - self).flat]).sort().values)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._with(self.flat[torch.isin(self.flat, self._same(other).flat)])

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._with(self.flat[~torch.isin(self.flat, self._same(other).flat)])

    def layer(self, layer: int) -> Tensor:
        """The channels chosen in one layer, ``[channel]``, sorted."""
        start = _offsets(self.widths)[layer]
        low, high = torch.searchsorted(self.flat, torch.tensor([start, start + self.widths[layer]])).tolist()
        return self.flat[low:high] - start

    def layers(self) -> dict[int, Tensor]:
        """The chosen channels of every layer that has any."""
        every = {layer: self.layer(layer) for layer in range(len(self.widths))}
        return {layer: channels for layer, channels in every.items() if len(channels)}

    @property
    def counts(self) -> list[int]:
        """How many neurons are chosen in each layer."""
        return [len(self.layer(layer)) for layer in range(len(self.widths))]

    @property
    def total(self) -> int:
        """How many neurons the model has."""
        return sum(self.widths)

    @property
    def density(self) -> float:
        """The chosen share of all neurons, 0 to 1."""
        return len(self) / self.total if self.total else 0.0

    def jaccard(self, other: NeuronSet) -> float:
        """|intersection| / |union|, 1.0 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def random_like(self, seed: int, avoid: NeuronSet | None = None) -> NeuronSet:
        """A control: as many neurons in every layer, drawn evenly, none of them from ``avoid``.

        Args:
            seed: Of the draw.
            avoid: Neurons of the same model that must not be drawn.

        Raises:
            InputError: Where a layer has too few neurons left to draw from.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen: dict[int, list[int]] = {}
        for layer, channels in self.layers().items():
            free = torch.ones(self.widths[layer], dtype=torch.bool)
            if avoid is not None:
                free[self._same(avoid).layer(layer)] = False
            candidates = free.nonzero().flatten()
            if len(candidates) < len(channels):
                raise InputError(
                    f"layer {layer} has {len(candidates)} neurons outside the set, too few for a random control of "
                    f"{len(channels)}; choose a smaller set"
                )
            chosen[layer] = candidates[torch.randperm(len(candidates), generator=generator)[: len(channels)]].tolist()
        return NeuronSet.of(chosen, self.widths, self.fingerprint, "random")

    def complement(self) -> NeuronSet:
        """All other neurons of the model."""
        return self._with(torch.arange(self.total)[~torch.isin(torch.arange(self.total), self.flat)]).labelled("rest")

    def labelled(self, label: str) -> NeuronSet:
        """The same neurons under another name."""
        return NeuronSet(self.flat, self.widths, self.fingerprint, label)

    def require(self, fingerprint: str, widths: tuple[int, ...]) -> NeuronSet:
        """Itself, if it belongs to the model with this fingerprint and these widths.

        Raises:
            InputError: For a set of another model, or of its other part: the text decoder or the vision tower.
        """
        kinds = "a text decoder", "a model's vision tower and projector"
        own, expected = (kinds[known_as.endswith(VISION_SUFFIX)] for known_as in (self.fingerprint, fingerprint))
        if own != expected:
            raise InputError(
                f"this neuron set is of {own}, where neurons of {expected} are expected; take a set that was found "
                "with the other measure.part"
            )
        if self.widths != widths:
            raise InputError(
                f"this neuron set is for a model with {len(self.widths)} layers and {self.total} neurons, but the "
                f"model has {len(widths)} layers and {sum(widths)} neurons; find the neurons of this model first "
                "(measure, select)"
            )
        if self.fingerprint != fingerprint:
            raise InputError(
                f"this neuron set belongs to another model of the same shape (fingerprint {self.fingerprint}, the "
                f"model has {fingerprint}); find the neurons of this model first, or say that the transfer is meant "
                "with NeuronSet.transferred(model fingerprint)"
            )
        return self

    def transferred(self, fingerprint: str, widths: tuple[int, ...] | None = None) -> NeuronSet:
        """The same channels, declared to be those of another model of the same shape: an attack by transfer.

        Args:
            fingerprint: The other model's.
            widths: The number of neurons of each of its layers, which must be those of this set.

        Raises:
            InputError: For other widths.
        """
        if widths is not None and widths != self.widths:
            raise InputError(
                f"neurons can only be transferred to a model of the same shape: the set is of one with "
                f"{len(self.widths)} layers and {self.total} neurons, the other has {len(widths)} layers and "
                f"{sum(widths)} neurons; find the neurons of that model itself"
            )
        return NeuronSet(self.flat, self.widths, fingerprint, self.label)

    def to_json(self) -> dict[str, Any]:
        """The set as plain JSON: schema, fingerprint, label, widths and the channels of each layer."""
        layers = {str(layer): channels.tolist() for layer, channels in self.layers().items()}
        record = NeuronSetRecord(_SCHEMA, "neurons", self.fingerprint, self.label, list(self.widths), len(self), layers)
        return dict(vars(record))

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> NeuronSet:
        """The set written by ``to_json``.

        Raises:
            InputError: If the record is something else.
        """
        if record.get("kind") != "neurons" or record.get("schema") != _SCHEMA:
            raise InputError(
                f"expected a neuron set of schema {_SCHEMA}, found kind {record.get('kind')!r} of schema "
                f"{record.get('schema')!r}; write it again with this version of safeneuron"
            )
        try:
            layers = {int(layer): channels for layer, channels in record["neurons"].items()}
            return NeuronSet.of(layers, record["widths"], record["fingerprint"], record["label"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the neuron set is damaged: {error!r}; write it again with NeuronSet.save") from error

    def save(self, path: str | Path) -> None:
        """Write the set as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> NeuronSet:
        """Read a set written by ``save``.

        Raises:
            InputError: For a missing file or another kind of file.
        """
        record = read_json(Path(path))
        try:
            return NeuronSet.from_json(record)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __str__(self) -> str:
        name = f"{self.label}: " if self.label else ""
        return f"{name}{len(self):,} of {self.total:,} neurons ({self.density:.2%})"

    def __repr__(self) -> str:
        return f"NeuronSet({json.dumps(str(self))[1:-1]})"

    def _with(self, flat: Tensor) -> NeuronSet:
        return NeuronSet(flat, self.widths, self.fingerprint, self.label)

    def _same(self, other: NeuronSet) -> NeuronSet:
        return other.require(self.fingerprint, self.widths)


def _offsets(widths: tuple[int, ...]) -> list[int]:
    offsets = [0]
    for width in widths:
        offsets.append(offsets[-1] + width)
    return offsets
