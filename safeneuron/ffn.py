"""The seam: the only place that knows how to record neuron ``j`` of layer ``l``, how to prune it, and what it owns.

An FFN computes a(x), for a gated one (h W_up + b_up) * f(h W_gate + b_gate), and hands it to its output projection
(Eq. 1-3). One element of a(x) is one neuron: row ``j`` of the matrices that write it with their biases, column ``j`` of
the output projection. So whoever stands before the output projection sees, and can change, every neuron. Where the FFNs
lie is found in ``anatomy``; everything else speaks of (layer, neuron). In a mixture of experts the neurons of a layer
are those of expert 0, 1, ... laid end to end, then those of shared experts and dense FFNs (``places``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.anatomy import FeedForward as FeedForward
from safeneuron.anatomy import Rows as Rows
from safeneuron.anatomy import acting as acting
from safeneuron.anatomy import decoder_of as decoder_of
from safeneuron.anatomy import layers_of as layers_of
from safeneuron.anatomy import linear_in as linear_in
from safeneuron.edits import Change, Edit, by_row, everywhere
from safeneuron.errors import InputError
from safeneuron.naming import LINEAGE as LINEAGE
from safeneuron.naming import HasNetwork as HasNetwork
from safeneuron.naming import Place as Place
from safeneuron.naming import config_of as config_of
from safeneuron.naming import feed_forwards as feed_forwards
from safeneuron.naming import fingerprint as fingerprint
from safeneuron.naming import layers as layers
from safeneuron.naming import names_in as names_in
from safeneuron.naming import network_of as network_of
from safeneuron.naming import neurons_at as neurons_at
from safeneuron.naming import places as places
from safeneuron.naming import require_dense as require_dense
from safeneuron.naming import stacks as stacks
from safeneuron.naming import widths_of as widths_of
from safeneuron.neurons import NeuronSet
from safeneuron.owning import Slice as Slice
from safeneuron.owning import has_adapters as has_adapters
from safeneuron.owning import owned_slices as owned_slices
from safeneuron.owning import parameters_of_no_neuron as parameters_of_no_neuron
from safeneuron.owning import require_trainable as require_trainable
from safeneuron.owning import routers as routers
from safeneuron.watching import Flow, watched


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
