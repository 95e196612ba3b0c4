"""Where the FFNs of a decoder lie, found by the shapes of its matrices and their place in the tree, not by names.

A layer is an ordered list of blocks: its routed experts, then its dense FFNs and shared experts. An FFN is an output
projection of W inputs and as many outputs as the residual stream has, with the one or two matrices of W rows, or the
one of 2 W, that lie nearest to it in the tree and read the residual stream. Attention and state-space mixers of fitting
sizes are told apart by what lies beside them: a projection of keys, a convolution, a recurrence. ``verification``
proves on the model itself that what was found here is so.

Shapes: W is the width of an FFN, H that of the residual stream. A matrix that writes is ``[W, H]`` or, fused,
``[2 W, H]``, the output projection ``[H, W]``; sizes of linear layers are (inputs, outputs), however they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from safeneuron.errors import InputError
from safeneuron.neurons.blocks import Block, Layer
from safeneuron.neurons.dense import FeedForward, Rows
from safeneuron.neurons.experts import ExpertStack, Stacked
from safeneuron.neurons.linears import acting, size_of, unwrapped
from safeneuron.runtime import sharding


def stack_in(module: nn.Module, name: str, hidden: int) -> ExpertStack | None:
    """The module as a stack of experts, if its own three-dimensional parameters are those of one.

    The output projection is the last of two or three of them, ``[expert, hidden, width]`` or transposed; the others are
    one of ``2 * width`` rows, or one or two of ``width``. Whether a fused one holds halves or alternating rows is what
    the class says in ``is_concatenated``.
    """
    shapes = _three_dimensional(module)
    if len(shapes) not in (2, 3):
        return None
    *inputs, output = shapes
    transposed = getattr(
        module, "is_transposed", _is_transposed([shapes[key] for key in inputs], shapes[output], hidden)
    )
    # What reads the activations: as many outputs as the residual stream has.
    count, *sizes = shapes[output]
    width, out = sizes if transposed else sizes[::-1]
    if out != hidden:
        return None
    # What writes them: as many inputs, and the width, or twice that where gate and up are one.
    rows = 2 if transposed else 1
    fitting = [shapes[key][3 - rows] == hidden and shapes[key][0] >= count for key in inputs]
    lengths = [shapes[key][rows] for key in inputs]
    if not all(fitting) or (lengths != [2 * width] and any(length != width for length in lengths)):
        return None
    fused = lengths == [2 * width] and len(inputs) == 1
    alternating = not getattr(module, "is_concatenated", True)
    parts = [(0, 2), (1, 2)] if alternating else [(0, 1), (width, 1)]
    places = parts if fused else [(0, 1)]
    writers = []
    for key in inputs:
        writers += [Stacked(key, rows, *place) for place in places]
        # A bias has the name of its matrix with something after it, and a value for each of its rows.
        for bias, parameter in module.named_parameters(recurse=False):
            if bias.startswith(key) and tuple(sharding.shape_of(parameter)) == (shapes[key][0], shapes[key][rows]):
                writers += [Stacked(bias, 1, *place) for place in places]
    down = Stacked(output, 1 if transposed else 2)
    return ExpertStack(0, width, module, down, tuple(writers), count=count, name=name)


def _three_dimensional(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the module's three-dimensional parameters, or of those that its children are made of."""
    parameters = dict(module.named_parameters(recurse=False))
    if not any(len(sharding.shape_of(parameter)) == 3 for parameter in parameters.values()):
        # JetMoE has a module for each matrix.
        parameters = {
            f"{name}.{key}": parameter
            for name, child in module.named_children()
            for key, parameter in child.named_parameters(recurse=False)
            if len(child._parameters) == 1
        }
    shapes = {key: sharding.shape_of(parameter) for key, parameter in parameters.items()}
    return {key: shape for key, shape in shapes.items() if len(shape) == 3}


def _is_transposed(inputs: list[torch.Size], output: torch.Size, hidden: int) -> bool:
    """Whether matrices are kept ``[input, output]``; where the shape alone does not say, they are not."""
    if output[1] != output[2]:
        return output[2] == hidden
    return all(shape[1] == hidden != shape[2] for shape in inputs)


# A model whose fused matrices alternate rows of gate and up says so in its config under this name.
INTERLEAVED = "safeneuron_interleaved"
# And one that computes on (token, row, channel), as XLNet does, instead of (row, token, channel), under this one.
TIME_FIRST = "safeneuron_time_first"
# A projection this many times narrower than the widest FFN of its layer is a bottleneck: an adapter, a low-rank path.
NARROW = 8


