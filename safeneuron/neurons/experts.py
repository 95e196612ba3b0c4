"""All experts of a layer in parameters that they share.

Shapes: a matrix that writes neurons is ``[expert, neuron, hidden]``, its bias ``[expert, neuron]``, the output
projection ``[expert, hidden, neuron]``; where the matrices are transposed, the last two change places.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safeneuron.neurons.blocks import Block, Location, OutputProjection, Span
from safeneuron.runtime import sharding


class Stacked(NamedTuple):
    """A parameter ``[expert, ...]`` in which channel ``j`` is place ``first + step * j`` along ``dim``."""

    name: str
    dim: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class ExpertStack(Block):
    """All routed experts of one layer: ``count`` FFNs of ``width`` channels in the parameters of one module.

    Channel ``j`` of expert ``e`` is neuron ``e * width + j``. ``output`` is the parameter that the activations are
    multiplied with, ``inputs`` are those that write them, with their biases.
    """

    module: nn.Module
    output: Stacked
    inputs: tuple[Stacked, ...]

    @property
    def is_mixture(self) -> bool:
        """Always."""
        return True

    @property
    def has_open_order(self) -> bool:
        """Never: the module itself says how its rows are ordered."""
        return False

    @property
    def form(self) -> str:
        """Whether gate and up are one parameter, and in turns."""
        matrices = [location for location in self.input_locations() if location.parameter.dim() == 3]
        fused = len({matrix.name for matrix in matrices}) == 1 and len(self.inputs) > 1
        alternating = any(matrix.step == 2 for matrix in self.inputs)
        return "stacked" + (", gate and up fused" if fused else "") + (", rows alternate" if alternating else "")

    @property
    def kind(self) -> Hashable:
        """The class of its module, its width and its place."""
        return type(self).__name__, self.width, self.name.rstrip("0123456789"), type(self.module)

    @property
    def holder(self) -> nn.Module:
        """The module of all experts."""
        return self.module

    @property
    def hooked(self) -> nn.Module | None:
        """Nothing: the output projection is a parameter, and no module of its own."""
        return None

    @property
    def router_path(self) -> tuple[str, ...] | None:
        """The module beside whose parts the experts are."""
        return tuple(self.name.split(".")[:-1])

    @property
    def packed(self) -> str:
        """Never: what is found here are parameters."""
        return ""

    def modules(self) -> tuple[nn.Module, ...]:
        """The module of all experts."""
        return (self.module,)

    def spans(self) -> Iterator[Span]:
        """Each expert."""
        for expert in range(self.count):
            # A second stack of a layer is one of shared experts, or of experts for images.
            yield Span(f"{self.name}.{expert}" if self.first else expert, self.first + expert * self.width, self.width)

    def _location(self, matrix: Stacked) -> Location:
        return Location(matrix.name, self.module.get_parameter(matrix.name), matrix.dim, matrix.first, matrix.step)

    def input_locations(self) -> list[Location]:
        """Rows of each matrix and entries of its bias."""
        return [self._location(matrix) for matrix in self.inputs]

    def output_location(self) -> Location:
        """Columns of the output projections."""
        return self._location(self.output)

    def parameters(self) -> Iterator[tuple[nn.Parameter, tuple[int, ...] | None]]:
        """The parameters that experts share, whose shapes are not known from elsewhere."""
        for location in (*self.input_locations(), self.output_location()):
            yield location.parameter, None

    def output_projections(self) -> Iterator[OutputProjection]:
        """That of each expert."""
        weight, bias = self.output_location().parameter, self.module._parameters.get(f"{self.output.name}_bias")
        for expert, span in enumerate(self.spans()):
            yield OutputProjection(span.first, span.width, weight, bias, self.output.dim == 1, expert)

    def samples(self, name: str, precision: torch.dtype) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        """The shape of each expert's, and the first expert's whole."""
        (first,) = sharding.first_rows(name, self.output_location().parameter, 1)
        sample = first.T if self.output.dim == 1 else first
        for expert in range(self.count):
            yield (sample.shape[0], sample.shape[1]), sample if expert == 0 else None

    def divided(self, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the width of an expert."""
        return neurons % self.width, neurons // self.width
