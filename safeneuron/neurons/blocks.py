"""The two kinds of FFN blocks: a dense one, and a stack of experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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


# Under these names wrappers keep the one module they wrap: torch.compile, activation checkpointing, DDP and DeepSpeed.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")


class Rows(NamedTuple):
    """A matrix that writes into the FFN, within a module: neuron ``j`` is its row ``first + step * j``."""

    module: nn.Module
    first: int
    step: int = 1


@dataclass(frozen=True)
class FeedForward:
    """One FFN: the projection whose input is a(x), and the matrices that compute a(x).

    Its neurons are ``first`` to ``first + width`` of those of the layer. ``name`` is its place in the layer, ``expert``
    its number where tokens are routed to it. Each module is the one that is called, which PEFT may have put around the
    linear layer; ``linear_in`` finds that one. Where a ``norm`` stands before the output projection, as in BitNet, a
    neuron owns its gain and bias too, and the neurons of the FFN are scaled together.
    """

    layer: int
    width: int
    output: nn.Module
    inputs: tuple[Rows, ...]
    first: int = 0
    name: str = ""
    expert: int | None = None
    norm: nn.Module | None = None

    def rows_of(self, channels: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each module that writes into the FFN, once, with the rows of its matrix that belong to these channels."""
        rows: dict[nn.Module, list[Tensor]] = {}
        for module, first, step in self.inputs:
            rows.setdefault(module, []).append(channels * step + first)
        for module, parts in rows.items():
            yield module, torch.cat(parts).to(device_of(module))

    def own(self, channels: Tensor) -> Tensor:
        """Which of the layer's channels are this FFN's, as its own channels."""
        return channels[(channels >= self.first) & (channels < self.first + self.width)] - self.first


@dataclass(frozen=True)
class Layer:
    """One layer of a decoder with its blocks in the order of their neurons; a layer without an FFN has none."""

    index: int
    module: nn.Module
    blocks: tuple[FeedForward | ExpertStack, ...]

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return sum(block.width * (block.count if isinstance(block, ExpertStack) else 1) for block in self.blocks)

    @property
    def is_plain(self) -> bool:
        """Whether it is one FFN that every token goes through."""
        return len(self.blocks) == 1 and isinstance(self.blocks[0], FeedForward) and self.blocks[0].expert is None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper, with the same parameters; any other module as it is."""
    # Asking for the wrappers' own classes would import the whole compiler, and DeepSpeed.
    if len(module._modules) == 1:
        ((name, inner),) = module._modules.items()
        if name in WRAPPED and inner is not None:
            return unwrapped(inner)
    # Who holds a model of PEFT has imported it; to import it here would cost seconds, and it may not be installed.
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel | peft.PeftMixedModel):
        inner = module.base_model
        return unwrapped(inner.model if isinstance(inner, peft.tuners.tuners_utils.BaseTuner) else inner)
    return module


def acting(module: nn.Module) -> nn.Module:
    """The module that does the work there: itself, or the copy of it that PEFT trains in full (``modules_to_save``)."""
    inner = unwrapped(module)
    copies = inner._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return inner
    wrapper: Any = inner
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
    return copies[active[0]] if active else wrapper.original_module


def linear_in(module: nn.Module) -> Any:
    """The linear layer with the weights: the module itself, or what PEFT has put an adapter around."""
    inner = acting(module)
    while inner._modules.get("base_layer") is not None:
        base = inner._modules["base_layer"]
        assert base is not None, "asked just now"
        inner = base
    return inner


def size_of(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, of whatever class, quantised or not; ``None`` for anything else."""
    linear = linear_in(module)
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    facts = vars(linear)
    sizes = facts.get("in_features"), facts.get("out_features")
    if len(linear._modules) == 0 and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept ``[input, output]``, as GPT-2 does, so that a row of the matrix is its column."""
    return isinstance(linear_in(module), Conv1D)


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """The weight of a linear layer, if it is one parameter, packed or not."""
    weight = linear_in(module)._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def device_of(module: nn.Module) -> torch.device:
    """Where a linear layer's weights are."""
    linear: nn.Module = linear_in(module)
    for tensor in (*linear.parameters(), *linear.buffers()):
        return tensor.device
    return torch.device("cpu")