def decoder_of(network: nn.Module) -> nn.Module:
    """The text decoder, which takes tokens or their embeddings; a vision tower has FFNs too and must not be found.

    Args:
        network: A causal language model, one with a vision tower, or a module of the user's own around one.

    Returns:
        The module that is called with ``input_ids`` or ``inputs_embeds``; the network itself where it is that.

    Raises:
        InputError: For a network that has none.
    """
    find = getattr(network, "get_decoder", None)
    decoder = find() if callable(find) else network
    if isinstance(decoder, nn.Module) and decoder is not network and _lists(decoder):
        return decoder
    if isinstance(getattr(network, "layers", None), nn.ModuleList):
        return network
    base = getattr(network, "base_model", None)
    if isinstance(base, nn.Module) and base is not network and _lists(base):
        return base
    # A module of the user's own around a model, with a value head for example, has one part that has a decoder.
    inner = [part for part in network.children() if hasattr(part, "get_decoder") or _has_layers(part)]
    if len(inner) == 1:
        return decoder_of(inner[0])
    if callable(find) and _lists(network):
        return network
    raise InputError(
        f"{type(network).__name__} has no text decoder with a list of layers: get_decoder() should have one, found "
        f"{module_names(network.named_children())}; use a causal language model"
    )


def _has_layers(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layers", None), nn.ModuleList)


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of modules that hold a matrix each; those of a tower with a config of its own are its own."""
    lists: list[nn.ModuleList] = []
    config = getattr(module, "config", None)
    for child in module.children():
        inner = getattr(child, "config", None)
        # A config of another class is that of another model: a vision tower, an encoder.
        if config is not None and inner is not None and inner is not config and type(inner) is not type(config):
            continue
        if isinstance(child, nn.ModuleList):
            if len(child) and any(parameter.dim() > 1 for parameter in child[0].parameters()):
                lists.append(child)
        else:
            lists += _lists(child)
    return lists


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers.

    Raises:
        InputError: Where it is not clear which one that is.
    """
    named = getattr(decoder, "layers", None)
    if isinstance(named, nn.ModuleList):
        return named
    hidden = hidden_size(decoder)
    lists = [layers for layers in _lists(decoder) if any(_blocks(0, layer, hidden, False) for layer in layers)]
    if len(lists) != 1:
        raise InputError(
            f"{type(decoder).__name__} has {len(lists)} lists of layers with an FFN, where one was expected: found "
            f"{module_names(decoder.named_children())}; this architecture is not known"
        )
    return lists[0]


def hidden_size(decoder: nn.Module) -> int:
    """The width of the residual stream.

    Raises:
        InputError: For a config that does not say.
    """
    config: Any = decoder.config
    text = config.get_text_config(decoder=True)
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise InputError(f"the config of {type(decoder).__name__} has no hidden_size; this architecture is not known")
    return size


def anatomy(network: nn.Module) -> list[Layer]:
    """Every layer of the text decoder with its FFNs, in order.

    Raises:
        InputError: Where no layer has one, a layer has one of no known form, or one FFN serves several layers.
    """
    decoder = decoder_of(network)
    layers, hidden = layers_of(decoder), hidden_size(decoder)
    interleaved = bool(getattr(decoder.config, INTERLEAVED, False))
    found = [Layer(index, layer, _blocks(index, layer, hidden, interleaved)) for index, layer in enumerate(layers)]
    if not any(layer.blocks for layer in found):
        kinds = "; ".join(dict.fromkeys(f"{type(unwrapped(layer)).__name__} with {_shapes(layer)}" for layer in layers))
        raise InputError(
            f"no layer of {type(decoder).__name__} has an FFN of a known form: expected a projection into {hidden} "
            f"values and one or two matrices that write its input, found {kinds[:600] or 'no layer'}"
        )
    _require_complete(found, decoder, hidden)
    # A freeze of one layer's neurons would be one of another's.
    seen: dict[int, int] = {}
    for layer in found:
        for block in layer.blocks:
            number = id(block.holder)
            if seen.setdefault(number, layer.index) != layer.index:
                raise InputError(
                    f"layers {seen[number]} and {layer.index} of {type(decoder).__name__} share one FFN, so that its "
                    "neurons are not those of a layer; this architecture is not supported"
                )
    return found


def _require_complete(found: list[Layer], decoder: nn.Module, hidden: int) -> None:
    """Raise ``InputError`` where a layer holds what should be an FFN or experts, but is of no known form."""
    kinds = {
        (block.name, type(_at(unwrapped(layer.module), tuple(block.name.split("."))))) if block.name else ("", None)
        for layer in found
        for block in layer.blocks
    }
    for layer in found:
        here = {block.name for block in layer.blocks}
        stacks = [block.holder for block in layer.blocks if block.is_mixture]
        stacked = {id(part) for module in stacks for part in (module, *module.children())}
        for name, module in unwrapped(layer.module).named_modules():
            # An FFN in other layers, by its place and class, and none here.
            missing = (name, type(module)) in kinds and name not in here and name
            if missing or (id(module) not in stacked and _may_hold_experts(name, module, hidden)):
                what = "an FFN" if missing else "three-dimensional weights, perhaps of experts,"
                raise InputError(
                    f"layer {layer.index} of {type(decoder).__name__} has {what} of no known form or fitting sizes in "
                    f"{name or 'itself'} ({type(module).__name__}): found {_shapes(module)}; expected an FFN of one or "
                    "two matrices that write the input of a third"
                )


def _may_hold_experts(name: str, module: nn.Module, hidden: int) -> bool:
    """Whether a module, neither attention nor convolution, has three-dimensional weights that read the stream."""
    if isinstance(module, nn.modules.conv._ConvNd) or "attention" in name or "attn" in name:
        return False
    shapes = [sharding.shape_of(parameter) for parameter in module.parameters(recurse=False)]
    return any(len(shape) == 3 and shape[0] > 1 and hidden in shape[1:] for shape in shapes)


def _shapes(layer: nn.Module) -> str:
    """The matrices of a layer, for people."""
    matrices = [(name, parameter) for name, parameter in layer.named_parameters() if parameter.dim() > 1]
    return ", ".join(f"{name} {tuple(sharding.shape_of(matrix))}" for name, matrix in matrices) or "no matrix"


def module_names(modules: Iterator[tuple[str, nn.Module]]) -> str:
    """Names and types of modules, for people."""
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in modules if name) or "nothing"


