"""What a model's neurons are: where they lie, what each owns, what was proved of it, and what cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.loading import load
from safeneuron.models.shape import Shape
from safeneuron.neurons.blocks import Block, Layer
from safeneuron.neurons.layout import layers, names_in
from safeneuron.neurons.verification import Proof, prove
from safeneuron.neurons.weights import require_trainable, routers
from safeneuron.runtime.quantization import is_quantised, packed_by


class DiagnosisRow(NamedTuple):
    """One kind of FFN: the layers that have it, how many neurons, how it is made, and what neuron ``j`` owns."""

    layers: str
    ffn: str
    neurons: str
    form: str
    owns: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What ``examine`` found."""

    name: str
    kind: str
    fingerprint: str
    neurons: int
    rows: tuple[DiagnosisRow, ...]
    remarks: tuple[str, ...]


def examine(name: str, weights: bool = True, dtype: str = "stored", device: str = "cpu") -> Diagnosis:
    """The anatomy of a model, proved on its weights or only read off its config.

    Args:
        name: ``embedded``, a folder or a name on the Hub.
        weights: Whether the weights are loaded and the anatomy proved on them.
        dtype: See ``load``.
        device: See ``load``.

    Returns:
        What was found.

    Raises:
        InputError: For a model that safeneuron does not know.
    """
    if not weights:
        network = Shape.network(name)
        label = embedded.LABEL if name == embedded.NAME else name
        return diagnosis(label, network, Proof((), ()), "")
    model = load(name, dtype=dtype, device=device)
    result = diagnosis(model.name, model.network, prove(model), model.fingerprint)
    stored = (f"Stored {model.unpacked}; loaded dequantised.",) if model.unpacked else ()
    return replace(result, remarks=(*result.remarks, *stored))


def diagnosis(name: str, network: nn.Module, proof: Proof, known_as: str) -> Diagnosis:
    """The anatomy of a network in memory, with what has been proved of it."""
    found = layers(network)
    groups: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    names = names_in(network)
    described = {}
    for layer in found:
        rows = tuple(_described(layer, block, names) for block in layer.blocks)
        key = tuple((row.ffn, row.neurons, row.form, *row.owns) for row in rows)
        groups.setdefault(key, []).append(layer.index)
        described[layer.index] = rows
    listed: list[DiagnosisRow] = []
    for numbers in groups.values():
        where = _ranges(numbers)
        of_first = described[numbers[0]]
        listed += [DiagnosisRow(where, *row[1:]) for row in of_first] or [DiagnosisRow(where, "none", "0", "", ())]
    return Diagnosis(
        name=name,
        kind=type(network).__name__,
        fingerprint=known_as,
        neurons=sum(layer.width for layer in found),
        rows=tuple(listed),
        remarks=tuple(_remarks(network, found, proof)),
    )


def _described(layer: Layer, block: Block, names: dict[int, str]) -> DiagnosisRow:
    locations = block.input_locations()
    output = block.output_location()
    owns = [
        _place(
            _short(names, layer, location.parameter, location.name),
            "e" if block.is_mixture else "",
            location.dim,
            location.parameter.dim(),
            location.first,
            location.step,
        )
        for location in (*locations, *([] if output is None else [output]))
    ]
    neurons = f"{block.count} experts x {block.width:,}" if block.is_mixture else f"{block.width:,}"
    expert = f" (expert {block.expert})" if block.expert is not None else ""
    return DiagnosisRow("", (block.name or "in the layer") + expert, neurons, block.form, tuple(owns))


def _short(names: dict[int, str], layer: Layer, parameter: nn.Parameter, key: str) -> str:
    """The name of a parameter within its layer."""
    whole = names.get(id(parameter), key)
    return whole.partition(f".{layer.index}.")[2] or whole


def _place(name: str, expert: str, dim: int, dims: int, first: int, step: int) -> str:
    """One neuron's part of a parameter, as one would index it."""
    at = ("2j" if step == 2 else "j") + (f"+{first:,}".replace(",", "") if first else "")
    index = [expert] if expert else []
    index += [":"] * (dims - len(index))
    index[dim] = at
    while index[-1] == ":" and len(index) > 1:
        index.pop()
    return f"{name}[{', '.join(index)}]"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3 and 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _remarks(network: nn.Module, layers: list[Layer], proof: Proof) -> Iterator[str]:
    """What was proved, and what cannot be done."""
    meta = any(parameter.is_meta for parameter in network.parameters())
    if proof.probed:
        yield f"Proved on the weights of layer {_ranges(list(proof.probed))}, one of each kind: pruning and ownership."
    if proof.unproved or meta:
        what = ", ".join(proof.unproved) or "read off the config alone"
        yield f"Not proved: {what}."
    yield "Can be measured, selected, pruned and attacked through hooks."
    try:
        require_trainable(network)
        yield "Can be frozen bit for bit while the rest is trained."
    except InputError as error:
        yield f"Cannot be trained as it is: {error}."
    if packed_by(network):
        packed = packed_by(network)
        yield f"Its weights are packed ({packed}): a pruned checkpoint cannot be written, and align refuses it."
    elif any(is_quantised(parameter) for parameter in network.parameters()):
        yield "Its weights are quantised: a pruned checkpoint cannot be written, and align trains LoRA adapters only."
    if any(not layer.is_plain for layer in layers if layer.blocks):
        count = sum(parameter.numel() for parameter in routers(network))
        yield f"Routers have {count:,} parameters; align.freeze_routers says whether they are trained."
        yield (
            "An expert's statistics are over the prompts that were routed to it; the rival selectors SNIP, Wanda and "
            "gradient x gap, and LoRA on stacked experts, are not available."
        )
    silent = [layer.index for layer in layers if not layer.blocks]
    if silent:
        yield f"Layers without an FFN have no neurons: {_ranges(silent)}."
