"""What neurons own of a model's parameters, what belongs to none, and whether it can be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.neurons.blocks import (
    ExpertStack,
    FeedForward,
    Stacked,
    is_transposed,
    linear_in,
    size_of,
    unwrapped,
    weight_of,
)
from safeneuron.neurons.layout import HasNetwork, fingerprint, layers, names_in, network_of, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime import sharding
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.quantization import is_quantised


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that some neurons own: ``parameter.index_select(dim, index)``.

    Of a parameter of several experts it is, for each number, place ``index[n]`` along ``dim`` within expert
    ``experts[n]``. In the coordinates of the whole parameter, also where it is spread over processes; ``shards.parts``
    says what of it is here.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor
    experts: Tensor | None = None


def owned_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """Every part of every parameter that the neurons own: gate and up rows, their biases, down columns.

    Within a model of PEFT these are the weights that adapters are added to. Quantised weights, which do not change, are
    left out. Raises ``InputError`` for a neuron set of another model, and for a model of which weights are offloaded.
    """
    network = network_of(model)
    require_whole(network, "a look at the weights that neurons own")
    neurons.require(fingerprint(network), widths_of(network))
    names = names_in(network)
    slices = []
    for layer in layers(network):
        channels = neurons.layer(layer.index)
        for block in layer.blocks:
            if isinstance(block, ExpertStack):
                slices += _of_stack(names, block, channels)
            elif len(own := block.own(channels)):
                slices += _of_linears(names, block, own)
    return [piece for piece in slices if not is_quantised(piece.parameter)]


def _of_linears(names: Mapping[int, str], block: FeedForward, channels: Tensor) -> list[Slice]:
    slices = []
    for module, index in block.rows_of(channels):
        turned = is_transposed(module)
        for own in _own(linear_in(module)):
            slices.append(Slice(names[id(own)], own, int(turned and own.dim() == 2), index))
    for own in block.norm.parameters() if block.norm is not None else ():
        slices.append(Slice(names[id(own)], own, 0, channels.to(own.device)))
    weight = weight_of(block.output)
    if weight is not None:
        turned = is_transposed(block.output)
        slices.append(Slice(names[id(weight)], weight, 0 if turned else 1, channels.to(weight.device)))
    return slices


def _own(linear: nn.Module) -> list[nn.Parameter]:
    """The weight and the bias of a linear layer, as far as it has them; not the scales of packed weights."""
    found = [linear._parameters.get("weight"), linear._parameters.get("bias")]
    return [one for one in found if one is not None]


def _of_stack(names: Mapping[int, str], block: ExpertStack, channels: Tensor) -> list[Slice]:
    experts, own = block.own(channels)
    found: dict[tuple[str, int], list[Tensor]] = {}
    for matrix in (*block.inputs, block.output):
        found.setdefault((matrix.name, matrix.dim), []).append(own * matrix.step + matrix.first)
    slices = []
    for (name, dim), parts in found.items() if len(own) else ():
        parameter = block.module.get_parameter(name)
        place = parameter.device
        index, where = torch.cat(parts).to(place), experts.repeat(len(parts)).to(place)
        slices.append(Slice(names[id(parameter)], parameter, dim, index, where))
    return slices


def has_adapters(network: nn.Module) -> bool:
    """Whether PEFT has put adapters into the network, of whatever kind and in whatever place."""
    return bool(vars(network).get("peft_config"))


def parameters_of_no_neuron(model: nn.Module | HasNetwork) -> list[nn.Parameter]:
    """What belongs to no neuron: embeddings, attention, norms, routers, the LM head, biases of output projections."""
    network = network_of(model)
    widths = widths_of(network)
    every = NeuronSet.of_mask(torch.ones(sum(widths), dtype=torch.bool), widths, fingerprint(network))
    owned = {id(piece.parameter) for piece in owned_slices(network, every)}
    return [parameter for parameter in network.parameters() if id(parameter) not in owned]


def routers(model: nn.Module | HasNetwork) -> list[nn.Parameter]:
    """The parameters that decide which experts a token goes to: what lies beside the experts and belongs to no FFN."""
    network = network_of(model)
    found: dict[int, nn.Parameter] = {}
    for layer in layers(network):
        ours = {
            id(one)
            for block in layer.blocks
            for module in (
                [block.module]
                if isinstance(block, ExpertStack)
                else [block.output, *(rows.module for rows in block.inputs)]
            )
            for one in module.parameters()
        }
        for block in layer.blocks:
            if isinstance(block, ExpertStack):
                place = block.name.split(".")[:-1]
            elif block.expert is not None:
                place = block.name.split(".")[:-2]
            else:
                continue
            beside = unwrapped(layer.module).get_submodule(".".join(place)) if place else None
            for one in beside.parameters() if beside is not None else ():
                if id(one) not in ours:
                    found[id(one)] = one
    return list(found.values())


def require_trainable(model: nn.Module | HasNetwork) -> None:
    """Raise ``InputError`` where the FFNs have weights that no optimizer can train, or that are others' weights too.

    Where there are adapters, which are trained in their place, the weights may be quantised.
    """
    network = network_of(model)
    require_whole(network, "training")
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers(network):
        for block in layer.blocks:
            if isinstance(block, ExpertStack):
                for matrix in (*block.inputs, block.output):
                    _require_trainable(network, names, block.parameter(matrix), None)
                continue
            for module in (block.output, *(rows.module for rows in block.inputs)):
                linear, size = linear_in(module), size_of(module)
                assert size is not None, "anatomy has measured it"
                if weight_of(module) is None and not has_adapters(network):
                    raise InputError(
                        f"the FFN weights are quantised ({type(linear).__name__} in layer {layer.index}), so they can "
                        "be neither trained nor frozen; load the model in float32 or bfloat16, or train LoRA adapters "
                        "on it"
                    )
                whole = size if is_transposed(module) else size[::-1]
                for parameter in _own(linear):
                    shape = size[1:] if parameter is linear._parameters.get("bias") else whole
                    _require_trainable(network, names, parameter, shape)


def _require_trainable(
    network: nn.Module, names: Mapping[int, list[str]], parameter: nn.Parameter, expected: tuple[int, ...] | None
) -> None:
    name, *others = names[id(parameter)]
    if is_quantised(parameter):
        if has_adapters(network):
            return
        raise InputError(
            f"the FFN weights are quantised ({name} is {str(parameter.dtype).removeprefix('torch.')}), so "
            "they can be neither trained nor frozen; load the model in float32 or bfloat16, or train LoRA "
            "adapters on it"
        )
    shape = tuple(sharding.shape_of(parameter))
    if expected is not None and shape != expected:
        raise InputError(
            f"{name} has the shape {shape} in a layer of {' x '.join(map(str, expected))}, so it is flattened "
            "or split; use one device, DDP, FSDP2 or DeepSpeed's ZeRO"
        )
    if others:
        raise InputError(
            f"{name} and {others[0]} are one parameter, so that a neuron frozen in one place would be "
            "frozen in the other too; expected FFN weights that are tied to nothing, give each a copy"
        )


def is_plain(block: FeedForward | ExpertStack) -> bool:
    """Whether the weights can be read and written here as what they are."""
    if isinstance(block, ExpertStack):
        weights: list[nn.Parameter | None] = [block.parameter(one) for one in (*block.inputs, block.output)]
    else:
        weights = [weight_of(module) for module in (block.output, *(rows.module for rows in block.inputs))]
    return not any(one is None or one.is_meta or is_quantised(one) or sharding.is_spread(one) for one in weights)


def column(block: FeedForward | ExpertStack, expert: int, channel: int) -> Tensor:
    """The weights that read a neuron, as a view."""
    if isinstance(block, ExpertStack):
        return block.parameter(block.output)[expert].select(block.output.dim - 1, channel)
    weight = weight_of(block.output)
    assert weight is not None, "it is in the open"
    return weight.select(0 if is_transposed(block.output) else 1, channel)


def rows_of(block: FeedForward | ExpertStack, expert: int, channel: int) -> Iterator[Tensor]:
    """The weights that write a neuron, matrix by matrix, as views."""
    if isinstance(block, ExpertStack):
        for matrix in block.inputs:
            if block.parameter(matrix).dim() == 3:
                yield _stacked(block, matrix, expert, channel)
        return
    for module, first, step in block.inputs:
        weight = weight_of(module)
        assert weight is not None, "it is in the open"
        yield weight.select(1 if is_transposed(module) else 0, first + step * channel)


def biases(block: FeedForward | ExpertStack, expert: int, channel: int) -> Iterator[Tensor]:
    """The biases of a neuron, matrix by matrix, as views."""
    if isinstance(block, ExpertStack):
        for matrix in block.inputs:
            if block.parameter(matrix).dim() == 2:
                yield _stacked(block, matrix, expert, channel)
        return
    for module, first, step in block.inputs:
        bias = linear_in(module)._parameters.get("bias")
        if bias is not None:
            yield bias[first + step * channel : first + step * channel + 1]


def _stacked(block: ExpertStack, matrix: Stacked, expert: int, channel: int) -> Tensor:
    place = matrix.first + matrix.step * channel
    return block.parameter(matrix)[expert].narrow(matrix.dim - 1, place, 1)


@contextmanager
def changed(view: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block these weights are what the function makes of them; then what they were, bit by bit."""
    old = view.detach().clone()
    try:
        view.detach().copy_(change(old))
        yield
    finally:
        view.detach().copy_(old)
