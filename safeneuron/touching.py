"""A neuron's own weights as views, and a change of them that is taken back bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from safeneuron import shards
from safeneuron.anatomy import FeedForward, is_transposed, linear_in, weight_of
from safeneuron.quantising import is_quantised
from safeneuron.stacks import ExpertStack, Stacked


def in_the_open(block: FeedForward | ExpertStack) -> bool:
    """Whether the weights can be read and written here as what they are."""
    if isinstance(block, ExpertStack):
        weights: list[nn.Parameter | None] = [block.parameter(one) for one in (*block.inputs, block.output)]
    else:
        weights = [weight_of(module) for module in (block.output, *(rows.module for rows in block.inputs))]
    return not any(one is None or one.is_meta or is_quantised(one) or shards.is_spread(one) for one in weights)


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