class _Leaf(NamedTuple):
    """A linear layer with its place in the layer."""

    path: tuple[str, ...]
    module: nn.Module
    inputs: int
    outputs: int


def _blocks(index: int, layer: nn.Module, hidden: int, interleaved: bool) -> tuple[Block, ...]:
    """The blocks of one layer: routed experts first, then all else in the order of its definition."""
    layer = unwrapped(layer)
    leaves, stacks = _parts(layer, hidden)
    # Each linear layer is tried as an output projection.
    candidates = [(leaf, _feed_forward(index, layer, leaf, leaves, hidden, interleaved)) for leaf in leaves]
    ffns = _one_of_each([(leaf, ffn) for leaf, ffn in candidates if ffn is not None])
    experts = _routed(layer, ffns)
    ffns = [replace(ffn, expert=experts.get(ffn.name)) for ffn in ffns]
    widest = max((ffn.width for ffn in ffns if ffn.expert is None), default=0)
    dense = [ffn for ffn in ffns if ffn.expert is None and ffn.width * NARROW > widest]
    split = sorted((ffn for ffn in ffns if ffn.expert is not None), key=lambda ffn: ffn.expert or 0)
    routed = [replace(stack, layer=index) for stack in stacks]
    ordered: list[Block] = [*sorted(routed, key=lambda stack: -stack.count), *split, *dense]
    blocks: list[Block] = []
    first = 0
    for block in ordered:
        blocks.append(replace(block, first=first))
        first += block.neurons
    return tuple(blocks)


def _parts(layer: nn.Module, hidden: int) -> tuple[list[_Leaf], list[ExpertStack]]:
    """The linear layers and the stacks of experts of a layer, in the order of their definition."""
    leaves: list[_Leaf] = []
    stacks: list[ExpertStack] = []

    def walk(module: nn.Module, path: tuple[str, ...]) -> None:
        size = size_of(module) if path else None
        if size is not None:
            leaves.append(_Leaf(path, module, *size))
            return
        inner = acting(module)
        # Weights of all heads in one parameter look like experts.
        heads = any(_is_attention(_at(layer, path[:at]), path[:at]) for at in range(1, len(path) + 1))
        stack = None if heads else stack_in(inner, ".".join(path), hidden)
        if stack is not None:
            stacks.append(stack)
            return
        for name, child in inner.named_children():
            walk(child, (*path, name))

    walk(layer, ())
    return leaves, stacks


