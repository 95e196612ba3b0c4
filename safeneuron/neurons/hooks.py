"""What flows into the output projections of FFNs, seen and changed while the model runs.

A linear layer is watched by a hook. Experts in three-dimensional parameters have no module of their own to hook: while
their module runs, the products of activations with slices of its output parameter are intercepted, whatever loop or
kernel the modelling code has around them. Of fused kernels the plain loop over experts is used meanwhile.

Shapes: activations of a dense FFN are ``[row, token, neuron]``, or ``[token, row, neuron]`` where the model is
time-first, or ``[row * token, neuron]``; those of an expert are ``[vector, neuron]``, one vector for each token that
was routed to it, whose places in the flattened batch are ``[vector]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import TIME_FIRST
from safeneuron.neurons.blocks import Block, Layer

# All that modelling code multiplies activations with a slice of a parameter by.
PRODUCTS = {
    functional.linear,
    torch.matmul,
    torch.bmm,
    torch.mm,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.mm,
    Tensor.__matmul__,
}
Tap = Callable[["TokenStream"], Tensor | None]


@dataclass
class TokenLayout:
    """The batch that the decoder is running on: how many rows, how many tokens each, and which comes first."""

    rows: int = 0
    length: int = 0
    time_first: bool = False

    def see(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Read the shape of the decoder's input, which is token ids or their embeddings; a forward pre-hook."""
        candidates = [named.get("input_ids"), named.get("inputs_embeds"), *inputs]
        tensor = next((candidate for candidate in candidates if isinstance(candidate, Tensor)), None)
        if tensor is not None:
            self.rows, self.length = tensor.shape[0], tensor.shape[1]


@dataclass
class TokenStream:
    """Activations on their way into one output projection.

    ``activations`` is ``[..., channel]``, ``first`` the place of its first channel among the layer's, and ``places``
    ``[vector]`` says which tokens of the flattened batch they are; ``None`` for all of them in order.
    """

    layer: int
    first: int
    activations: Tensor
    places: Tensor | None
    tokens: TokenLayout

    def whole(self) -> Tensor:
        """The activations as ``[row, token, channel]``, zero at tokens that were not routed here.

        Raises:
            InputError: For activations of another shape than the batch has.
        """
        values = self.activations
        # One expert's vectors go back to their tokens.
        if self.places is not None:
            flat = values.new_zeros(self.tokens.rows * self.tokens.length, values.shape[-1])
            values = flat.index_copy(0, self.places, values)
        batch = (self.tokens.rows, self.tokens.length)
        if values.dim() == 2 and len(values) == batch[0] * batch[1]:
            return values.reshape(*batch, values.shape[-1])
        if self.tokens.time_first and values.dim() == 3:
            values = values.transpose(0, 1)
        if values.dim() != 3 or (any(batch) and tuple(values.shape[:2]) != batch):
            raise InputError(
                f"the FFN of layer {self.layer} computes on a tensor of shape {tuple(values.shape)} for a batch of "
                f"{batch[0]} rows of {batch[1]} tokens; expected (row, token, neuron): this architecture is not known"
            )
        return values

    def narrowed(self, whole: Tensor) -> Tensor:
        """The inverse of ``whole``: ``[row, token, channel]`` in the form in which the activations came."""
        if self.places is not None:
            return whole.flatten(0, 1)[self.places]
        if self.tokens.time_first and self.activations.dim() == 3:
            whole = whole.transpose(0, 1)
        return whole.reshape(self.activations.shape)


