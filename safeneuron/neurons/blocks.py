"""One kind of block for all layouts of FFNs: what it owns, where its neurons lie, and how it is called.

``dense.FeedForward`` is one FFN of linear layers, ``experts.ExpertStack`` all experts of a layer in parameters that
they share. Both say where their weights lie (``Location``), and ``Block`` makes all else of it: slices, rows, columns.
Whoever uses a block speaks to ``Block`` alone, so that another layout of weights is another class, which ``anatomy``
makes.

Shapes: a matrix that writes neurons is ``[neuron, hidden]``, the output projection ``[hidden, neuron]``; transposed
ones the other way round, stacked ones with ``[expert, ...]`` before. Channels are numbered within a layer, neurons
within their block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safeneuron.runtime import sharding
from safeneuron.runtime.quantization import is_quantised


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that some neurons own: ``parameter.index_select(dim, index)``.

    Of a parameter of several experts it is, for each number, place ``index[n]`` along ``dim`` within expert
    ``experts[n]``. In the coordinates of the whole parameter, also where it is spread over processes;
    ``sharding.local_parts`` says what of it is here.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor
    experts: Tensor | None = None


class Location(NamedTuple):
    """Where the neurons of an FFN lie in a parameter: neuron ``j`` at place ``first + step * j`` along ``dim``.

    ``name`` is the parameter's name in its module. Where a parameter holds several experts, ``[expert, ...]``, each
    expert has these places.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    first: int = 0
    step: int = 1


class Span(NamedTuple):
    """One FFN of a layer: its number where tokens are routed to it, else its name; its first channel and its width."""

    ffn: int | str
    first: int
    width: int


class OutputProjection(NamedTuple):
    """The output projection of one FFN, whose neurons are ``width`` channels of the layer from ``first`` on.

    ``expert`` is its place in a weight ``[expert, ...]`` and in the bias; ``None`` for a weight of its own.
    """

    first: int
    width: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool
    expert: int | None = None

    @property
    def matrix(self) -> Tensor:
        """Its own part of the weight, as a view."""
        return self.weight if self.expert is None else self.weight[self.expert]


