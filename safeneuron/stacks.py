"""Experts whose matrices lie in one three-dimensional parameter, as transformers builds mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safeneuron import shards


class Stacked(NamedTuple):
    """A parameter ``[expert, ...]`` in which channel ``j`` is place ``first + step * j`` along ``dim``."""

    name: str
    dim: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class ExpertStack:
    """All routed experts of one layer: ``count`` FFNs of ``width`` channels in the parameters of one module.

    Channel ``j`` of expert ``e`` is neuron ``first + e * width + j`` of the layer. ``output`` is the parameter that
    the activations are multiplied with, ``inputs`` are those that write them, with their biases.
    """

    layer: int
    width: int
    count: int
    module: nn.Module
    output: Stacked
    inputs: tuple[Stacked, ...]
    first: int = 0
    name: str = ""

    def own(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the layer's channels are of these experts, as the numbers of experts and their own channels."""
        flat = channels[(channels >= self.first) & (channels < self.first + self.count * self.width)] - self.first
        return flat // self.width, flat % self.width

    def parameter(self, matrix: Stacked) -> nn.Parameter:
        """The parameter itself, as it is in the module now."""
        return self.module.get_parameter(matrix.name)


def stack_in(module: nn.Module, name: str, hidden: int) -> ExpertStack | None:
    """The module as a stack of experts, if its own three-dimensional parameters are those of one.

    The output projection is the last of two or three of them, ``[expert, hidden, width]`` or transposed; the others are
    one of ``2 * width`` rows, or one or two of ``width``. Whether a fused one holds halves or alternating rows is what
    the class says in ``is_concatenated``.
    """
    shapes = _volumes(module)
    if len(shapes) not in (2, 3):
        return None
    *inputs, output = shapes
    transposed = vars(module).get(
        "is_transposed", _is_transposed([shapes[key] for key in inputs], shapes[output], hidden)
    )
    count, *sizes = shapes[output]
    width, out = sizes if transposed else sizes[::-1]
    if out != hidden:
        return None
    rows = 2 if transposed else 1
    fitting = [shapes[key][3 - rows] == hidden and shapes[key][0] >= count for key in inputs]
    lengths = [shapes[key][rows] for key in inputs]
    if not all(fitting) or (lengths != [2 * width] and any(length != width for length in lengths)):
        return None
    fused = lengths == [2 * width] and len(inputs) == 1
    alternating = not vars(module).get("is_concatenated", True)
    parts = [(0, 2), (1, 2)] if alternating else [(0, 1), (width, 1)]
    places = parts if fused else [(0, 1)]
    found = []
    for key in inputs:
        found += [Stacked(key, rows, *place) for place in places]
        for bias, one in module._parameters.items():
            if (
                bias.startswith(key)
                and one is not None
                and tuple(shards.shape_of(one)) == (shapes[key][0], shapes[key][rows])
            ):
                found += [Stacked(bias, 1, *place) for place in places]
    return ExpertStack(0, width, count, module, Stacked(output, 1 if transposed else 2), tuple(found), name=name)


def _volumes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the module's three-dimensional parameters, or of those that its children are made of."""
    own = {key: one for key, one in module._parameters.items() if one is not None}
    if not any(len(shards.shape_of(one)) == 3 for one in own.values()):
        # JetMoE has a module for each matrix.
        own = {
            f"{name}.{key}": one
            for name, child in module.named_children()
            for key, one in child._parameters.items()
            if one is not None and len(child._parameters) == 1
        }
    return {key: shards.shape_of(one) for key, one in own.items() if len(shards.shape_of(one)) == 3}


def _is_transposed(inputs: list[torch.Size], output: torch.Size, hidden: int) -> bool:
    """Whether matrices are kept ``[input, output]``; where the shape alone does not say, they are not."""
    if output[1] != output[2]:
        return output[2] == hidden
    return all(shape[1] == hidden != shape[2] for shape in inputs)
