"""The seam: the only place that knows how to record neuron ``j`` of layer ``l``, how to prune it, and what it owns.

An FFN computes a(x), for a gated one (h W_up + b_up) * f(h W_gate + b_gate), and hands it to its output projection
(Eq. 1-3). One element of a(x) is one neuron: row ``j`` of the matrices that write it with their biases, column ``j`` of
the output projection. So whoever stands before the output projection sees, and can change, every neuron. Where the FFNs
lie is found in ``anatomy``; everything else speaks of (layer, neuron). In a mixture of experts the neurons of a layer
are those of expert 0, 1, ... laid end to end, then those of shared experts and dense FFNs (``places``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from safeneuron import shards
from safeneuron.anatomy import FeedForward as FeedForward
from safeneuron.anatomy import Layer, anatomy, is_transposed, size_of, unwrapped, weight_of
from safeneuron.anatomy import Rows as Rows
from safeneuron.anatomy import acting as acting
from safeneuron.anatomy import decoder_of as decoder_of
from safeneuron.anatomy import layers_of as layers_of
from safeneuron.anatomy import linear_in as linear_in
from safeneuron.edits import Change, Edit, by_row, everywhere
from safeneuron.errors import InputError
from safeneuron.neurons import NeuronSet
from safeneuron.quantising import dense, in_four_bits, is_quantised
from safeneuron.stacks import ExpertStack
from safeneuron.watching import Flow, watched

# The name under which a model's config remembers whose neurons it has, through any number of training runs.
LINEAGE = "safeneuron_lineage"
# What activation checkpointing and torch.compile put into the names of parameters.
_IN_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


class HasNetwork(Protocol):
    """Anything that carries a transformers model in ``network``, such as ``safeneuron.Model``."""

    @property
    def network(self) -> nn.Module:
        """The torch module itself."""
        ...


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


def network_of(model: nn.Module | HasNetwork) -> nn.Module:
    """The model itself, be it bare, a ``Model``, or wrapped by PEFT, ``torch.compile``, DDP or DeepSpeed."""
    return unwrapped(model if isinstance(model, nn.Module) else model.network)


def names_in(network: nn.Module) -> dict[int, str]:
    """The name of each parameter by its id, without the names of wrappers, so that it is the same in every training."""
    found = {}
    for name, parameter in network.named_parameters():
        found[id(parameter)] = ".".join(part for part in name.split(".") if part not in _IN_NAMES)
    return found


def layers(model: nn.Module | HasNetwork) -> list[Layer]:
    """Every layer of the text decoder with its FFNs, experts among them; see ``anatomy.anatomy``."""
    return anatomy(network_of(model))


def feed_forwards(model: nn.Module | HasNetwork) -> list[FeedForward]:
    """The FFNs of the text decoder that are modules of their own, in the order of the layers: most models' only ones.

    Raises ``InputError`` that says what was found for an anatomy that is not known.
    """
    return [block for layer in layers(model) for block in layer.blocks if isinstance(block, FeedForward)]


def stacks(model: nn.Module | HasNetwork) -> list[ExpertStack]:
    """The experts of the text decoder that share three-dimensional parameters, one stack a layer."""
    return [block for layer in layers(model) for block in layer.blocks if isinstance(block, ExpertStack)]


def require_dense(model: nn.Module | HasNetwork, what: str) -> None:
    """Raise ``InputError`` for a mixture of experts; ``what`` is what cannot be done with one."""
    for layer in layers(model):
        if not layer.is_plain and layer.blocks:
            raise InputError(
                f"{what} reads one FFN a layer that every token goes through, but layer {layer.index} of "
                f"{type(network_of(model)).__name__} has experts or several FFNs; use the paper's selector there"
            )


def widths_of(model: nn.Module | HasNetwork) -> tuple[int, ...]:
    """The number of neurons of each layer; 0 for one without an FFN."""
    return tuple(layer.width for layer in layers(model))


class Place(NamedTuple):
    """A neuron by where it is: ``expert`` is the number of a routed expert, or the name of the FFN within its layer."""

    layer: int
    expert: int | str
    channel: int


def _spans(layer: Layer) -> Iterator[tuple[int | str, int, int]]:
    """Each FFN of a layer: its number or name, its first neuron and its width."""
    for block in layer.blocks:
        if isinstance(block, ExpertStack):
            # A second stack is one of shared experts, or of experts for images.
            for expert in range(block.count):
                yield expert if block is layer.blocks[0] else f"{block.name}.{expert}", block.first + expert * block.width, block.width
        else:
            yield block.name if block.expert is None else block.expert, block.first, block.width


def places(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Place]:
    """Where the neurons of a set are. The same for every layout of one model's weights."""
    found = []
    for layer in layers(model):
        channels = neurons.layer(layer.index)
        for expert, first, width in _spans(layer):
            own = channels[(channels >= first) & (channels < first + width)] - first
            found += [Place(layer.index, expert, channel) for channel in own.tolist()]
    return found


