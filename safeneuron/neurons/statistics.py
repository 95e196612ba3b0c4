"""Activation statistics of both prompt classes, and the safetensors files in which tensors of this project are kept.

Shapes: vectors are ``[vector, neuron]``, moments ``[neuron]``, those of groups ``[group, neuron]``, all float64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.runtime.files import write_bytes


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of ``count`` vectors, one entry a neuron.

    ``mean`` and ``m2`` have the same shape, usually ``[neuron]``, and are float64: float32 sums of squares were seen to
    give negative variances. Where neurons are undefined in some vectors, as those of an expert are for prompts that
    were not routed to it, ``counts`` has the shape of ``mean`` and says in how many vectors each is defined.
    """

    count: int
    mean: Tensor
    m2: Tensor
    counts: Tensor | None = None

    @staticmethod
    def zero(shape: tuple[int, ...]) -> Moments:
        """Moments of no vectors at all: the neutral element of ``merge``."""
        return Moments(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @staticmethod
    def of(vectors: Tensor) -> Moments:
        """Moments of a batch ``[vector, ...]``, at least one vector; a neuron that is NaN in one is undefined there."""
        values = vectors.to(torch.float64)
        counted = ~values.isnan()
        if not bool(counted.all()):
            counts = counted.sum(dim=0)
            mean = values.nansum(dim=0) / counts.clamp(min=1)
            return Moments(len(values), mean, (values - mean).square_().nansum(dim=0), counts)
        mean = values.mean(dim=0)
        return Moments(len(values), mean, (values - mean).square_().sum(dim=0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979), as if they had been seen at once."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        gap = other.mean - self.mean
        if self.counts is not None or other.counts is not None:
            first, second = self.per_neuron, other.per_neuron
            counts = first + second
            # Whole numbers by whole numbers would be float32.
            share = second.double() / counts.clamp(min=1)
            m2 = self.m2 + other.m2 + gap.square() * first * share
            return Moments(count, self.mean + gap * share, m2, counts)
        mean = self.mean + gap * (other.count / count)
        m2 = self.m2 + other.m2 + gap.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def per_neuron(self) -> Tensor:
        """In how many vectors each neuron is defined, in the shape of ``mean``."""
        return torch.full_like(self.mean, self.count, dtype=torch.int64) if self.counts is None else self.counts

    @property
    def variance(self) -> Tensor:
        """Unbiased sample variance, the ``s**2`` of Eq. 6; needs two vectors or more."""
        if self.count < 2:
            raise ValueError(f"a variance needs at least two vectors, found {self.count}")
        return self.m2 / (self.count - 1 if self.counts is None else (self.counts - 1).clamp(min=1))


_SCHEMA = 1


@dataclass(frozen=True)
class ActivationStats:
    """Moments of every neuron over unsafe and over safe prompts; one pooled activation vector a prompt (Eq. 4).

    The moments are ``[neuron]``, layers laid end to end; ``widths`` is the number of neurons of each layer. In a
    mixture of experts they have their own counts for each neuron: of the prompts that were routed to its expert.
    """

    unsafe: Moments
    safe: Moments
    widths: tuple[int, ...]
    fingerprint: str
    pooling: str

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {
            "unsafe.mean": self.unsafe.mean,
            "unsafe.m2": self.unsafe.m2,
            "safe.mean": self.safe.mean,
            "safe.m2": self.safe.m2,
        }
        for name, moments in (("unsafe", self.unsafe), ("safe", self.safe)):
            if moments.counts is not None:
                tensors[f"{name}.counts"] = moments.counts
        header = {
            "kind": "activation statistics",
            "unsafe_count": self.unsafe.count,
            "safe_count": self.safe.count,
            "widths": list(self.widths),
            "fingerprint": self.fingerprint,
            "pooling": self.pooling,
        }
        save_tensors(Path(path), tensors, header)

    @staticmethod
    def load(path: str | Path) -> ActivationStats:
        """Read statistics written by ``save``; ``InputError`` for a missing or foreign file."""
        names = ("unsafe.mean", "unsafe.m2", "safe.mean", "safe.m2")
        tensors, header = load_tensors(Path(path), "activation statistics", names)
        return ActivationStats(
            unsafe=Moments(
                header["unsafe_count"], tensors["unsafe.mean"], tensors["unsafe.m2"], tensors.get("unsafe.counts")
            ),
            safe=Moments(header["safe_count"], tensors["safe.mean"], tensors["safe.m2"], tensors.get("safe.counts")),
            widths=tuple(header["widths"]),
            fingerprint=header["fingerprint"],
            pooling=header["pooling"],
        )


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, whole or not at all.

    Args:
        path: The file.
        tensors: By name, of any shape.
        header: What JSON can write; its ``kind`` says what the file is.
    """
    text = json.dumps({"schema": _SCHEMA, **header}, sort_keys=True)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"safeneuron": text}))


def load_tensors(
    path: Path, kind: str | None = None, vectors: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by ``save_tensors``.

    Args:
        path: The file.
        kind: What it must hold; ``None`` for anything.
        vectors: Names of tensors that must be there, ``[neuron]`` by the widths in the header.

    Raises:
        InputError: If the file is missing or damaged, holds another kind of thing, has values that are not finite, or
            lacks one of the vectors.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; the stage that writes it has not finished")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("safeneuron", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); run its stage again") from error
    if kind is not None and (header.get("kind") != kind or header.get("schema") != _SCHEMA):
        raise InputError(
            f"{path} should hold {kind} of schema {_SCHEMA}, but holds {header.get('kind', 'something else')!r} of "
            f"schema {header.get('schema')}; run the stage that writes it again"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path} has values that are not finite in {name!r}; run the stage that writes it again")
    for name in vectors:
        shape, expected = tuple(tensors[name].shape) if name in tensors else None, (sum(header["widths"]),)
        if shape != expected:
            raise InputError(
                f"{path} should hold {name!r} of shape {expected}, found {shape}; run the stage that writes it again"
            )
    return tensors, header


@dataclass(frozen=True)
class GroupMoments:
    """Counts ``[group]``, means and sums of squared deviations ``[group, neuron]``, all float64."""

    counts: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def zero(groups: int, neurons: int) -> GroupMoments:
        """Moments of no vectors at all: the neutral element of ``merge``."""
        blank = torch.zeros(groups, neurons, dtype=torch.float64)
        return GroupMoments(torch.zeros(groups, dtype=torch.float64), blank, blank.clone())

    @staticmethod
    def of(vectors: Tensor, weights: Tensor) -> GroupMoments:
        """Moments of a batch ``[prompt, neuron]`` under ``weights`` ``[prompt, group]``, at least one prompt."""
        values, weights = vectors.to(torch.float64), weights.to(torch.float64)
        # Sums about the batch's own mean: the squares then have the size of deviations, and nothing cancels.
        centre = values.mean(dim=0)
        values = values - centre
        counts = weights.sum(dim=0)
        share = torch.where(counts > 0, counts, 1.0)[:, None]
        gap = weights.T @ values / share
        m2 = (weights.T @ values.square() - gap.square() * counts[:, None]).clamp_(min=0)
        return GroupMoments(counts, torch.where(counts[:, None] > 0, gap + centre, 0.0), m2)

    def merge(self, other: GroupMoments) -> GroupMoments:
        """Moments of both samples together, group by group (Chan, Golub and LeVeque 1979)."""
        counts = self.counts + other.counts
        part = (other.counts / torch.where(counts > 0, counts, 1.0))[:, None]
        gap = other.mean - self.mean
        m2 = self.m2 + other.m2 + gap.square() * (self.counts[:, None] * part)
        return GroupMoments(counts, self.mean + gap * part, m2)

    def group(self, number: int) -> Moments:
        """The moments of one group."""
        return Moments(round(float(self.counts[number])), self.mean[number], self.m2[number])

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class TopicStats:
    """Statistics by topic: the moments of each topic's unsafe prompts, and of all safe prompts, as ``measure`` has."""

    topics: tuple[str, ...]
    unsafe: GroupMoments
    safe: Moments
    widths: tuple[int, ...]
    fingerprint: str
    pooling: str

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {
            "counts": self.unsafe.counts,
            "unsafe.mean": self.unsafe.mean,
            "unsafe.m2": self.unsafe.m2,
            "safe.mean": self.safe.mean,
            "safe.m2": self.safe.m2,
        }
        header = {
            "kind": "statistics by topic",
            "topics": list(self.topics),
            "safe_count": self.safe.count,
            "widths": list(self.widths),
            "fingerprint": self.fingerprint,
            "pooling": self.pooling,
        }
        save_tensors(Path(path), tensors, header)

    @staticmethod
    def load(path: str | Path) -> TopicStats:
        """Read statistics written by ``save``; ``InputError`` for a missing or foreign file."""
        tensors, header = load_tensors(Path(path), "statistics by topic", ("safe.mean", "safe.m2"))
        return TopicStats(
            tuple(header["topics"]),
            GroupMoments(tensors["counts"], tensors["unsafe.mean"], tensors["unsafe.m2"]),
            Moments(header["safe_count"], tensors["safe.mean"], tensors["safe.m2"]),
            tuple(header["widths"]),
            header["fingerprint"],
            header["pooling"],
        )


def label_weights(labels: Sequence[str], names: Sequence[str]) -> Tensor:
    """Weights ``[prompt, name]`` of the groups with these labels: 1 where a prompt has the label, 0 elsewhere."""
    places = {name: number for number, name in enumerate(names)}
    weights = torch.zeros(len(labels), len(names), dtype=torch.float64)
    for row, label in enumerate(labels):
        if label in places:
            weights[row, places[label]] = 1
    return weights


def bootstrap_weights(prompts: int, samples: int, seed: int) -> Tensor:
    """Weights ``[prompt, sample]`` of the ordinary bootstrap: each sample draws as many prompts, with replacement."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (samples, prompts), generator=draw)
    return torch.stack([torch.bincount(row, minlength=prompts) for row in drawn], dim=1).double()


def pair_weights(prompts: int, size: int, pairs: int, seed: int) -> Tensor:
    """Weights ``[prompt, 2 * pair]``: columns 2i and 2i + 1 are two random subsets of this size with no prompt in both.

    Args:
        prompts: How many there are.
        size: How many a subset has.
        pairs: How many pairs are drawn.
        seed: Of the draw.

    Raises:
        InputError: For a size of more than half of the prompts.
    """
    if 2 * size > prompts:
        raise InputError(f"two subsets of {size} prompts were asked for, but there are {prompts}; ask for fewer")
    draw = torch.Generator().manual_seed(seed)
    weights = torch.zeros(prompts, 2 * pairs, dtype=torch.float64)
    for pair in range(pairs):
        order = torch.randperm(prompts, generator=draw)
        weights[order[:size], 2 * pair] = 1
        weights[order[size : 2 * size], 2 * pair + 1] = 1
    return weights
