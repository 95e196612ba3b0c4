"""What flows into the output projections of FFNs, seen and changed while the model runs.

A linear layer is watched by a hook. Experts in three-dimensional parameters have no module of their own to hook: while
their module runs, the products of activations with slices of its output parameter are intercepted, whatever loop or
kernel the modelling code has around them. Of fused kernels the plain loop over experts is used meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import TIME_FIRST
from safeneuron.neurons.blocks import ExpertStack, FeedForward, Layer

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
        given = [named.get("input_ids"), named.get("inputs_embeds"), *inputs]
        for one in given:
            if isinstance(one, Tensor):
                self.rows, self.length = one.shape[0], one.shape[1]
                return


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
        """The activations as ``[row, token, channel]``, zero at tokens that were not routed here."""
        values = self.activations
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
        """The inverse of ``whole``: in the form in which the activations came."""
        if self.places is not None:
            return whole.flatten(0, 1)[self.places]
        if self.tokens.time_first and self.activations.dim() == 3:
            whole = whole.transpose(0, 1)
        return whole.reshape(self.activations.shape)


@contextmanager
def observed(decoder: nn.Module, layers: list[Layer], tap: Tap) -> Iterator[None]:
    """Within the block ``tap`` gets all that flows into the layers' output projections, and may return another tensor.

    Several such blocks, one within another, see what the outer ones have made of it. Raises ``InputError`` while the
    model runs where experts compute in a way that cannot be followed.
    """
    tokens = TokenLayout(time_first=bool(vars(vars(decoder)["config"]).get(TIME_FIRST)))
    with ExitStack() as stack:
        stack.callback(decoder.register_forward_pre_hook(tokens.see, with_kwargs=True).remove)
        for layer in layers:
            routed: dict[nn.Module, list[FeedForward]] = {}
            for block in layer.blocks:
                if isinstance(block, ExpertStack):
                    stack.enter_context(_tapped(block, tap, tokens))
                elif block.expert is None:
                    stack.callback(block.output.register_forward_pre_hook(_dense_hook(block, tap, tokens)).remove)
                else:
                    routed.setdefault(_parent(layer.module, block), []).append(block)
            for parent, blocks in routed.items():
                seen = _Seen()
                stack.enter_context(_running(parent, seen.within))
                for block in blocks:
                    hook = _routed_hook(block, tap, tokens, seen)
                    stack.callback(block.output.register_forward_pre_hook(hook).remove)
        yield


def _parent(layer: nn.Module, block: FeedForward) -> nn.Module:
    """The module that routes tokens to an expert of a list: the one that holds the list."""
    path = block.name.split(".")
    return layer.get_submodule(".".join(path[:-2]))


def _dense_hook(block: FeedForward, tap: Tap, tokens: TokenLayout) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = tap(TokenStream(block.layer, block.first, inputs[0], None, tokens))
        return None if changed is None else (changed, *inputs[1:])

    return hook


def _routed_hook(
    block: FeedForward, tap: Tap, tokens: TokenLayout, seen: _Seen
) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        values: Tensor = inputs[0]
        flow = TokenStream(
            block.layer, block.first, values.flatten(0, -2), seen.places(values.flatten(0, -2), tokens), tokens
        )
        changed = tap(flow)
        return None if changed is None else (changed.view_as(values), *inputs[1:])

    return hook


class _Seen(TorchFunctionMode):
    """While it is entered it remembers which rows were last picked out of a list of tokens: those of one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.picked: Tensor | None = None
        self.taken = 0

    def within(self, inputs: tuple[Any, ...]) -> _Seen:
        """Itself, for a new pass."""
        self.picked, self.taken = None, 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            source, picked = args
            if source.dim() == 2 and picked.dim() == 1 and picked.dtype == torch.int64:
                self.picked, self.taken = picked, 0
        return func(*args, **(kwargs or {}))

    def places(self, values: Tensor, tokens: TokenLayout) -> Tensor:
        """Which tokens these vectors are of. Raises ``InputError`` where that cannot be told.

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


class _Products(_Seen):
    """While it is entered, activations on their way into a stack's output projection pass through its taps."""

    def __init__(self, block: ExpertStack, taps: list[tuple[Tap, TokenLayout]]) -> None:
        super().__init__()
        self.block, self.taps = block, taps
        self.entering: Tensor | None = None
        self.asked = self.met = False

    def within(self, inputs: tuple[Any, ...]) -> _Products:
        self.picked, self.taken, self.met = None, 0, False
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        self.entering = next((one for one in tensors if one.is_floating_point()), None)
        # A token may be routed to no expert at all, or past the last of them to one without weights.
        routes = [one for one in tensors if one.dtype == torch.int64]
        self.asked = any(bool((one < self.block.count).any()) for one in routes) or not routes
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and self.asked and not self.met:
            raise InputError(
                f"the experts of layer {self.block.layer} ({type(self.block.module).__name__}) computed without a "
                f"product with {self.block.output.name} that could be followed; this mixture of experts is not "
                "supported"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and len(args) >= 2 and self._is_output(args[1]):
            self.met = True
            args = (self._changed(args[0], args[1]), *args[1:])
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _is_output(self, weight: Tensor) -> bool:
        own = self.block.parameter(self.block.output)
        return weight.device == own.device and weight.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()

    def _changed(self, values: Tensor, weight: Tensor) -> Tensor:
        own = self.block.parameter(self.block.output)
        if weight.dim() == 2:
            expert = (weight.storage_offset() - own.storage_offset()) // own.stride(0)
            here = self.places(values, self.taps[0][1])
            for tap, tokens in self.taps:
                values = self._tapped(expert, values, here, tap, tokens)
            return values
        # All experts at once, each on all tokens; what was not routed came as zeros.
        parts = []
        for expert, one in enumerate(values):
            here = self._asked(expert, self.taps[0][1])
            for tap, tokens in self.taps:
                one = self._tapped(expert, one, here, tap, tokens)
            parts.append(one)
        return torch.stack(parts)

    def _tapped(self, expert: int, values: Tensor, here: Tensor, tap: Tap, tokens: TokenLayout) -> Tensor:
        first = self.block.first + expert * self.block.width
        chosen = values if len(here) == len(values) else values[here]
        changed = tap(TokenStream(self.block.layer, first, chosen, here, tokens))
        if changed is None:
            return values
        return changed if len(here) == len(values) else values.index_copy(0, here, changed)

    def _asked(self, expert: int, tokens: TokenLayout) -> Tensor:
        """The tokens that an expert was asked about, where all experts are handed a copy of all tokens."""
        count = tokens.rows * tokens.length
        assert self.entering is not None, "experts have an input"
        flat = self.entering.flatten(0, -2)
        if len(flat) == count:
            return torch.arange(count, device=flat.device)
        own = flat.reshape(-1, count, flat.shape[-1])[expert]
        return own.any(dim=-1).nonzero().flatten()


# The taps of each module of experts that is watched now, outermost first.
_TAPS: WeakKeyDictionary[nn.Module, list[tuple[Tap, TokenLayout]]] = WeakKeyDictionary()


@contextmanager
def _tapped(block: ExpertStack, tap: Tap, tokens: TokenLayout) -> Iterator[None]:
    taps = _TAPS.setdefault(block.module, [])
    taps.append((tap, tokens))
    try:
        if len(taps) > 1:
            yield
        else:
            with _running(block.module, _Products(block, taps).within):
                yield
    finally:
        taps.remove((tap, tokens))


@contextmanager
def _running(module: nn.Module, mode: Callable[[tuple[Any, ...]], _Seen]) -> Iterator[None]:
    """Within the block the module's forward runs in the mode, and in the plain implementation of its experts."""
    before = vars(module).get("forward")
    forward = module.forward
    config = vars(module).get("config")

    def running(*inputs: Any, **named: Any) -> Any:
        with _eager(config), mode((*inputs, *named.values())):
            return forward(*inputs, **named)

    vars(module)["forward"] = running
    try:
        yield
    finally:
        vars(module).pop("forward")
        if before is not None:
            vars(module)["forward"] = before


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Within the block experts compute in a loop, whatever kernel the config has chosen."""
    if config is None or "_experts_implementation_internal" not in vars(config):
        yield
        return
    chosen = vars(config)["_experts_implementation_internal"]
    vars(config)["_experts_implementation_internal"] = "eager"
    try:
        yield
    finally:
        vars(config)["_experts_implementation_internal"] = chosen
