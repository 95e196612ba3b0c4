"""What a training changed: neurons kept, lost and new, and how far each layer's weights moved inside a set and outside.

The weights before are read lazily, one parameter at a time, from a folder in Hugging Face form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.ffn import owned_slices
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.runs import read_json


class Turnover(NamedTuple):
    """Neurons of each layer that both states' sets hold, only the first one's, and only the second one's."""

    kept: list[int]
    lost: list[int]
    new: list[int]


class Movement(NamedTuple):
    """Relative L2 change |after - before| / |before| of one layer's neurons inside a set and outside of it.

    nan where there is no neuron, or nothing but zeros before.
    """

    layer: int
    inside: float
    outside: float


def turnover(before: NeuronSet, after: NeuronSet) -> Turnover:
    """What has become of the neurons found on a state, found again on a later one."""
    return Turnover((before & after).counts, (before - after).counts, (after - before).counts)


def movements(after: Model, before: Callable[[str], Tensor], neurons: NeuronSet) -> list[Movement]:
    """How far the weights that neurons own (gate and up rows, biases, down columns) moved, layer by layer.

    ``before(name)`` gives the parameter of that name as it was; see ``weights_in``. Raises ``InputError`` for a neuron
    set of another model.
    """
    neurons.require(after.fingerprint, after.widths)
    found = []
    for layer, width in enumerate(after.widths):
        every = NeuronSet.of({layer: range(width)}, after.widths, after.fingerprint)
        change, size = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for piece in owned_slices(after, every):
            now = _by_neuron(piece.parameter.detach().index_select(piece.dim, piece.index), piece.dim, width)
            old = before(piece.name).to(piece.parameter.device).index_select(piece.dim, piece.index)
            was = _by_neuron(old, piece.dim, width)
            change += (now - was).square().sum(dim=1).cpu()
            size += was.square().sum(dim=1).cpu()
        inside = torch.zeros(width, dtype=torch.bool).index_fill(0, neurons.layer(layer), True)
        found.append(Movement(layer, _relative(change, size, inside), _relative(change, size, ~inside)))
    return found


def weights_in(folder: Path) -> Callable[[str], Tensor]:
    """A reader of single parameters from a folder's safetensors; nothing is read but what is asked for.

    Raises ``InputError`` for a folder without safetensors, and when asked for a parameter that it does not hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), folder / "model.safetensors")
    else:
        raise InputError(f"{folder} holds no safetensors to compare with; expected model.safetensors or its index")

    def read(name: str) -> Tensor:
        if name not in files:
            raise InputError(f"{folder} has no parameter {name}; expected a checkpoint of the same architecture")
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read


def _by_neuron(values: Tensor, dim: int, width: int) -> Tensor:
    """``[neuron, value]`` of a slice; of a fused matrix each neuron has several rows, one part after the other."""
    parts = values.to(torch.float64).movedim(dim, 0).reshape(-1, width, values.numel() // values.shape[dim])
    return parts.movedim(0, 1).reshape(width, -1)


def _relative(change: Tensor, size: Tensor, which: Tensor) -> float:
    total = float(size[which].sum())
    return (float(change[which].sum()) / total) ** 0.5 if total > 0 else float("nan")
