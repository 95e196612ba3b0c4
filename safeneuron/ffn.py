"""The seam: the only place that knows where neuron ``j`` of layer ``l`` lives, how to record it and how to prune it.

A gated FFN computes a(x) = (h W_up + b_up) * f(h W_gate + b_gate) and hands it to its output projection (Eq. 1-3).
One element of a(x) is one neuron: row ``j`` of W_gate and W_up with their biases, column ``j`` of W_down. So one
pre-hook on the output projection sees, and can change, every neuron of a layer. Everything else speaks of (layer,
neuron).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from safeneuron import shards
from safeneuron.edits import Change, Edit, by_row, everywhere
from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.quantising import dense, in_four_bits, is_quantised

# The name under which a model's config remembers whose neurons it has, through any number of training runs.
LINEAGE = "safeneuron_lineage"
# Under these names wrappers keep the one module they wrap: torch.compile, activation checkpointing, DDP and DeepSpeed.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")


class HasNetwork(Protocol):
    """Anything that carries a transformers model in ``network``, such as ``safeneuron.Model``."""

    @property
    def network(self) -> nn.Module:
        """The torch module itself."""
        ...


class Rows(NamedTuple):
    """A matrix that writes into the FFN, within a module: neuron ``j`` is its row ``first + j``."""

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
    """The part of one parameter that some neurons own: ``parameter.index_select(dim, index)``.

    In the coordinates of the whole parameter, also where it is spread over processes; ``shards.parts`` says what of it
    is here.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor


def network_of(model: nn.Module | HasNetwork) -> nn.Module:
    """The model itself, be it bare, a ``Model``, or wrapped by PEFT, ``torch.compile``, DDP or DeepSpeed."""
    return _unwrapped(model if isinstance(model, nn.Module) else model.network)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper, with the same parameters; any other module as it is."""
    # Asking for the wrappers' own classes would import the whole compiler, and DeepSpeed.
    if len(module._modules) == 1:
        ((name, inner),) = module._modules.items()
        if name in WRAPPED and inner is not None:
            return _unwrapped(inner)
    # Who holds a model of PEFT has imported it; to import it here would cost seconds, and it may not be installed.
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel | peft.PeftMixedModel):
        inner = module.base_model
        return _unwrapped(inner.model if isinstance(inner, peft.tuners.tuners_utils.BaseTuner) else inner)
    return module


def names_in(network: nn.Module) -> dict[int, str]:
    """The name of each parameter by its id, without the names of wrappers, so that it is the same in every training."""
    found = {}
    for name, parameter in network.named_parameters():
        found[id(parameter)] = ".".join(part for part in name.split(".") if part not in WRAPPED[:2])
    return found


def acting(module: nn.Module) -> nn.Module:
    """The module that does the work there: itself, or the copy of it that PEFT trains in full (``modules_to_save``)."""
    inner = _unwrapped(module)
    copies = inner._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return inner
    wrapper: Any = inner
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
    if decoder is network and not _has_layers(network):
        # A module of the user's own around a model, with a value head for example, has one part that has a decoder.
        inner = [part for part in network.children() if hasattr(part, "get_decoder") or _has_layers(part)]
        if len(inner) == 1:
            return decoder_of(inner[0])
    if not _has_layers(decoder):
        raise InputError(
            f"{type(network).__name__} has no text decoder with a list of layers: expected get_decoder().layers, found "
            f"{type(decoder).__name__} with {_names(decoder.named_children())}; use a Llama-like causal language model"
        )
    return decoder


def _has_layers(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layers", None), nn.ModuleList)


def _feed_forward(index: int, layer: nn.Module) -> FeedForward:
    layer = _unwrapped(layer)
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


def config_of(network: nn.Module) -> Any:
    """The transformers config of the network, or of its decoder where it is a module of the user's own around one."""
    return vars(network).get("config") or vars(decoder_of(network))["config"]


