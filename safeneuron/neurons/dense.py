"""An FFN of linear layers: dense, shared, or one of a list of experts.

Shapes: a weight is ``[neuron, hidden]`` where it writes and ``[hidden, neuron]`` where it reads, transposed in GPT-2.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safeneuron.neurons.blocks import Block, Location, OutputProjection, Span
from safeneuron.neurons.linears import (
    computed_weight,
    device_of,
    is_transposed,
    linear_in,
    size_of,
    weight_and_bias,
    weight_of,
)
from safeneuron.runtime import sharding
from safeneuron.runtime.quantization import dense, in_four_bits


class Rows(NamedTuple):
    """A matrix that writes into the FFN, within a module: neuron ``j`` is its row ``first + step * j``."""

    module: nn.Module
    first: int
    step: int = 1


@dataclass(frozen=True)
class FeedForward(Block):
    """One FFN of linear layers: the projection whose input is a(x), and the matrices that compute a(x).

    Each module is the one that is called, which PEFT may have put around the linear layer that ``linear_in`` finds.
    """

    output: nn.Module
    inputs: tuple[Rows, ...]

    @property
    def is_mixture(self) -> bool:
        """Never: it is one FFN, be it one of a list of experts."""
        return False

    @property
    def has_open_order(self) -> bool:
        """Whether gate and up are one matrix."""
        return len(self.inputs) == 2 and self.inputs[0].module is self.inputs[1].module

    @property
    def form(self) -> str:
        """Plain or gated, in one matrix or two, in turns, transposed."""
        gated = "gated, separate" if len(self.modules()) == 3 else "gated, fused"
        form = "plain" if len(self.inputs) == 1 else gated
        turns = ", rows alternate" if self.inputs[0].step == 2 else ""
        return form + turns + (", Conv1D" if is_transposed(self.output) else "")

    @property
    def kind(self) -> Hashable:
        """The class of its output projection, its width, its place, and how many matrices write it."""
        return type(self.output).__name__, self.width, self.name.rstrip("0123456789"), len(self.inputs)

    @property
    def holder(self) -> nn.Module:
        """The linear layer itself."""
        linear: nn.Module = linear_in(self.output)
        return linear

    @property
    def hooked(self) -> nn.Module | None:
        """The output projection as it is called."""
        return self.output

    @property
    def router_path(self) -> tuple[str, ...] | None:
        """The module that holds the list of experts."""
        return None if self.expert is None else tuple(self.name.split(".")[:-2])

    @property
    def packed(self) -> str:
        """The class of a linear layer without a weight that is one parameter."""
        linears = [linear_in(module) for module in self._output_first() if weight_of(module) is None]
        return type(linears[0]).__name__ if linears else ""

    def modules(self) -> tuple[nn.Module, ...]:
        """The matrices that write, each once, and the output projection."""
        return (*dict.fromkeys(rows.module for rows in self.inputs), self.output)

    def _output_first(self) -> tuple[nn.Module, ...]:
        *writers, output = self.modules()
        return output, *writers

    def spans(self) -> Iterator[Span]:
        """Itself alone."""
        yield Span(self.name if self.expert is None else self.expert, self.first, self.width)

    def input_locations(self) -> list[Location]:
        """Rows of each matrix with their biases; of a fused one the rows of gate and those of up."""
        locations = []
        for module, first, step in self.inputs:
            for name, parameter in weight_and_bias(linear_in(module)).items():
                dim = int(is_transposed(module) and parameter.dim() == 2)
                locations.append(Location(name, parameter, dim, first, step))
        return locations

    def output_location(self) -> Location | None:
        """Columns of the output projection, whose bias belongs to no neuron."""
        weight = weight_of(self.output)
        return None if weight is None else Location("weight", weight, 0 if is_transposed(self.output) else 1)

    def parameters(self) -> Iterator[tuple[nn.Parameter, tuple[int, ...] | None]]:
        """Weights and biases of all its linear layers, that of the output projection first."""
        for module in self._output_first():
            size = size_of(module)
            if size is None:
                raise ValueError(f"{type(module).__name__} is no linear layer")
            shapes = {"weight": size if is_transposed(module) else size[::-1], "bias": size[1:]}
            for name, parameter in weight_and_bias(linear_in(module)).items():
                yield parameter, shapes[name]

    def output_projections(self) -> Iterator[OutputProjection]:
        """Its own."""
        weight, bias = weight_of(self.output), weight_and_bias(self.holder).get("bias")
        if weight is not None:
            yield OutputProjection(self.first, self.width, weight, bias, is_transposed(self.output))

    def samples(self, name: str, precision: torch.dtype) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        """Its shape, and 16 rows of its weight, or of what it computes with."""
        size = size_of(self.output)
        if size is None:
            raise ValueError(f"{type(self.output).__name__} is no linear layer")
        weight = weight_of(self.output)
        if self.expert:
            yield size[::-1], None
        elif weight is None or weight.dim() != 2:
            yield size[::-1], computed_weight(self.holder, size[0], precision)
        else:
            plain = nn.Parameter(dense(weight)) if in_four_bits(weight) else weight
            # Of a transposed weight the first 16 rows of the matrix are columns.
            transposed = is_transposed(self.output)
            rows = sharding.first_rows(name, plain, 256 if transposed else 16)
            yield size[::-1], rows[:, :16].T if transposed else rows

    def divided(self, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        """The neurons as they are."""
        return neurons, None

    def rows_of(self, channels: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each module that writes into the FFN, once, with the rows of its matrix that belong to these channels."""
        rows: dict[nn.Module, list[Tensor]] = {}
        for module, first, step in self.inputs:
            rows.setdefault(module, []).append(channels * step + first)
        for module, parts in rows.items():
            yield module, torch.cat(parts).to(device_of(module))