def neurons_at(model: nn.Module | HasNetwork, where: Sequence[tuple[int, int | str, int]], label: str = "") -> NeuronSet:
    """The set of the neurons at these places, (layer, expert, channel); the inverse of ``places``.

    Raises ``InputError`` for a place that the model does not have.
    """
    network = network_of(model)
    found = layers(network)
    spans = {(layer.index, expert): (first, width) for layer in found for expert, first, width in _spans(layer)}
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
    return NeuronSet.of(chosen, tuple(layer.width for layer in found), fingerprint(network), label)


def config_of(network: nn.Module) -> Any:
    """The transformers config of the network, or of its decoder where it is a module of the user's own around one."""
    return vars(network).get("config") or vars(decoder_of(network))["config"]


def fingerprint(model: nn.Module | HasNetwork) -> str:
    """Sixteen hexadecimal digits that say whose neurons these are.

    A model trained from another keeps the other's fingerprint (in its config), so that T0's neurons can be named on T1.
    A model without such a history is known by its type, its shape and the signs of a sample of its FFN weights, which
    are the same in every floating-point precision and every layout of its experts.
    """
    network = network_of(model)
    config = config_of(network)
    lineage = vars(config).get(LINEAGE)
    if lineage:
        return str(lineage)
    digest = hashlib.sha256(str(config.model_type).encode())
    for layer in layers(network):
        for block in layer.blocks:
            name = f"down_proj.weight of layer {layer.index}"
            for shape, sample in _samples(name, block):
                digest.update(f"{tuple(shape)}".encode())
                if sample is not None:
                    # float16 first: what is too small for it loses its sign there, and so must lose it everywhere.
                    signs = sample[:16, :256].to(torch.float16) > 0
                    digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(name: str, block: FeedForward | ExpertStack) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
    """The shape of each output projection and some of its first rows; of experts only those of the first."""
    if isinstance(block, ExpertStack):
        weight = block.parameter(block.output)
        (first,) = shards.first_rows(name, weight, 1)
        sample = first.T if block.output.dim == 1 else first
        for expert in range(block.count):
            yield (sample.shape[0], sample.shape[1]), sample if expert == 0 else None
        return
    shape = size_of(block.output)
    assert shape is not None, "anatomy has measured it"
    weight_or_none = weight_of(block.output)
    if weight_or_none is None or weight_or_none.dim() != 2:
        # Weights packed in a way of their own: any of the integers that hold them tells them from others'.
        linear = linear_in(block.output)
        packed = next(one for one in (*linear.buffers(), *linear.parameters()) if one.numel() > 1)
        yield shape[::-1], (packed.flatten()[:4096].to(torch.int64) % 2).view(1, -1)
        return
    weight = weight_or_none
    if in_four_bits(weight):
        weight = nn.Parameter(dense(weight))
    if block.expert:
        yield shape[::-1], None
    elif is_transposed(block.output):
        yield shape[::-1], shards.first_rows(name, weight, 256)[:, :16].T
    else:
        yield shape[::-1], shards.first_rows(name, weight, 16)


def owned_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """Every part of every parameter that the neurons own: gate and up rows, their biases, down columns.

    Within a model of PEFT these are the weights that adapters are added to. Quantised weights, which do not change, are
    left out. Raises ``InputError`` for a neuron set of another model.
    """
    network = network_of(model)
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


def _own(linear: nn.Module) -> list[nn.Parameter]:
    """The weight and the bias of a linear layer, as far as it has them; not the scales of packed weights."""
    found = [linear._parameters.get("weight"), linear._parameters.get("bias")]
    return [one for one in found if one is not None]


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
    shape = tuple(shards.shape_of(parameter))
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