@contextmanager
def observed(decoder: nn.Module, layers: list[Layer], tap: Tap) -> Iterator[None]:
    """Within the block ``tap`` gets all that flows into the layers' output projections, and may return another tensor.

    Several such blocks, one within another, see what the outer ones have made of it.

    Args:
        decoder: The text decoder, whose input says how many rows and tokens a batch has.
        layers: Those to observe.
        tap: Called with each stream; what it returns takes the place of the activations, ``None`` leaves them.

    Raises:
        InputError: While the model runs, where experts compute in a way that cannot be followed.
    """
    config: Any = decoder.config
    tokens = TokenLayout(time_first=bool(getattr(config, TIME_FIRST, False)))
    with ExitStack() as stack:
        # The first hook of all: what comes after it needs the shape of the batch.
        stack.callback(decoder.register_forward_pre_hook(tokens.see, with_kwargs=True).remove)
        for layer in layers:
            listed: dict[nn.Module, list[tuple[Block, nn.Module]]] = {}
            for block in layer.blocks:
                if block.hooked is None:
                    stack.enter_context(_tapped(block, tap, tokens))
                elif block.router_path is None:
                    stack.callback(block.hooked.register_forward_pre_hook(_dense_hook(block, tap, tokens)).remove)
                else:
                    mixture = layer.module.get_submodule(".".join(block.router_path))
                    listed.setdefault(mixture, []).append((block, block.hooked))
            # Experts in a list are linear layers like any other, but which tokens they get is seen in their mixture.
            for mixture, experts in listed.items():
                routing = _Routing()
                stack.enter_context(_running(mixture, routing))
                for block, module in experts:
                    hook = _routed_hook(block, tap, tokens, routing)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _dense_hook(block: Block, tap: Tap, tokens: TokenLayout) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = tap(TokenStream(block.layer, block.first, inputs[0], None, tokens))
        return None if changed is None else (changed, *inputs[1:])

    return hook


def _routed_hook(
    block: Block, tap: Tap, tokens: TokenLayout, routing: _Routing
) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        values: Tensor = inputs[0]
        vectors = values.flatten(0, -2)
        changed = tap(TokenStream(block.layer, block.first, vectors, routing.places(vectors, tokens), tokens))
        return None if changed is None else (changed.view_as(values), *inputs[1:])

    return hook


