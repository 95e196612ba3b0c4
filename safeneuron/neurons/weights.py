"""What neurons own of a model's parameters, what belongs to none, and whether it can be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.neurons.blocks import Slice
from safeneuron.neurons.layout import HasNetwork, fingerprint, layers, names_in, network_of, widths_of
from safeneuron.neurons.linears import unwrapped
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime import sharding
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.quantization import is_quantised


def owned_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """Every part of every parameter that the neurons own: gate and up rows, their biases, down columns.

    Within a model of PEFT these are the weights that adapters are added to. Quantised weights, which do not change, are
    left out.

    Args:
        model: The model, bare or wrapped.
        neurons: A set of neurons of this model.

    Returns:
        One slice a parameter, in the order of the layers; a parameter of several experts has one for all of them.

    Raises:
        InputError: For a neuron set of another model, and for a model of which weights are offloaded.
    """
    network = network_of(model)
    require_whole(network, "a look at the weights that neurons own")
    neurons.require(fingerprint(network), widths_of(network))
    names = names_in(network)
    slices = []
    for layer in layers(network):
        channels = neurons.layer(layer.index)
        for block in layer.blocks:
            slices += block.slices(names, channels)
    return [piece for piece in slices if not is_quantised(piece.parameter)]


def has_adapters(network: nn.Module) -> bool:
    """Whether PEFT has put adapters into the network, of whatever kind and in whatever place."""
    return bool(getattr(network, "peft_config", None))


def parameters_of_no_neuron(model: nn.Module | HasNetwork) -> list[nn.Parameter]:
    """What belongs to no neuron: embeddings, attention, norms, routers, the LM head, biases of output projections.

    Raises:
        InputError: For a model of which weights are offloaded.
    """
    network = network_of(model)
    widths = widths_of(network)
    every = NeuronSet.of_mask(torch.ones(sum(widths), dtype=torch.bool), widths, fingerprint(network))
    owned = {id(piece.parameter) for piece in owned_slices(network, every)}
    return [parameter for parameter in network.parameters() if id(parameter) not in owned]


def routers(model: nn.Module | HasNetwork) -> list[nn.Parameter]:
    """The parameters that decide which experts a token goes to: what lies beside the experts and belongs to no FFN."""
    network = network_of(model)
    parameters: dict[int, nn.Parameter] = {}
    for layer in layers(network):
        modules = [module for block in layer.blocks for module in block.modules()]
        owned = {id(parameter) for module in modules for parameter in module.parameters()}
        for block in layer.blocks:
            # Experts right in the layer have no module of their own whose other parameters could be a router's.
            if block.router_path:
                mixture = unwrapped(layer.module).get_submodule(".".join(block.router_path))
                for parameter in mixture.parameters():
                    if id(parameter) not in owned:
                        parameters[id(parameter)] = parameter
    return list(parameters.values())


def require_trainable(model: nn.Module | HasNetwork) -> None:
    """Refuse FFNs with weights that no optimizer can train, or that are others' weights too.

    Where there are adapters, which are trained in their place, the weights may be quantised.

    Raises:
        InputError: For weights that are quantised, flattened, tied to others, or offloaded.
    """
    network = network_of(model)
    require_whole(network, "training")
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers(network):
        for block in layer.blocks:
            if block.packed and not has_adapters(network):
                raise InputError(
                    f"the FFN weights are quantised ({block.packed} in layer {layer.index}), so they can be neither "
                    "trained nor frozen; load the model in float32 or bfloat16, or train LoRA adapters on it"
                )
            for parameter, shape in block.parameters():
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


@contextmanager
def changed(view: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block these weights are what the function makes of them; then what they were, bit by bit."""
    old = view.detach().clone()
    try:
        view.detach().copy_(change(old))
        yield
    finally:
        view.detach().copy_(old)