@dataclass
class Recording:
    """What ``recorded`` collects in the last forward pass: layer -> activations, or what ``reduce`` made of them.

    ``routed`` are the layers with experts, where NaN means a token that was not routed there, and ``layer`` is the one
    whose activations ``reduce`` was given last.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    routed: frozenset[int] = frozenset()
    layer: int = 0


@contextmanager
def recorded(model: nn.Module | HasNetwork, reduce: Callable[[Tensor], Tensor] | None = None) -> Iterator[Recording]:
    """Within the block, each forward pass leaves every layer's neuron activations in the recording.

    Activations are ``[batch, token, neuron]`` in the model's precision, before the output projection. ``reduce`` is
    applied at once to each layer's, so that a pooled vector is all that stays in memory. Neurons of an expert that a
    token was not routed to have no activation there: NaN. Layers without an FFN are left out.
    """
    require_eager(model)
    network, sheets = network_of(model), _Sheets()
    found = {layer.index: layer for layer in layers(network)}
    recording = Recording(routed=frozenset(index for index, layer in found.items() if not layer.is_plain))

    def keep(layer: int, activations: Tensor) -> None:
        recording.layer = layer
        recording.layers[layer] = activations if reduce is None else reduce(activations)

    def tap(flow: Flow) -> None:
        if found[flow.layer].is_plain:
            keep(flow.layer, flow.whole().detach())
        else:
            sheets.write(flow, found[flow.layer].width)

    with ExitStack() as stack:
        stack.enter_context(watched(decoder_of(network), list(found.values()), tap))
        for layer in found.values():
            if layer.blocks and not layer.is_plain:

                def done(*_: Any, index: int = layer.index) -> None:
                    if index in sheets.of:
                        keep(index, sheets.of.pop(index))

                stack.callback(layer.module.register_forward_hook(done).remove)
        yield recording


class _Sheets:
    """The activations of layers of several FFNs, written one FFN after another."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}

    def write(self, flow: Flow, width: int) -> None:
        """Put the activations of one FFN into those of its layer, at the tokens that went through it."""
        values = flow.activations.detach()
        if flow.layer not in self.of:
            shape = (flow.tokens.rows, flow.tokens.length, width)
            self.of[flow.layer] = torch.full(shape, torch.nan, dtype=values.dtype, device=values.device)
        sheet = self.of[flow.layer].flatten(0, 1)[:, flow.first : flow.first + values.shape[-1]]
        # What is not finite must not look like what is not there.
        values = values.flatten(0, -2).nan_to_num(torch.inf, torch.inf, -torch.inf)
        if flow.places is None:
            sheet.copy_(values)
        else:
            sheet.index_copy_(0, flow.places, values)


@contextmanager
def rewritten(model: nn.Module | HasNetwork, changes: Mapping[int, Change]) -> Iterator[None]:
    """Within the block the activations of each named layer are what its function makes of them.

    They are ``[batch, token, neuron]``; the weights are not touched, so the model is bit-identical afterwards, also
    after an exception. Gradients flow as through the rewritten model. A layer of several FFNs asks its function about
    one of them after another, with all other neurons at zero.
    """
    widths = widths_of(model)

    def at(layer: int, first: int, width: int) -> Change | None:
        change = changes.get(layer)
        if change is None or width == widths[layer]:
            return change

        def part(activations: Tensor) -> Tensor:
            rest = widths[layer] - first - width
            return change(nn.functional.pad(activations, (first, rest)))[..., first : first + width]

        return part

    with _rewritten(model, changes, at):
        yield


@contextmanager
def _rewritten(
    model: nn.Module | HasNetwork, chosen: Mapping[int, Any], at: Callable[[int, int, int], Change | None]
) -> Iterator[None]:
    """Within the block each FFN of the chosen layers is under ``at(layer, first neuron, width)``."""
    require_eager(model)
    network = network_of(model)

    def tap(flow: Flow) -> Tensor | None:
        change = at(flow.layer, flow.first, flow.activations.shape[-1])
        return None if change is None else flow.narrowed(change(flow.whole()))

    with watched(decoder_of(network), [layer for layer in layers(network) if layer.index in chosen], tap):
        yield


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
    chosen = _required(model, [edit])
    with _rewritten(model, chosen, lambda layer, first, width: everywhere(edit, layer, first, width)):
        yield


@contextmanager
def edited(model: nn.Module | HasNetwork, edits: Sequence[Edit | None], rows: Sequence[int]) -> Iterator[None]:
    """Within the block row ``r`` of each batch is under ``edits[rows[r]]``: several attacks in one batch.

    Every batch must have ``len(rows)`` rows. Raises ``InputError`` for a neuron set of another model.
    """
    chosen = _required(model, edits)
    with _rewritten(model, chosen, lambda layer, first, width: by_row(edits, rows, layer, first, width)):
        yield


def _required(model: nn.Module | HasNetwork, edits: Sequence[Edit | None]) -> dict[int, bool]:
    """The layers that the edits change, if all of them are of this model; else ``InputError``."""
    network = network_of(model)
    own, widths = fingerprint(network), widths_of(network)
    sets = [edit.neurons.require(own, widths) for edit in edits if edit is not None]
    return {layer: True for neurons in sets for layer in neurons.layers()}


def require_eager(model: nn.Module | HasNetwork) -> None:
    """Raise ``InputError`` for a compiled model: its graph, once made, does not know hooks that are added later."""
    network = model if isinstance(model, nn.Module) else model.network
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in network.modules()):
        raise InputError(
            "a compiled model computes on without asking hooks, so its neurons can be neither recorded nor pruned; "
            "expected the model as it was before torch.compile, use and call that one"
        )
