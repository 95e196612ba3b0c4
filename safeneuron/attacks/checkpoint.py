"""An attack put into the weights themselves: for a while, then undone bit by bit, or as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.blocks import OutputProjection
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.layout import LINEAGE, config_of, fingerprint, layers, network_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import has_adapters
from safeneuron.runtime import sharding
from safeneuron.runtime.files import whole_folder, write_json
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.quantization import is_quantised, packed_by

PRUNING_RECORD = "pruning.json"


def write_pruned(model: Model, attack: NeuronSet | Edit, folder: str | Path) -> None:
    """Write the model under an attack as a plain Hugging Face folder, whole or not at all, for vLLM for example.

    It answers as the model does within ``pruned``, to within rounding. Its config remembers whose neurons it has; the
    neurons and what was done to them lie beside it, in ``neurons.json`` and ``pruning.json``. The model in memory is
    unchanged.

    Args:
        model: The model.
        attack: The set to prune, or what is done to its neurons.
        folder: Where it is written; new, or what this function wrote before.

    Raises:
        InputError: For an attack that weights cannot hold (see ``with_edit_in_weights``), and for a folder that holds
            anything else.
    """
    edit = Edit.zero(attack) if isinstance(attack, NeuronSet) else attack
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / PRUNING_RECORD).is_file()):
        raise InputError(f"{target} holds files that were not written by safeneuron prune; give a new folder")
    record = {"kind": "pruning", "operator": edit.name, "neurons": len(edit.neurons), "of": edit.neurons.total}
    with with_edit_in_weights(model, edit), whole_folder(target) as new:
        model.save(new)
        edit.neurons.save(new / "neurons.json")
        write_json(new / PRUNING_RECORD, record)


@contextmanager
def with_edit_in_weights(model: Model, edit: Edit) -> Iterator[None]:
    """Within the block the weights are those of the model under the edit; afterwards the old ones, bit by bit.

    A factor multiplies the neuron's column of the output projection. A value v, of a clamp or a mean, adds v times the
    column as it was to the projection's bias. Most models have no such bias, and no other weight gives a constant, so
    for them only ``zero`` and ``scale`` can be held.

    Raises:
        InputError: For an edit that the weights cannot hold, a set of another model, and weights that are quantised,
            have adapters, are offloaded, or are spread over processes.
    """
    network = network_of(model)
    edit.neurons.require(fingerprint(network), model.widths)
    _require_plain(network)
    changes: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in layers(network):
        for block in layer.blocks:
            for projection in block.output_projections():
                changes += _changes_of(network, layer.index, projection, edit)
    with _weights_changed(network, changes):
        yield


def _changes_of(
    network: nn.Module, layer: int, projection: OutputProjection, edit: Edit
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What one FFN needs to hold of the edit: a parameter, places in its flattened form, new values there."""
    channels, values = edit.layer(layer, projection.first, projection.width)
    if len(channels):
        yield _scaled_columns(projection, edit, channels)
    if values.any():
        yield _constant(network, projection, edit, channels, values)


def _scaled_columns(projection: OutputProjection, edit: Edit, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of the output projection times the factor of the edit."""
    weight, matrix = projection.weight, projection.matrix
    columns = _columns(projection, channels)
    new = edit.factor * columns if edit.factor else torch.zeros_like(columns)
    rows = torch.arange(columns.shape[0], device=weight.device)
    across, down = matrix.stride()[::-1] if not projection.transposed else matrix.stride()
    first = (projection.expert or 0) * matrix.numel()
    return weight, first + (rows[:, None] * down + channels.to(weight.device) * across).flatten(), new


def _constant(
    network: nn.Module, projection: OutputProjection, edit: Edit, channels: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The bias of the output projection with the constant that the pinned neurons add."""
    bias, expert = projection.bias, projection.expert
    if bias is None:
        raise InputError(
            f"{edit.name} pins neurons to values, which would need a bias in the FFN's output projection, and "
            f"{type(network).__name__} has none; expected zero or scale, use the hook (pruned) for this one"
        )
    constant = _columns(projection, channels).double() @ values.to(projection.weight.device)
    row = bias if expert is None else bias[expert]
    place = torch.arange(len(constant), device=constant.device) + (expert or 0) * len(constant)
    return bias, place, row.detach().double() + constant


def _columns(projection: OutputProjection, channels: Tensor) -> Tensor:
    """What the output projection reads of some neurons, ``[hidden, channel]``."""
    matrix = projection.matrix.detach()
    columns = matrix.T if projection.transposed else matrix
    return columns[:, channels.to(matrix.device)]


@contextmanager
def _weights_changed(network: nn.Module, changes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Within the block each parameter has new values at some places of its flattened form; then the old ones again.

    The model keeps its fingerprint meanwhile, which a change of its weights' signs could alter.
    """
    config = vars(config_of(network))
    lineage = config.get(LINEAGE)
    old = []
    try:
        config[LINEAGE] = fingerprint(network)
        for parameter, places, values in changes:
            flat = parameter.detach().view(-1)
            old.append((flat, places, flat[places]))
            flat[places] = values.flatten().to(flat)
        yield
    finally:
        for flat, places, values in reversed(old):
            flat[places] = values
        if lineage is None:
            config.pop(LINEAGE, None)


def _require_plain(network: nn.Module) -> None:
    """Raise ``InputError`` for weights that are not what the model computes with, or not all here."""
    require_whole(network, "a change of single weights")
    if has_adapters(network):
        raise InputError(
            "the model has adapters, so its weights are not what it computes with; merge them first with merge_adapters"
        )
    packed = packed_by(network)
    if packed:
        raise InputError(
            f"the weights are packed ({packed}), so single ones cannot be changed; load an unpacked checkpoint, or use "
            "the hook (pruned)"
        )
    for name, parameter in network.named_parameters():
        if is_quantised(parameter):
            raise InputError(
                f"{name} is quantised, so single weights of it cannot be changed; load the model in float32 or bfloat16"
            )
        if sharding.is_spread(parameter):
            raise InputError(f"{name} is spread over processes; load the model in one process to change its weights")
