"""What neurons are called: the network behind a model, the layers with their FFNs, whose neurons they are, and where.

In a mixture of experts the neurons of a layer are those of expert 0, 1, ... laid end to end, then those of shared
experts and dense FFNs; ``neuron_addresses`` says of each which expert it is of, in whatever layout the weights are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import anatomy, decoder_of
from safeneuron.neurons.blocks import Layer, Span
from safeneuron.neurons.dense import FeedForward
from safeneuron.neurons.linears import unwrapped
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime.offloading import is_offloaded, materialised

# The name under which a model's config remembers whose neurons it has, through any number of training runs.
LINEAGE = "safeneuron_lineage"
# The name under which a network with offloaded weights remembers its own fingerprint, for as long as it is in memory.
_DIGEST = "_safeneuron_digest"
# What activation checkpointing and torch.compile put into the names of parameters.
_IN_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


class HasNetwork(Protocol):
    """Anything that carries a transformers model in ``network``, such as ``safeneuron.Model``."""

    @property
    def network(self) -> nn.Module:
        """The torch module itself."""
        ...


def network_of(model: nn.Module | HasNetwork) -> nn.Module:
    """The model itself, be it bare, a ``Model``, or wrapped by PEFT, ``torch.compile``, DDP or DeepSpeed."""
    return unwrapped(model if isinstance(model, nn.Module) else model.network)


def names_in(network: nn.Module) -> dict[int, str]:
    """The name of each parameter by its id, without the names of wrappers, so that it is the same in every training."""
    names = {}
    for name, parameter in network.named_parameters():
        names[id(parameter)] = ".".join(part for part in name.split(".") if part not in _IN_NAMES)
    return names


def layers(model: nn.Module | HasNetwork) -> list[Layer]:
    """Every layer of the text decoder with its FFNs, experts among them.

    Args:
        model: The model, bare or wrapped.

    Returns:
        All layers in order, each with its blocks in the order of their neurons; those without an FFN have none.

    Raises:
        InputError: For an anatomy that is not known, with what was found; see ``anatomy.anatomy``.
    """
    return anatomy(network_of(model))


def feed_forwards(model: nn.Module | HasNetwork) -> list[FeedForward]:
    """The FFNs of the text decoder that are modules of their own, in the order of the layers: most models' only ones.

    Raises:
        InputError: For an anatomy that is not known, with what was found.
    """
    return [block for layer in layers(model) for block in layer.blocks if isinstance(block, FeedForward)]


def require_dense(model: nn.Module | HasNetwork, what: str) -> None:
    """Refuse a mixture of experts.

    Args:
        model: The model, bare or wrapped.
        what: What cannot be done with one, as the beginning of the error.

    Raises:
        InputError: For a layer with experts or several FFNs.
    """
    for layer in layers(model):
        if not layer.is_plain and layer.blocks:
            raise InputError(
                f"{what} reads one FFN a layer that every token goes through, but layer {layer.index} of "
                f"{type(network_of(model)).__name__} has experts or several FFNs; use the paper's selector there"
            )


def widths_of(model: nn.Module | HasNetwork) -> tuple[int, ...]:
    """The number of neurons of each layer; 0 for one without an FFN."""
    return tuple(layer.width for layer in layers(model))


class NeuronAddress(NamedTuple):
    """A neuron by where it is: ``expert`` is the number of a routed expert, or the name of the FFN within its layer."""

    layer: int
    expert: int | str
    channel: int


def neuron_addresses(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[NeuronAddress]:
    """Where the neurons of a set are, in their order: the same for every layout of one model's weights.

    Args:
        model: The model, bare or wrapped.
        neurons: A set of its neurons.
    """
    addresses = []
    for layer in layers(model):
        channels = neurons.layer(layer.index)
        for expert, first, width in _spans(layer):
            own = channels[(channels >= first) & (channels < first + width)] - first
            addresses += [NeuronAddress(layer.index, expert, channel) for channel in own.tolist()]
    return addresses


def neurons_at(
    model: nn.Module | HasNetwork, where: Sequence[tuple[int, int | str, int]], label: str = ""
) -> NeuronSet:
    """The set of the neurons at these places; the inverse of ``neuron_addresses``.

    Args:
        model: The model, bare or wrapped.
        where: (layer, expert, channel) of each neuron, where ``expert`` is a number, or the name of an FFN.
        label: The name of the set.

    Raises:
        InputError: For a place that the model does not have.
    """
    network = network_of(model)
    every = layers(network)
    spans = {(layer.index, expert): (first, width) for layer in every for expert, first, width in _spans(layer)}
    chosen: dict[int, list[int]] = {}
    for layer, expert, channel in where:
        first, width = spans.get((layer, expert), (0, 0))
        if not 0 <= channel < width:
            known = sorted({str(name) for number, name in spans if number == layer})
            raise InputError(
                f"the model has no channel {channel} of {expert!r} in layer {layer}; expected one of "
                f"{', '.join(known[:8]) or 'no FFN at all'} there, each with its own channels from 0"
            )
        chosen.setdefault(layer, []).append(first + channel)
    return NeuronSet.of(chosen, tuple(layer.width for layer in every), fingerprint(network), label)


def _spans(layer: Layer) -> Iterator[Span]:
    """Each FFN of a layer, in the order of its channels."""
    for block in layer.blocks:
        yield from block.spans()


def config_of(network: nn.Module) -> Any:
    """The transformers config of the network, or of its decoder where it is a module of the user's own around one."""
    return getattr(network, "config", None) or decoder_of(network).config


def fingerprint(model: nn.Module | HasNetwork) -> str:
    """Sixteen hexadecimal digits that say whose neurons these are.

    A model trained from another keeps the other's fingerprint (in its config), so that T0's neurons can be named on T1.
    A model without such a history is known by its type, its shape and the signs of a sample of its FFN weights, which
    are the same in every floating-point precision and every layout of its experts.

    Args:
        model: The model, bare or wrapped.

    Raises:
        InputError: For an anatomy that is not known.
    """
    network = network_of(model)
    config = config_of(network)
    lineage = getattr(config, LINEAGE, None)
    if lineage:
        return str(lineage)
    if not is_offloaded(network):
        return _digest_of(network, config)
    # To read the weights of every layer again and again would take minutes, and nobody can change them meanwhile.
    known = getattr(network, _DIGEST, None)
    if known is None:
        known = _digest_of(network, config)
        setattr(network, _DIGEST, known)
    return str(known)


def _digest_of(network: nn.Module, config: Any) -> str:
    digest = hashlib.sha256(str(config.model_type).encode())
    precision = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), torch.float32)
    for layer in layers(network):
        for block in layer.blocks:
            name = f"down_proj.weight of layer {layer.index}"
            with materialised(block.holder):
                for shape, sample in block.samples(name, precision):
                    digest.update(f"{tuple(shape)}".encode())
                    if sample is not None:
                        # float16 first: what is too small for it loses its sign there, and so must everywhere.
                        signs = sample[:16, :256].to(torch.float16) > 0
                        digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
