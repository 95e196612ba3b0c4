"""Activation statistics of both prompt classes, and the safetensors files in which tensors of this project are kept."""

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
from safeneuron.moments import Moments
from safeneuron.runs import write_bytes

SCHEMA = 1


@dataclass(frozen=True)
class ActivationStats:
    """Moments of every neuron over unsafe and over safe prompts; one pooled activation vector a prompt (Eq. 4).

    The moments are ``[neuron]``, layers laid end to end; ``widths`` is the number of neurons of each layer. In a
    mixture of experts they have their own counts for each neuron: of the prompts that its expert was asked about.
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
    """Write tensors and a JSON header as one safetensors file, whole or not at all."""
    text = json.dumps({"schema": SCHEMA, **header}, sort_keys=True)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"safeneuron": text}))


def load_tensors(
    path: Path, kind: str | None = None, vectors: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by ``save_tensors``.

    Raises ``InputError`` if the file is missing or damaged, holds another kind of thing than ``kind``, or lacks one of
    the ``vectors`` with one finite value a neuron.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; the stage that writes it has not finished")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("safeneuron", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); run its stage again") from error
    if kind is not None and (header.get("kind") != kind or header.get("schema") != SCHEMA):
        raise InputError(
            f"{path} should hold {kind} of schema {SCHEMA}, but holds {header.get('kind', 'something else')!r} of "
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