def _feed_forward(
    index: int, layer: nn.Module, output: _Leaf, leaves: list[_Leaf], hidden: int, interleaved: bool
) -> FeedForward | None:
    """The FFN of which this linear layer is the output projection, if it is one."""
    if output.outputs != hidden:
        return None
    width = output.inputs
    # From the module right around it outwards, up to the layer: the nearest matrices that fit are its own.
    for depth in range(len(output.path) - 1, -1, -1):
        place = output.path[:depth]
        near = [leaf for leaf in leaves if leaf.path[:depth] == place and leaf is not output]
        fitting = [leaf for leaf in near if leaf.inputs == hidden and leaf.outputs in (width, 2 * width)]
        # Attention in the layer beside it may have matrices of the same sizes.
        writers = [leaf for leaf in fitting if not any("attn" in name or "attention" in name for name in leaf.path)]
        if not writers:
            continue
        # The one hint by name: grouped-query attention may have the sizes of a fused FFN. The proof comes later.
        if any(_is_attention(_at(layer, output.path[:at]), output.path[:at]) for at in range(1, len(output.path))):
            return None
        # Inside the layer, a module of an FFN holds nothing else; in the layer itself there is everything.
        others = [leaf for leaf in near if leaf not in writers]
        if depth and not _alone(acting(_at(layer, place)), others, width, hidden):
            return None
        inputs = _inputs(writers, width, interleaved)
        name = ".".join(output.path[: depth or -1])
        norm = _norm(_at(layer, place), width) if depth and width != hidden else None
        return FeedForward(index, width, output.module, inputs, name=name, norm=norm) if inputs else None
    return None


def _one_of_each(candidates: list[tuple[_Leaf, FeedForward]]) -> list[FeedForward]:
    """One FFN of each set of matrices: where all are square, each of them might be the output projection.

    Then a name decides, or else the order of definition. That it is the right one is for ``verification`` to prove.
    """
    same_matrices: dict[frozenset[int], list[tuple[_Leaf, FeedForward]]] = {}
    for leaf, ffn in candidates:
        same_matrices.setdefault(frozenset(map(id, ffn.modules())), []).append((leaf, ffn))
    chosen = []
    for same in same_matrices.values():
        named = [ffn for leaf, ffn in same if "down" in leaf.path[-1] or leaf.path[-1].endswith("2")]
        chosen.append(named[0] if len(named) == 1 else same[-1][1])
    return chosen


def _inputs(writers: list[_Leaf], width: int, interleaved: bool) -> tuple[Rows, ...]:
    """The rows of the matrices, if they are those of one gated or plain FFN."""
    if len(writers) <= 2 and all(leaf.outputs == width for leaf in writers):
        return tuple(Rows(leaf.module, 0) for leaf in writers)
    if len(writers) == 1:
        (leaf,) = writers
        halves = (Rows(leaf.module, 0), Rows(leaf.module, width))
        return (Rows(leaf.module, 0, 2), Rows(leaf.module, 1, 2)) if interleaved else halves
    return ()


def _norm(place: nn.Module, width: int) -> nn.Module | None:
    """The one module beside the matrices that has a value for each neuron, if there is one."""
    norms = [
        module
        for module in place.modules()
        if size_of(module) is None
        and {tuple(sharding.shape_of(parameter)) for parameter in module.parameters(recurse=False)} == {(width,)}
    ]
    return norms[0] if len(norms) == 1 else None


def _alone(place: nn.Module, others: list[_Leaf], width: int, hidden: int) -> bool:
    """Whether nothing else of size lies beside the matrices: no keys or values, no convolution, no recurrence.

    One square matrix may: the receptance of RWKV's channel mixing.
    """
    if len(others) > 1 or any((leaf.inputs, leaf.outputs) != (hidden, hidden) for leaf in others):
        return False
    linears = {id(parameter) for module in place.modules() if size_of(module) for parameter in module.parameters()}
    rest = [sharding.shape_of(parameter) for parameter in place.parameters() if id(parameter) not in linears]
    return all(shape.numel() <= max(width, hidden) for shape in rest)


def _is_attention(module: nn.Module, path: tuple[str, ...]) -> bool:
    return any("attn" in name or "attention" in name for name in (type(module).__name__.lower(), path[-1].lower()))


def _at(layer: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        layer = acting(layer)._modules[name] or layer
    return layer


def _routed(layer: nn.Module, ffns: list[FeedForward]) -> dict[str, int]:
    """The number of each FFN that is one of a list of experts, by its name: a list below the layer, beside a router."""
    numbers = {}
    for ffn in ffns:
        *place, number = ffn.name.split(".")
        if len(place) > 1 and number.isdigit() and isinstance(_at(layer, tuple(place)), nn.ModuleList):
            numbers[ffn.name] = int(number)
    return numbers
