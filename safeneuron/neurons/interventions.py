"""The seam: the only place that knows how to record neuron ``j`` of layer ``l``, how to prune it, and what it owns.

An FFN computes a(x), for a gated one (h W_up + b_up) * f(h W_gate + b_gate), and hands it to its output projection
(Eq. 1-3). One element of a(x) is one neuron: row ``j`` of the matrices that write it with their biases, column ``j`` of
the output projection. So whoever stands before the output projection sees, and can change, every neuron. Where the FFNs
lie is found in ``anatomy``; everything else speaks of (layer, neuron). In a mixture of experts the neurons of a layer
are those of expert 0, 1, ... laid end to end, then those of shared experts and dense FFNs (``neuron_addresses``).

Shapes: activations are ``[row, token, neuron]``; values of an edit are ``[chosen neuron]``, in the order of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.hooks import TokenStream, observed
from safeneuron.neurons.layout import HasNetwork, fingerprint, layers, network_of, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats

Change = Callable[[Tensor], Tensor]
"""What is made of a layer's activations ``[row, token, neuron]``."""
_NOTHING = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Edit:
    """Some neurons, and what becomes of their activations at every token: a' = factor * a + value.

    ``values`` is ``[chosen neuron]`` in the order of ``neurons.flat``, or ``None`` for nothing to add. With a factor of
    0 the activation is not read at all, so that it may even be infinite. Make one with ``zero``, ``mean``,
    ``clamp``, ``opposite`` or ``scale``.
    """

    neurons: NeuronSet
    factor: float = 0.0
    values: Tensor | None = None
    name: str = "zero"

    @staticmethod
    def zero(neurons: NeuronSet) -> Edit:
        """The neurons are pruned: a' = 0, the paper's attack."""
        return Edit(neurons)

    @staticmethod
    def scale(neurons: NeuronSet, factor: float) -> Edit:
        """The neurons are weaker or stronger: a' = factor * a. A factor of 1 changes nothing, 0 is ``zero``."""
        return Edit(neurons, factor, name=f"scale {factor:g}" if factor else "zero")

    @staticmethod
    def clamp(neurons: NeuronSet, values: Tensor | float, name: str = "clamp") -> Edit:
        """The neurons are constant: a' = value, one for all or one for each.

        Args:
            neurons: Those that are pinned.
            values: One number, or ``[chosen neuron]``.
            name: What reports call the edit.

        Raises:
            InputError: For another number of values, or for values that are not finite.
        """
        each = torch.as_tensor(values, dtype=torch.float64)
        if each.dim() and each.shape != (len(neurons),):
            raise InputError(
                f"a clamp needs one value, or one for each of the {len(neurons)} neurons in order, found a tensor of "
                f"shape {tuple(each.shape)}"
            )
        if not torch.isfinite(each).all():
            raise InputError("a clamp needs finite values, found some that are not; look at where they come from")
        return Edit(neurons, 0.0, each.expand(len(neurons)).clone(), name)

    @staticmethod
    def mean(neurons: NeuronSet, stats: ActivationStats) -> Edit:
        """The neurons have their activation on benign prompts: a' = their mean over ``stats.safe``.

        Raises:
            InputError: For statistics of another model.
        """
        return Edit.clamp(neurons, stats.safe.mean[_checked(neurons, stats).flat], "mean")

    @staticmethod
    def opposite(neurons: NeuronSet, stats: ActivationStats, strength: float = 1.0) -> Edit:
        """The neurons have the opposite of their activation on harmful prompts: a' = -strength * mean over them.

        The sign-flipped anchor of "A Single Neuron Is Sufficient" (2605.08513), which beats zero with one neuron.

        Raises:
            InputError: For statistics of another model.
        """
        anchor = stats.unsafe.mean[_checked(neurons, stats).flat]
        return Edit.clamp(neurons, -strength * anchor, f"opposite x{strength:g}")

    def layer(self, layer: int, first: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The chosen channels of a layer, ``[channel]``, and the value to add to each, ``[channel]`` float64.

        Of one FFN of the layer they are those of its ``width`` channels from ``first`` on, counted from there.
        """
        channels = self.neurons.layer(layer)
        start = int((self.neurons.flat < sum(self.neurons.widths[:layer])).sum())
        values = torch.zeros(len(channels)).double() if self.values is None else self.values[start:][: len(channels)]
        if width is None:
            return channels, values
        here = (channels >= first) & (channels < first + width)
        return channels[here] - first, values[here]


def _checked(neurons: NeuronSet, stats: ActivationStats) -> NeuronSet:
    return neurons.require(stats.fingerprint, stats.widths)


def everywhere(edit: Edit, layer: int, first: int = 0, width: int | None = None) -> Change | None:
    """What the edit makes of a layer's activations in all rows.

    Args:
        edit: The neurons, and what becomes of them.
        layer: The number of the layer.
        first: The first channel of one FFN of the layer, of whose activations alone it is then.
        width: How many channels that has; ``None`` for the whole layer.

    Returns:
        A function of ``[row, token, neuron]``; ``None`` where the edit changes nothing.
    """
    channels, values = edit.layer(layer, first, width)
    if not len(channels):
        return None
    if edit.values is None and edit.factor == 0:
        return lambda activations: activations.index_fill(-1, channels.to(activations.device), 0)

    def change(activations: Tensor) -> Tensor:
        index = channels.to(activations.device)
        new = values.to(activations).expand(*activations.shape[:-1], -1)
        if edit.factor:
            new = edit.factor * activations.index_select(-1, index) + new
        return activations.index_copy(-1, index, new)

    return change


def by_row(
    edits: Sequence[Edit | None], rows: Sequence[int], layer: int, first: int = 0, width: int | None = None
) -> Change | None:
    """What several edits make of a layer's activations, row ``r`` being under ``edits[rows[r]]``.

    ``first`` and ``width`` are as for ``everywhere``.
    """
    parts = [edit.layer(layer, first, width) if edit is not None else _NOTHING for edit in edits]
    sizes = torch.tensor([len(parts[number][0]) for number in rows])
    if not int(sizes.sum()):
        return None
    factor_of = [edit.factor if edit is not None else 1.0 for edit in edits]
    at_rows = torch.arange(len(rows)).repeat_interleave(sizes)
    factors = torch.tensor([factor_of[number] for number in rows]).repeat_interleave(sizes)
    channels = torch.cat([parts[number][0] for number in rows])
    values = torch.cat([parts[number][1] for number in rows])
    pinned = factors == 0

    def change(activations: Tensor) -> Tensor:
        device = activations.device
        # One index for all rows at once: (row, all tokens, channel), each chosen channel of each row.
        place = (at_rows.to(device), slice(None), channels.to(device))
        new = values.to(activations)[:, None]
        # Where the factor is 0 an infinite activation must not become NaN.
        if not bool(pinned.all()):
            moved = factors.to(activations)[:, None] * activations[place] + new
            new = torch.where(pinned.to(device)[:, None], new, moved)
        changed = activations.clone()
        changed[place] = new
        return changed

    return change


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

    Activations are ``[batch, token, neuron]`` in the model's precision, before the output projection. Neurons of an
    expert that a token was not routed to have no activation there: NaN. Layers without an FFN are left out.

    Args:
        model: The model, bare or wrapped.
        reduce: Applied at once to each layer's activations, so that a pooled vector is all that stays in memory.

    Raises:
        InputError: For a compiled model, and for an anatomy that is not known.
    """
    require_eager(model)
    network, sheets = network_of(model), _Sheets()
    every = {layer.index: layer for layer in layers(network)}
    recording = Recording(routed=frozenset(index for index, layer in every.items() if not layer.is_plain))

    def keep(layer: int, activations: Tensor) -> None:
        recording.layer = layer
        recording.layers[layer] = activations if reduce is None else reduce(activations)

    def tap(flow: TokenStream) -> None:
        if every[flow.layer].is_plain:
            keep(flow.layer, flow.whole().detach())
        else:
            sheets.write(flow, every[flow.layer].width)

    with ExitStack() as stack:
        stack.enter_context(observed(decoder_of(network), list(every.values()), tap))
        # Experts come one after another; only when the layer ends are its activations complete.
        for layer in every.values():
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

    def write(self, flow: TokenStream, width: int) -> None:
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

    def tap(flow: TokenStream) -> Tensor | None:
        change = at(flow.layer, flow.first, flow.activations.shape[-1])
        return None if change is None else flow.narrowed(change(flow.whole()))

    with observed(decoder_of(network), [layer for layer in layers(network) if layer.index in chosen], tap):
        yield


@contextmanager
def pruned(
    model: nn.Module | HasNetwork, neurons: NeuronSet | Edit | None, rows: Tensor | None = None
) -> Iterator[None]:
    """Within the block the neurons' activations are zero: the pruning attack.

    The same as zeroing their columns of W_down, but the weights are not touched.

    Args:
        model: The model, bare or wrapped.
        neurons: Those to prune; an ``Edit`` does something else to its neurons, ``None`` prunes nothing.
        rows: Boolean ``[row]``, limits it to some rows of each batch.

    Raises:
        InputError: For a neuron set of another model, or a compiled model.
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

    Args:
        model: The model, bare or wrapped.
        edits: The attacks; ``None`` is none.
        rows: Which of them each row is under; every batch must have as many rows.

    Raises:
        InputError: For a neuron set of another model, or a compiled model.
    """
    chosen = _required(model, edits)
    with _rewritten(model, chosen, lambda layer, first, width: by_row(edits, rows, layer, first, width)):
        yield


def _required(model: nn.Module | HasNetwork, edits: Sequence[Edit | None]) -> dict[int, bool]:
    """The layers that the edits change, if all of them are of this model; else ``InputError``."""
    network = network_of(model)
    known_as, widths = fingerprint(network), widths_of(network)
    sets = [edit.neurons.require(known_as, widths) for edit in edits if edit is not None]
    return {layer: True for neurons in sets for layer in neurons.layers()}


def require_eager(model: nn.Module | HasNetwork) -> None:
    """Refuse a compiled model: its graph, once made, does not know hooks that are added later.

    Raises:
        InputError: For a model that ``torch.compile`` has wrapped, whole or in part.
    """
    network = model if isinstance(model, nn.Module) else model.network
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in network.modules()):
        raise InputError(
            "a compiled model computes on without asking hooks, so its neurons can be neither recorded nor pruned; "
            "expected the model as it was before torch.compile, use and call that one"
        )