def fingerprint(model: nn.Module | HasNetwork) -> str:
    """Sixteen hexadecimal digits that say whose neurons these are.

    A model trained from another keeps the other's fingerprint (in its config), so that T0's neurons can be named on T1.
    A model without such a history is known by its type, its shape and the signs of a sample of its FFN weights, which
    are the same in every floating-point precision.
    """
    network = network_of(model)
    config = config_of(network)
    lineage = vars(config).get(LINEAGE)
    if lineage:
        return str(lineage)
    digest = hashlib.sha256(str(config.model_type).encode())
    for block in feed_forwards(network):
        weight = linear_in(block.output).weight
        assert isinstance(weight, nn.Parameter), "a linear layer of a loaded model"
        if in_four_bits(weight):
            weight = nn.Parameter(dense(weight))
        shape = shards.shape_of(weight)
        digest.update(f"{tuple(shape)}".encode())
        # float16 first: what is too small for it loses its sign there, and so must lose it everywhere.
        sample = shards.first_rows(f"down_proj.weight of layer {block.layer}", weight, 16)[:, :256].to(torch.float16)
        digest.update((sample > 0).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def owned_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """Every part of every parameter that the neurons own: gate and up rows, their biases, down columns.

    Within a model of PEFT these are the weights that adapters are added to. Quantised weights, which do not change, are
    left out. Raises ``InputError`` for a neuron set of another model.
    """
    network = network_of(model)
    neurons.require(fingerprint(network), widths_of(network))
    names = names_in(network)
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
    return [piece for piece in slices if not is_quantised(piece.parameter)]


def has_adapters(network: nn.Module) -> bool:
    """Whether PEFT has put adapters into the network, of whatever kind and in whatever place."""
    return bool(vars(network).get("peft_config"))


def parameters_of_no_neuron(model: nn.Module | HasNetwork) -> list[nn.Parameter]:
    """What belongs to no neuron: embeddings, attention, norms, the LM head, the biases of output projections."""
    network = network_of(model)
    widths = widths_of(network)
    every = NeuronSet.of_mask(torch.ones(sum(widths), dtype=torch.bool), widths, fingerprint(network))
    owned = {id(piece.parameter) for piece in owned_slices(network, every)}
    return [parameter for parameter in network.parameters() if id(parameter) not in owned]


def require_trainable(model: nn.Module | HasNetwork) -> None:
    """Raise ``InputError`` where the FFNs have weights that no optimizer can train, or that are others' weights too.

    Where there are adapters, which are trained in their place, the weights may be quantised.
    """
    network = network_of(model)
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in feed_forwards(network):
        for module in (block.output, *(rows.module for rows in block.inputs)):
            linear = linear_in(module)
            for parameter in linear.parameters():
                name, *others = names[id(parameter)]
                if is_quantised(parameter):
                    if has_adapters(network):
                        continue
                    raise InputError(
                        f"the FFN weights are quantised ({name} is {str(parameter.dtype).removeprefix('torch.')}), so "
                        "they can be neither trained nor frozen; load the model in float32 or bfloat16, or train LoRA "
                        "adapters on it"
                    )
                shape, expected = tuple(shards.shape_of(parameter)), (linear.out_features, linear.in_features)
                if shape != (expected[:1] if parameter is linear.bias else expected):
                    raise InputError(
                        f"{name} has the shape {shape} in a layer of {expected[0]} x {expected[1]}, so it is flattened "
                        "or split; use one device, DDP, FSDP2 or DeepSpeed's ZeRO"
                    )
                if others:
                    raise InputError(
                        f"{name} and {others[0]} are one parameter, so that a neuron frozen in one place would be "
                        "frozen in the other too; expected FFN weights that are tied to nothing, give each a copy"
                    )


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

    require_eager(model)
    handles = [block.output.register_forward_pre_hook(hook(block.layer)) for block in feed_forwards(model)]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rewritten(model: nn.Module | HasNetwork, changes: Mapping[int, Change]) -> Iterator[None]:
    """Within the block the activations of each named layer are what its function makes of them.

    They are ``[batch, token, neuron]``; the weights are not touched, so the model is bit-identical afterwards, also
    after an exception. Gradients flow as through the rewritten model.
    """

    def hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, inputs: (change(inputs[0]), *inputs[1:])

    require_eager(model)
    blocks = feed_forwards(model)
    handles = [blocks[layer].output.register_forward_pre_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pruned(
    model: nn.Module | HasNetwork, neurons: NeuronSet | Edit | None, rows: Tensor | None = None
) -> Iterator[None]:
    """Within the block the neurons' activations are zero: the pruning attack. ``None`` prunes nothing.

    The same as zeroing their columns of W_down, but the weights are not touched. An ``Edit`` does something else to
    its neurons: their mean, a clamp, a factor. ``rows``, boolean ``[row]``, limits it to some rows of each batch.
    Raises ``InputError`` for a neuron set of another model.
    """
    edit = Edit.zero(neurons) if isinstance(neurons, NeuronSet) else neurons
    if edit is None:
        yield
        return
    if rows is not None:
        with edited(model, (None, edit), rows.long().tolist()):
            yield
        return
    with rewritten(model, _changes(model, [edit], lambda layer: everywhere(edit, layer))):
        yield


@contextmanager
def edited(model: nn.Module | HasNetwork, edits: Sequence[Edit | None], rows: Sequence[int]) -> Iterator[None]:
    """Within the block row ``r`` of each batch is under ``edits[rows[r]]``: several attacks in one batch.

    Every batch must have ``len(rows)`` rows. Raises ``InputError`` for a neuron set of another model.
    """
    with rewritten(model, _changes(model, edits, lambda layer: by_row(edits, rows, layer))):
        yield


def _changes(
    model: nn.Module | HasNetwork, edits: Sequence[Edit | None], at: Callable[[int], Change | None]
) -> dict[int, Change]:
    """What becomes of each layer that is changed at all, of edits that belong to the model."""
    network = network_of(model)
    own, widths = fingerprint(network), widths_of(network)
    for edit in edits:
        if edit is not None:
            edit.neurons.require(own, widths)
    return {layer: change for layer in range(len(widths)) if (change := at(layer)) is not None}


def require_eager(model: nn.Module | HasNetwork) -> None:
    """Raise ``InputError`` for a compiled model: its graph, once made, does not know hooks that are added later."""
    network = model if isinstance(model, nn.Module) else model.network
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in network.modules()):
        raise InputError(
            "a compiled model computes on without asking hooks, so its neurons can be neither recorded nor pruned; "
            "expected the model as it was before torch.compile, use and call that one"
        )