@dataclass(frozen=True)
class Block(ABC):
    """One FFN, or several of one form: ``count`` times ``width`` neurons of a layer, from its channel ``first`` on.

    ``name`` is its place in the layer, ``expert`` its number where it is one of a list of experts. Where a ``norm``
    stands before the output projection, as in BitNet, a neuron owns its gain and bias too, and the neurons of the FFN
    are scaled together.
    """

    layer: int
    width: int
    first: int = field(default=0, kw_only=True)
    name: str = field(default="", kw_only=True)
    count: int = field(default=1, kw_only=True)
    expert: int | None = field(default=None, kw_only=True)
    norm: nn.Module | None = field(default=None, kw_only=True)

    # -- what it is --

    @property
    @abstractmethod
    def is_mixture(self) -> bool:
        """Whether it is all experts of a layer at once, in parameters that they share."""

    @property
    @abstractmethod
    def has_open_order(self) -> bool:
        """Whether shapes leave it open how the rows of one fused matrix are ordered: in halves, or in turns."""

    @property
    @abstractmethod
    def form(self) -> str:
        """How its matrices are laid out, for people."""

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """What blocks have in common of which one stands for all."""

    @property
    def neurons(self) -> int:
        """How many neurons it has."""
        return self.count * self.width

    @property
    def is_routed(self) -> bool:
        """Whether a router decides which tokens come to it."""
        return self.is_mixture or self.expert is not None

    # -- where it is --

    @property
    @abstractmethod
    def holder(self) -> nn.Module:
        """The module that holds the weight of the output projection."""

    @property
    @abstractmethod
    def hooked(self) -> nn.Module | None:
        """The module that is called with the activations; ``None`` where only a product of tensors reads them."""

    @property
    @abstractmethod
    def router_path(self) -> tuple[str, ...] | None:
        """The place in the layer of the module that routes tokens to it; ``None`` without routing."""

    @property
    @abstractmethod
    def packed(self) -> str:
        """The class of its first linear layer whose weights a library has packed away; empty without one."""

    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that it is computed with, each once, that of the output projection last."""

    @abstractmethod
    def spans(self) -> Iterator[Span]:
        """Its FFNs, in the order of their neurons."""

    # -- what it owns --

    @abstractmethod
    def input_locations(self) -> list[Location]:
        """Where neurons lie in what writes them, matrices and their biases, as far as these are parameters."""

    @abstractmethod
    def output_location(self) -> Location | None:
        """Where neurons lie in the output projection; ``None`` for a packed one."""

    @abstractmethod
    def parameters(self) -> Iterator[tuple[nn.Parameter, tuple[int, ...] | None]]:
        """Each parameter of its modules, with the shape that it must have to be trained, where that is known."""

    @abstractmethod
    def output_projections(self) -> Iterator[OutputProjection]:
        """The output projections of its FFNs, in the order of their neurons; packed ones are left out."""

    @abstractmethod
    def samples(self, name: str, precision: torch.dtype) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        """The shape of each output projection and some of its first rows; of experts only those of the first.

        Args:
            name: What an error calls the weight.
            precision: That of the model, in which a packed layer is run.
        """

    @abstractmethod
    def divided(self, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        """Neurons of the block as channels of their own FFN, and whose of the experts they are, both ``[neuron]``."""

    def own(self, channels: Tensor) -> Tensor:
        """Which of the layer's channels are its own, as numbers of its neurons."""
        return channels[(channels >= self.first) & (channels < self.first + self.neurons)] - self.first

    def slices(self, names: Mapping[int, str], channels: Tensor) -> list[Slice]:
        """Every part of its parameters that neurons own: rows, their biases, entries of the norm, columns.

        Args:
            names: The name of each parameter of the model by its id.
            channels: Channels of the layer, ``[channel]``; those of other blocks are passed over.
        """
        neurons = self.own(channels)
        if not len(neurons):
            return []
        output = self.output_location()
        places, experts = self.divided(neurons)
        # Both halves of a fused matrix are one slice of it.
        locations: dict[int, list[Location]] = {}
        for location in (*self.input_locations(), *self._norm_locations(), *([] if output is None else [output])):
            locations.setdefault(id(location.parameter), []).append(location)
        slices = []
        for number, parts in locations.items():
            parameter, dim = parts[0].parameter, parts[0].dim
            index = torch.cat([places * part.step + part.first for part in parts]).to(parameter.device)
            of = None if experts is None else experts.repeat(len(parts)).to(parameter.device)
            slices.append(Slice(names[number], parameter, dim, index, of))
        return slices

    def _norm_locations(self) -> list[Location]:
        named = () if self.norm is None else self.norm.named_parameters()
        return [Location(name, parameter, 0) for name, parameter in named]

    def column(self, neuron: int) -> Tensor:
        """The weights that read a neuron of the block, as a view ``[hidden]``."""
        location = self.output_location()
        if location is None:
            raise ValueError(f"the output projection of {self.name or 'the layer'} is packed: it has no columns")
        return self._view(location, neuron)

    def rows(self, neuron: int) -> list[Tensor]:
        """The weights that write a neuron of the block, matrix by matrix, as views ``[hidden]``."""
        views = [self._view(location, neuron) for location in self.input_locations()]
        return [view for view in views if view.dim()]

    def biases(self, neuron: int) -> list[Tensor]:
        """The biases of a neuron of the block, matrix by matrix, as views ``[]``."""
        views = [self._view(location, neuron) for location in self.input_locations()]
        return [view for view in views if not view.dim()]

    def _view(self, location: Location, neuron: int) -> Tensor:
        places, experts = self.divided(torch.tensor([neuron]))
        place = location.first + location.step * int(places)
        if experts is None:
            return location.parameter.select(location.dim, place)
        return location.parameter[int(experts)].select(location.dim - 1, place)

    @property
    def is_readable(self) -> bool:
        """Whether its weights can be read and written here as what they are: not packed, quantised, spread or away."""
        output = self.output_location()
        if self.packed or output is None:
            return False
        parameters = [location.parameter for location in (*self.input_locations(), output)]
        return not any(one.is_meta or is_quantised(one) or sharding.is_spread(one) for one in parameters)


@dataclass(frozen=True)
class Layer:
    """One layer of a decoder with its blocks in the order of their neurons; a layer without an FFN has none."""

    index: int
    module: nn.Module
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return sum(block.neurons for block in self.blocks)

    @property
    def is_plain(self) -> bool:
        """Whether it is one FFN that every token goes through."""
        return len(self.blocks) == 1 and not self.blocks[0].is_routed
