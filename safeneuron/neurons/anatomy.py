"""Where the FFNs of a decoder lie, found by the shapes of its matrices and their place in the tree, not by names.

A layer is an ordered list of blocks: its routed experts, then its dense FFNs and shared experts. An FFN is an output
projection of W inputs and as many outputs as the residual stream has, with the one or two matrices of W rows, or the
one of 2 W, that lie nearest to it in the tree and read the residual stream. Attention and state-space mixers of fitting
sizes are told apart by what lies beside them: a projection of keys, a convolution, a recurrence. ``probing_anatomy``
proves on the model itself that what was found here is so.
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
    shapes = _volumes(module)
    if len(shapes) not in (2, 3):
        return None
    *inputs, output = shapes
    transposed = getattr(
        module, "is_transposed", _is_transposed([shapes[key] for key in inputs], shapes[output], hidden)
    )
    count, *sizes = shapes[output]
    width, out = sizes if transposed else sizes[::-1]
    if out != hidden:
        return None
    rows = 2 if transposed else 1
    fitting = [shapes[key][3 - rows] == hidden and shapes[key][0] >= count for key in inputs]
    lengths = [shapes[key][rows] for key in inputs]
    if not all(fitting) or (lengths != [2 * width] and any(length != width for length in lengths)):
        return None
    fused = lengths == [2 * width] and len(inputs) == 1
    alternating = not getattr(module, "is_concatenated", True)
    parts = [(0, 2), (1, 2)] if alternating else [(0, 1), (width, 1)]
    places = parts if fused else [(0, 1)]
    found = []
    for key in inputs:
        found += [Stacked(key, rows, *place) for place in places]
        for bias, one in module._parameters.items():
            if (
                bias.startswith(key)
                and one is not None
                and tuple(sharding.shape_of(one)) == (shapes[key][0], shapes[key][rows])
            ):
                found += [Stacked(bias, 1, *place) for place in places]
    down = Stacked(output, 1 if transposed else 2)
    return ExpertStack(0, width, module, down, tuple(found), count=count, name=name)


def _volumes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the module's three-dimensional parameters, or of those that its children are made of."""
    own = {key: one for key, one in module._parameters.items() if one is not None}
    if not any(len(sharding.shape_of(one)) == 3 for one in own.values()):
        # JetMoE has a module for each matrix.
        own = {
            f"{name}.{key}": one
            for name, child in module.named_children()
            for key, one in child._parameters.items()
            if one is not None and len(child._parameters) == 1
        }
    return {key: sharding.shape_of(one) for key, one in own.items() if len(sharding.shape_of(one)) == 3}


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

    Raises ``InputError`` for a network that has none.
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
    found: list[nn.ModuleList] = []
    config = getattr(module, "config", None)
    for child in module.children():
        own = getattr(child, "config", None)
        if config is not None and own is not None and own is not config and type(own) is not type(config):
            continue
        if isinstance(child, nn.ModuleList):
            if len(child) and any(parameter.dim() > 1 for parameter in child[0].parameters()):
                found.append(child)
        else:
            found += _lists(child)
    return found


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers. Raises ``InputError`` where it is not clear which one that is."""
    own = getattr(decoder, "layers", None)
    if isinstance(own, nn.ModuleList):
        return own
    hidden = hidden_size(decoder)
    lists = _lists(decoder)
    found = [one for one in lists if any(_blocks(0, layer, hidden, False) for layer in one)]
    if len(found) != 1:
        raise InputError(
            f"{type(decoder).__name__} has {len(found)} lists of layers with an FFN, where one was expected: found "
            f"{module_names(decoder.named_children())}; this architecture is not known"
        )
    return found[0]


def hidden_size(decoder: nn.Module) -> int:
    """The width of the residual stream."""
    config: Any = decoder.config
    text = config.get_text_config(decoder=True)
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise InputError(f"the config of {type(decoder).__name__} has no hidden_size; this architecture is not known")
    return size


def anatomy(network: nn.Module) -> list[Layer]:
    """Every layer of the text decoder with its FFNs, in order.

    Raises ``InputError`` that says what was found where no layer has one, or where one FFN serves several layers.
    """
    decoder = decoder_of(network)
    layers, hidden = layers_of(decoder), hidden_size(decoder)
    interleaved = bool(getattr(decoder.config, INTERLEAVED, False))
    found = [Layer(index, layer, _blocks(index, layer, hidden, interleaved)) for index, layer in enumerate(layers)]
    if not any(layer.blocks for layer in found):
        kinds = "; ".join(dict.fromkeys(f"{type(unwrapped(one)).__name__} with {_shapes(one)}" for one in layers))
        raise InputError(
            f"no layer of {type(decoder).__name__} has an FFN of a known form: expected a projection into {hidden} "
            f"values and one or two matrices that write its input, found {kinds[:600] or 'no layer'}"
        )
    _require_complete(found, decoder, hidden)
    seen: dict[int, int] = {}
    for layer in found:
        for block in layer.blocks:
            part = id(block.holder)
            if seen.setdefault(part, layer.index) != layer.index:
                raise InputError(
                    f"layers {seen[part]} and {layer.index} of {type(decoder).__name__} share one FFN, so that its "
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
        inner = unwrapped(layer.module)
        here = {block.name for block in layer.blocks}
        stacks = [block.holder for block in layer.blocks if block.is_mixture]
        stacked = {id(part) for module in stacks for part in (module, *module.children())}
        for name, module in inner.named_modules():
            known = (name, type(module)) in kinds and name not in here and name
            volumes = [
                one for one in module._parameters.values() if one is not None and sharding.shape_of(one)[3:] == ()
            ]
            odd = id(module) not in stacked and any(
                len(sharding.shape_of(one)) == 3
                and sharding.shape_of(one)[0] > 1
                and hidden in sharding.shape_of(one)[1:]
                for one in volumes
            )
            odd = (
                odd
                and not isinstance(module, nn.modules.conv._ConvNd)
                and "attention" not in name
                and "attn" not in name
            )
            if known or odd:
                what = "an FFN" if known else "three-dimensional weights, perhaps of experts,"
                raise InputError(
                    f"layer {layer.index} of {type(decoder).__name__} has {what} of no known form or fitting sizes in "
                    f"{name or 'itself'} ({type(module).__name__}): found {_shapes(module)}; expected an FFN of one or "
                    "two matrices that write the input of a third"
                )


def _shapes(layer: nn.Module) -> str:
    """The matrices of a layer, for people."""
    own = [f"{name} {tuple(sharding.shape_of(one))}" for name, one in layer.named_parameters() if one.dim() > 1]
    return ", ".join(own) or "no matrix"


def module_names(modules: Iterator[tuple[str, nn.Module]]) -> str:
    """Names and types of modules, for people."""
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in modules if name) or "nothing"


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    module: nn.Module
    inputs: int
    outputs: int


def _blocks(index: int, layer: nn.Module, hidden: int, interleaved: bool) -> tuple[Block, ...]:
    """The blocks of one layer: routed experts first, then all else in the order of its definition."""
    layer = unwrapped(layer)
    leaves, stacks = _parts(layer, hidden)
    found = _told_apart(
        [(leaf, ffn) for leaf in leaves if (ffn := _feed_forward(index, layer, leaf, leaves, hidden, interleaved))]
    )
    experts = _routed(layer, found)
    found = [replace(block, expert=experts.get(block.name)) for block in found]
    widest = max((block.width for block in found if block.expert is None), default=0)
    dense = [block for block in found if block.expert is None and block.width * NARROW > widest]
    split = sorted((block for block in found if block.expert is not None), key=lambda block: block.expert or 0)
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
    for depth in range(len(output.path) - 1, -1, -1):
        place = output.path[:depth]
        near = [leaf for leaf in leaves if leaf.path[:depth] == place and leaf is not output]
        fitting = [leaf for leaf in near if leaf.inputs == hidden and leaf.outputs in (width, 2 * width)]
        # Attention in the layer beside it may have matrices of the same sizes.
        writers = [leaf for leaf in fitting if not any("attn" in name or "attention" in name for name in leaf.path)]
        if not writers:
            continue
        # The one hint by name: grouped-query attention may have the sizes of a fused FFN. The proof is the probe's.
        if any(_is_attention(_at(layer, output.path[:at]), output.path[:at]) for at in range(1, len(output.path))):
            return None
        others = [leaf for leaf in near if leaf not in writers]
        if depth and not _alone(acting(_at(layer, place)), others, width, hidden):
            return None
        inputs = _inputs(writers, width, interleaved)
        name = ".".join(output.path[: depth or -1])
        norm = _norm(_at(layer, place), width) if depth and width != hidden else None
        return FeedForward(index, width, output.module, inputs, name=name, norm=norm) if inputs else None
    return None


def _told_apart(found: list[tuple[_Leaf, FeedForward]]) -> list[FeedForward]:
    """One FFN of each set of matrices: where all are square, each of them might be the output projection.

    Then a name decides, or else the order of definition. That it is the right one is for the probe to prove.
    """
    candidates: dict[frozenset[int], list[tuple[_Leaf, FeedForward]]] = {}
    for leaf, block in found:
        parts = frozenset(id(module) for module in (block.output, *(rows.module for rows in block.inputs)))
        candidates.setdefault(parts, []).append((leaf, block))
    kept = []
    for same in candidates.values():
        named = [block for leaf, block in same if "down" in leaf.path[-1] or leaf.path[-1].endswith("2")]
        kept.append(named[0] if len(named) == 1 else same[-1][1])
    return kept


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
    found = [
        module
        for module in place.modules()
        if size_of(module) is None
        and {tuple(sharding.shape_of(one)) for one in module.parameters(recurse=False)} == {(width,)}
    ]
    return found[0] if len(found) == 1 else None


def _alone(place: nn.Module, others: list[_Leaf], width: int, hidden: int) -> bool:
    """Whether nothing else of size lies beside the matrices: no keys or values, no convolution, no recurrence.

    One square matrix may: the receptance of RWKV's channel mixing.
    """
    if len(others) > 1 or any((leaf.inputs, leaf.outputs) != (hidden, hidden) for leaf in others):
        return False
    linears = {id(one) for module in place.modules() if size_of(module) for one in module.parameters()}
    rest = (one for one in place.parameters() if id(one) not in linears)
    return all(sharding.shape_of(one).numel() <= max(width, hidden) for one in rest)


def _is_attention(module: nn.Module, path: tuple[str, ...]) -> bool:
    return any("attn" in name or "attention" in name for name in (type(module).__name__.lower(), path[-1].lower()))


def _at(layer: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        layer = acting(layer)._modules[name] or layer
    return layer


def _routed(layer: nn.Module, blocks: list[FeedForward]) -> dict[str, int]:
    """The number of each FFN that is one of a list of experts, by its name: a list below the layer, beside a router."""
    found = {}
    for block in blocks:
        *place, number = block.name.split(".")
        if len(place) > 1 and number.isdigit() and isinstance(_at(layer, tuple(place)), nn.ModuleList):
            found[block.name] = int(number)
    return found