class _Routing(TorchFunctionMode):
    """While it is entered it remembers which rows were last picked out of a list of tokens: those of one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.picked: Tensor | None = None
        self.taken = 0

    def within(self, inputs: tuple[Any, ...]) -> _Routing:
        """Itself, for a new pass of the module on these inputs."""
        self.picked, self.taken = None, 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # hidden[places]: a matrix of tokens, indexed by whole numbers.
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            source, picked = args
            if source.dim() == 2 and picked.dim() == 1 and picked.dtype == torch.int64:
                self.picked, self.taken = picked, 0
        return func(*args, **(kwargs or {}))

    def places(self, values: Tensor, tokens: TokenLayout) -> Tensor:
        """Which tokens these vectors are of, ``[vector]``. Raises ``InputError`` where that cannot be told.

        The rows that were picked for one expert, or of those that were picked for all of them the next ones.
        """
        if self.picked is not None and self.taken + len(values) <= len(self.picked):
            self.taken += len(values)
            return self.picked[self.taken - len(values) : self.taken]
        if len(values) == tokens.rows * tokens.length:
            return torch.arange(len(values), device=values.device)
        raise InputError(
            f"an expert got {len(values)} of {tokens.rows * tokens.length} tokens, and it cannot be told which; its "
            "neurons can be neither recorded nor pruned: this mixture of experts is not supported"
        )


class _Products(_Routing):
    """While it is entered, activations on their way into the output projections of experts pass through its taps."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.taps: list[tuple[Tap, TokenLayout]] = []
        self.input: Tensor | None = None
        self.has_tokens = self.has_product = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter of the output projections, as it is in the module now."""
        output = self.block.output_location()
        assert output is not None, "experts without a module to hook have a parameter"
        return output.parameter

    def within(self, inputs: tuple[Any, ...]) -> _Products:
        self.picked, self.taken, self.has_product = None, 0, False
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        self.input = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        # A token may be routed to no expert at all, or past the last of them to one without weights.
        routes = [tensor for tensor in tensors if tensor.dtype == torch.int64]
        self.has_tokens = any(bool((route < self.block.count).any()) for route in routes) or not routes
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and self.has_tokens and not self.has_product:
            names = [name for name, parameter in self.block.holder.named_parameters() if parameter is self.weight]
            raise InputError(
                f"the experts of layer {self.block.layer} ({type(self.block.holder).__name__}) computed without a "
                f"product with {names[0]} that could be followed; this mixture of experts is not supported"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and len(args) >= 2 and self._is_output(args[1]):
            self.has_product = True
            args = (self._changed(args[0], args[1]), *args[1:])
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _is_output(self, tensor: Tensor) -> bool:
        """Whether a factor is a view of the parameter, or the parameter itself: slices share its memory."""
        own = self.weight
        return tensor.device == own.device and tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()

    def _changed(self, values: Tensor, weight: Tensor) -> Tensor:
        """The activations ``[vector, neuron]``, or ``[expert, vector, neuron]``, after all taps."""
        own = self.weight
        # One expert's matrix: where it begins in the parameter says which expert's.
        if weight.dim() == 2:
            expert = (weight.storage_offset() - own.storage_offset()) // own.stride(0)
            places = self.places(values, self.taps[0][1])
            for tap, tokens in self.taps:
                values = self._tapped(expert, values, places, tap, tokens)
            return values
        # All experts at once, each on all tokens; what was not routed came as zeros.
        parts = []
        for expert, part in enumerate(values):
            places = self._routed_places(expert, self.taps[0][1])
            for tap, tokens in self.taps:
                part = self._tapped(expert, part, places, tap, tokens)
            parts.append(part)
        return torch.stack(parts)

    def _tapped(self, expert: int, values: Tensor, places: Tensor, tap: Tap, tokens: TokenLayout) -> Tensor:
        """One expert's activations after one tap, which sees those of the tokens that were routed there."""
        first = self.block.first + expert * self.block.width
        routed = values if len(places) == len(values) else values[places]
        changed = tap(TokenStream(self.block.layer, first, routed, places, tokens))
        if changed is None:
            return values
        return changed if len(places) == len(values) else values.index_copy(0, places, changed)

    def _routed_places(self, expert: int, tokens: TokenLayout) -> Tensor:
        """Which tokens were routed to an expert, where all experts are handed a copy of all tokens."""
        count = tokens.rows * tokens.length
        assert self.input is not None, "experts have an input"
        flat = self.input.flatten(0, -2)
        if len(flat) == count:
            return torch.arange(count, device=flat.device)
        own = flat.reshape(-1, count, flat.shape[-1])[expert]
        return own.any(dim=-1).nonzero().flatten()


class _Watched:
    """The forward of a module while it is watched: the one that it had, run in a mode and with the plain experts."""

    def __init__(self, module: nn.Module, mode: _Routing) -> None:
        self.forward, self.mode = module.forward, mode
        self.config: Any = getattr(module, "config", None)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        with _eager(self.config), self.mode.within((*inputs, *named.values())):
            return self.forward(*inputs, **named)


@contextmanager
def _tapped(block: Block, tap: Tap, tokens: TokenLayout) -> Iterator[None]:
    """Within the block the tap gets all that experts in shared parameters multiply with their output projections."""
    forward = vars(block.holder).get("forward")
    # A module that is watched already has one mode, whose taps go from the outermost to this one.
    if isinstance(forward, _Watched) and isinstance(forward.mode, _Products):
        forward.mode.taps.append((tap, tokens))
        try:
            yield
        finally:
            forward.mode.taps.pop()
        return
    products = _Products(block)
    products.taps.append((tap, tokens))
    with _running(block.holder, products):
        yield


@contextmanager
def _running(module: nn.Module, mode: _Routing) -> Iterator[None]:
    """Within the block the module's forward runs in the mode, and in the plain implementation of its experts."""
    # A forward of the module's own, as accelerate sets one, is in its dictionary; else it is its class's.
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = _Watched(module, mode)
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Within the block experts compute in a loop, whatever kernel the config has chosen."""
    chosen = getattr(config, "_experts_implementation_internal", None)
    if chosen is None:
        yield
        return
    config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        config._experts_implementation_internal = chosen
