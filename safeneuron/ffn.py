"""The seam: the only place that knows where neuron ``j`` of layer ``l`` lives, how to record it and how to prune it.

A gated FFN computes a(x) = (h W_up + b_up) * f(h W_gate + b_gate) and hands it to its output projection (Eq. 1-3).
One element of a(x) is one neuron: row ``j`` of W_gate and W_up with their biases, column ``j`` of W_down. So one
pre-hook on the output projection sees, and can change, every neuron of a layer. Everything else speaks of (layer,
neuron).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.quantising import dense, is_quantised

# The name under which a model's config remembers whose neurons it has, through any number of training runs.
LINEAGE = "safeneuron_lineage"


class HasNetwork(Protocol):
    """Anything that carries a transformers model in ``network``, such as ``safeneuron.Model``."""

    @property
    def network(self) -> nn.Module:
        """The torch module itself."""
        ...


class Rows(NamedTuple):
    """A matrix that writes into the FFN: neuron ``j`` is its row ``first + j``; ``linear_in(module)`` has the weights."""

    module: nn.Module
    first: int


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one decoder layer: the projection whose input is a(x), and the matrices that compute a(x).

    Each is the module that is called, which PEFT may have put around the linear layer; ``linear_in`` finds that one.
    """

    layer: int
    width: int
    output: nn.Module
    inputs: tuple[Rows, ...]

    def rows_of(self, channels: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each module that writes into the FFN, once, with the rows of its matrix that belong to these neurons."""
        rows: dict[nn.Module, list[Tensor]] = {}
        for module, first in self.inputs:
            rows.setdefault(module, []).append(channels + first)
        for module, parts in rows.items():
            yield module, torch.cat(parts).to(linear_in(module).weight.device)


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that some neurons own: ``parameter.index_select(dim, index)``."""

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor


def network_of(model: nn.Module | HasNetwork) -> nn.Module:
    """The transformers model itself, whether it came bare, as a ``Model`` or within a model of PEFT."""
    return _without_peft(model if isinstance(model, nn.Module) else model.network)


def _without_peft(network: nn.Module) -> nn.Module:
    # Who holds a model of PEFT has imported it; to import it here would cost seconds, and it may not be installed.
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(network, peft.PeftModel | peft.PeftMixedModel):
        return network
    inner: nn.Module = network.base_model
    return inner.model if isinstance(inner, peft.tuners.tuners_utils.BaseTuner) else inner


def acting(module: nn.Module) -> nn.Module:
    """The module that does the work there: itself, or the copy of it that PEFT trains in full (``modules_to_save``)."""
    copies = module._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return module
    wrapper: Any = module
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
    return copies[active[0]] if active else wrapper.original_module


def linear_in(module: nn.Module) -> nn.Linear:
    """The linear layer with the weights: the module itself, or what PEFT has put an adapter around."""
    linear = _linear_in(module)
    assert linear is not None, "feed_forwards has checked it"
    return linear


def _linear_in(module: nn.Module | None) -> nn.Linear | None:
    inner = acting(module) if module is not None else None
    while inner is not None and inner._modules.get("base_layer") is not None:
        inner = inner._modules["base_layer"]
    return inner if isinstance(inner, nn.Linear) else None


def feed_forwards(model: nn.Module | HasNetwork) -> list[FeedForward]:
    """The FFN of every layer of the text decoder, in order.

    Understands gated FFNs with separate (``gate_proj``, ``up_proj``) or fused (``gate_up_proj``) inputs. Raises
    ``InputError`` that says what was found for any other anatomy.
    """
    layers = decoder_of(network_of(model)).layers
    assert isinstance(layers, nn.ModuleList), "decoder_of has checked it"
    return [_feed_forward(index, layer) for index, layer in enumerate(layers)]


def decoder_of(network: nn.Module) -> nn.Module:
    """The text decoder with its list of layers; a vision tower has FFNs of the same names and must not be found."""
    find = getattr(network, "get_decoder", None)
    decoder = find() if callable(find) else network
    assert isinstance(decoder, nn.Module), "transformers returns a module"
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise InputError(
            f"{type(network).__name__} has no text decoder with a list of layers: expected get_decoder().layers, found "
            f"{type(decoder).__name__} with {_names(decoder.named_children())}; use a Llama-like causal language model"
        )
    return decoder


def _feed_forward(index: int, layer: nn.Module) -> FeedForward:
    # Only direct children are looked at: the shared expert of a mixture has the same names, but lies deeper.
    found = [block for module in layer.children() if (block := _gated(index, acting(module))) is not None]
    experts = any("expert" in name for name, _ in layer.named_modules())
    if len(found) == 1 and not experts:
        return found[0]
    kind = "is a mixture of experts" if experts else "has no FFN of a known form"
    raise InputError(
        f"layer {index} ({type(layer).__name__}) {kind}: safeneuron expects one FFN of linear layers gate_proj, "
        f"up_proj, down_proj, or gate_up_proj, down_proj, of fitting sizes, but found {_names(layer.named_modules())}; "
        "use a dense Llama-like model"
    )


def _gated(index: int, module: nn.Module) -> FeedForward | None:
    """The module as a gated FFN with separate or fused inputs, if that is what it is."""
    children = dict(module.named_children())
    modules = [children.get(name) for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")]
    (gate, up, fused, output), (gate_in, up_in, fused_in, output_in) = modules, map(_linear_in, modules)
    if output is None or output_in is None:
        return None
    width = output_in.in_features
    if gate and up and gate_in and up_in and gate_in.out_features == up_in.out_features == width:
        return FeedForward(index, width, output, (Rows(gate, 0), Rows(up, 0)))
    if fused and fused_in and fused_in.out_features == 2 * width:
        return FeedForward(index, width, output, (Rows(fused, 0), Rows(fused, width)))
    return None


def _names(modules: Iterator[tuple[str, nn.Module]]) -> str:
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in modules if name) or "nothing"


def widths_of(model: nn.Module | HasNetwork) -> tuple[int, ...]:
    """The number of neurons of each layer."""
    return tuple(block.width for block in feed_forwards(model))


def fingerprint(model: nn.Module | HasNetwork) -> str:
    """Sixteen hexadecimal digits that say whose neurons these are.

    A model trained from another keeps the other's fingerprint (in its config), so that T0's neurons can be named on T1.
    A model without such a history is known by its type, its shape and the signs of a sample of its FFN weights, which
    are the same in every floating-point precision.
    """
    network = network_of(model)
    config = vars(network)["config"]
    lineage = vars(config).get(LINEAGE)
    if lineage:
        return str(lineage)
    digest = hashlib.sha256(str(config.model_type).encode())
    for block in feed_forwards(network):
        weight = dense(linear_in(block.output).weight)
        digest.update(f"{tuple(weight.shape)}".encode())
        # float16 first: what is too small for it loses its sign there, and so must lose it everywhere.
        sample = weight[:16, :256].to(torch.float16)
        digest.update((sample > 0).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def owned_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """Every part of every parameter that the neurons own: gate and up rows, their biases, down columns.

    Within a model of PEFT these are the weights that adapters are added to; quantised ones, which cannot change, are
    left out there. Raises ``InputError`` for a neuron set of another model, and for quantised weights without adapters.
    """
    network = network_of(model)
    neurons.require(fingerprint(network), widths_of(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    slices = []
    for block in feed_forwards(network):
        channels = neurons.layer(block.layer)
        if not len(channels):
            continue
        for module, index in block.rows_of(channels):
            slices += [Slice(names[id(own)], own, 0, index) for own in linear_in(module).parameters()]
        weight = linear_in(block.output).weight
        assert isinstance(weight, nn.Parameter), "a linear layer of a loaded model"
        slices.append(Slice(names[id(weight)], weight, 1, channels.to(weight.device)))
    plain = [piece for piece in slices if not is_quantised(piece.parameter)]
    if len(plain) < len(slices) and not has_adapters(network):
        raise InputError(
            f"the FFN weights of {type(network).__name__} are quantised, so they can be neither trained nor frozen; load "
            "the model in float32 or bfloat16, or train LoRA adapters on it"
        )
    return plain


def has_adapters(network: nn.Module) -> bool:
    """Whether PEFT has put adapters into the network, of whatever kind and in whatever place."""
    return bool(vars(network).get("peft_config"))


@dataclass
class Recording:
    """What ``recorded`` collects in the last forward pass: layer -> activations, or what ``reduce`` made of them."""

    layers: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module | HasNetwork, reduce: Callable[[Tensor], Tensor] | None = None) -> Iterator[Recording]:
    """Within the block, each forward pass leaves every layer's neuron activations in the recording.

    Activations are ``[batch, token, neuron]`` in the model's precision, before the output projection. ``reduce`` is
    applied at once to each layer's, so that a pooled vector is all that stays in memory.
    """
    recording = Recording()

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = inputs[0].detach()
            recording.layers[layer] = activations if reduce is None else reduce(activations)

        return keep

    handles = [block.output.register_forward_pre_hook(hook(block.layer)) for block in feed_forwards(model)]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pruned(model: nn.Module | HasNetwork, neurons: NeuronSet | None) -> Iterator[None]:
    """Within the block the neurons' activations are zero: the pruning attack. ``None`` prunes nothing.

    The same as zeroing their columns of W_down, but the weights are not touched, so the model is bit-identical
    afterwards, also after an exception. Gradients flow as through the pruned model. Raises ``InputError`` for a neuron
    set of another model.
    """
    handles = []
    if neurons is not None:
        network = network_of(model)
        neurons.require(fingerprint(network), widths_of(network))
        for block in feed_forwards(network):
            channels = neurons.layer(block.layer)
            if len(channels):
                handles.append(block.output.register_forward_pre_hook(_zero(channels.to(linear_in(block.output).weight.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero(channels: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def zero(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].index_fill(-1, channels, 0), *inputs[1:])

    return zero
