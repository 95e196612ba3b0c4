"""LoRA adapters of PEFT beside frozen neurons: which slices of an adapter a neuron owns, and exact merging.

An adapter adds scaling * B A to a matrix, and perhaps a bias to its bias. A neuron of the FFN is a row of the gate and
up matrices, so row ``j`` of their B and of their bias; and a column of the down matrix, so column ``j`` of its A. While
these are zero the neuron is what it is in the base model, whatever the rest of the adapter has learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of, layers_of
from safeneuron.neurons.blocks import Slice
from safeneuron.neurons.layout import LINEAGE, HasNetwork, feed_forwards, fingerprint, names_in, network_of
from safeneuron.neurons.linears import acting, linear_in, size_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import has_adapters
from safeneuron.runtime import sharding
from safeneuron.runtime.quantization import dequantised, packed_by
from safeneuron.training.settings import TrainingSettings

# The layers of PEFT whose change is scaling * B A, and the starts of an adapter that leave the base weights alone.
PLAIN_LAYERS = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.gptq.GPTQLoraLinear",
    "peft.tuners.lora.awq.AwqLoraLinear",
)
PLAIN_STARTS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class Adapter:
    """One adapter on one matrix: it adds ``scaling * up @ down`` to the matrix and ``scaling * bias`` to its bias.

    ``down`` is ``[rank, input]`` and ``up`` ``[output, rank]``; ``matrix`` names the module in the bare network.
    """

    matrix: str
    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    scaling: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of its parameters."""
        return [self.down, self.up, *([] if self.bias is None else [self.bias])]


def adapter_slices(model: nn.Module | HasNetwork, neurons: NeuronSet) -> list[Slice]:
    """The slices that the neurons own in the adapters that are trained, set to zero here; none without adapters.

    Zero makes no change of the frozen neurons. The model computes what it computed before: a slice that does change a
    neuron, from an earlier training, is an ``InputError``, as is a kind of adapter that changes whole matrices at once
    (DoRA, PiSSA, OLoRA, LoftQ, IA3, AdaLoRA and others). Where anything is refused, nothing has been touched.
    """
    network = network_of(model)
    if not has_adapters(network):
        return []
    names = names_in(network)
    slices = []
    for block in feed_forwards(network):
        channels = block.own(neurons.layer(block.layer))
        if not len(channels):
            continue
        for module, rows in block.rows_of(channels):
            for adapter in _trained(network, module):
                slices.append(_owned(names, adapter.up, 0, rows, adapter.down))
                if adapter.bias is not None:
                    slices.append(_owned(names, adapter.bias, 0, rows, None))
        for adapter in _trained(network, block.output):
            slices.append(_owned(names, adapter.down, 1, channels, adapter.up))
    for piece in slices:
        for part in sharding.local_parts(piece.name, piece.parameter, piece.dim, piece.index):
            part.restore(torch.zeros_like(part.values()))
    return slices


def lora_config(model: nn.Module | HasNetwork, training: TrainingSettings) -> Any:
    """The settings as a ``peft.LoraConfig``, for the linear layers of the model's FFNs, of its attention, or of both.

    Args:
        model: The model that gets the adapters.
        training: Says their rank, scale, dropout and targets.

    Raises:
        InputError: Without PEFT, or if no linear layer of the model is a target.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(
            "LoRA needs the package peft, which is not installed; pip install 'safeneuron[lora]'"
        ) from error
    network = network_of(model)
    blocks = feed_forwards(network)
    ours = {linear_in(module) for block in blocks for module in (block.output, *(rows.module for rows in block.inputs))}
    layers = layers_of(decoder_of(network))
    linears = {module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)}
    chosen = [
        name
        for name, module in network.named_modules()
        if module in linears and ("ffn" if module in ours else "attention") in training.lora_targets
    ]
    if not chosen:
        raise InputError(
            f"no linear layer of the model is one of lora_targets = {training.lora_targets!r}: the experts of a "
            "mixture share parameters that take no adapters; expected 'attention' or 'ffn+attention', or lora_rank = 0"
        )
    return LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=chosen,
        task_type="CAUSAL_LM",
    )


def adapters_of(model: nn.Module | HasNetwork) -> list[Adapter]:
    """Every active adapter of the model.

    Raises ``InputError`` for adapters whose change is not scaling * B A on linear layers.
    """
    network = network_of(model)
    adapters = []
    for name, module in network.named_modules():
        if module._modules.get("base_layer") is not None:
            layer: Any = module
            adapters += [
                adapter for key, adapter in _plain_adapters(network, name, layer) if key in layer.active_adapters
            ]
    return adapters


def merge_adapters(model: nn.Module) -> nn.Module:
    """The plain network of a ``peft.PeftModel``, with its active adapters merged into the weights in float32.

    Unlike PEFT's own ``merge_and_unload`` it leaves every weight whose change is zero as it is, bit for bit, also where
    the base model is in 4 bits: what is returned then is a new network on the CPU, with the weights that the quantised
    one computes with. The given model is used up, and the new one keeps its neurons' names.

    Args:
        model: The ``peft.PeftModel``.

    Returns:
        The network without adapters.

    Raises:
        InputError: For a model without adapters, and for adapters that are not plain LoRA on linear layers.
    """
    network: Any = network_of(model)
    if network is model:
        raise InputError(f"there are no adapters to merge in {type(model).__name__}; expected a peft.PeftModel")
    require_unpacked(network, "adapters cannot be merged into them; keep them beside the model")
    known_as, adapters = fingerprint(network), adapters_of(network)
    wrapper: Any = model
    wrapper.unload()
    plain = dequantised(network)
    add_adapters(adapters, plain)
    setattr(plain.config, LINEAGE, known_as)
    return plain.requires_grad_(True)


def require_unpacked(network: nn.Module, advice: str) -> None:
    """Raise ``InputError`` for weights that a library other than bitsandbytes has packed."""
    packed = packed_by(network)
    if packed:
        raise InputError(f"the weights are packed ({packed}), so that they cannot be read or written exactly: {advice}")


def add_adapters(adapters: list[Adapter], network: nn.Module) -> None:
    """Add the adapters' changes to the weights of a network that carries none, computed in float32.

    A weight whose change is zero keeps its bits, also where it is -0. Raises ``InputError`` for an adapter with a bias
    on a matrix without one.
    """
    for adapter in adapters:
        # Where layers were wrapped for activation checkpointing, the names that were found in them say so.
        linear = linear_in(network.get_submodule(adapter.matrix.replace("_checkpoint_wrapped_module.", "")))
        if adapter.bias is not None and linear.bias is None:
            raise InputError(
                f"the adapter has a bias for {adapter.matrix}, which has none that it could be added to; expected an "
                "adapter without lora_bias, keep this one apart or train another"
            )
        with torch.no_grad():
            up, down = (_whole(part).to(linear.weight.device, torch.float32) for part in (adapter.up, adapter.down))
            _add(linear.weight, up @ down * adapter.scaling)
            if adapter.bias is not None:
                _add(linear.bias, _whole(adapter.bias).to(linear.bias.device, torch.float32) * adapter.scaling)


def _whole(parameter: nn.Parameter) -> Tensor:
    """The parameter, also where processes share it."""
    return sharding.first_rows("an adapter", parameter, sharding.shape_of(parameter)[0])


def _add(weight: Tensor, change: Tensor) -> None:
    weight.copy_(torch.where(change == 0, weight, weight.float() + change))


def _owned(
    names: dict[int, str], parameter: nn.Parameter, dim: int, channels: Tensor, counterpart: nn.Parameter | None
) -> Slice:
    """The slice, after a look whether it is without effect: zero itself, or multiplied with nothing but zeros."""
    piece = Slice(names[id(parameter)], parameter, dim, channels.to(parameter.device))
    # What is spread over processes is put together again, so that all of them come to the same answer.
    acts = sharding.gather_whole(piece.name, parameter, dim, piece.index).any()
    if acts and counterpart is not None:
        acts = _whole(counterpart).any()
    if acts:
        raise InputError(
            f"{piece.name} already changes neurons that are to be frozen, so that they are not the base model's; "
            "expected a new adapter, or one that was trained with the same neurons frozen: merge this one into the "
            "model and train another"
        )
    return piece


def _trained(network: nn.Module, place: nn.Module) -> Iterator[Adapter]:
    """The adapters on a matrix of the FFN that training can change."""
    layer = acting(place)
    base = {id(parameter) for parameter in linear_in(place).parameters()}
    if not any(parameter.requires_grad for parameter in layer.parameters() if id(parameter) not in base):
        return
    name = next(name for name, module in network.named_modules() if module is layer)
    for _, adapter in _plain_adapters(network, name, layer):
        if any(parameter.requires_grad for parameter in adapter.parameters):
            yield adapter


def _plain_adapters(network: nn.Module, name: str, layer: Any) -> Iterator[tuple[str, Adapter]]:
    """The adapters on one layer by their names; ``InputError`` if they are more than a product added to a matrix."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if kind not in PLAIN_LAYERS or size_of(layer.base_layer) is None:
        raise _not_plain(name, kind)
    for key in layer.lora_A:
        start = vars(network)["peft_config"][key].init_lora_weights
        if key in layer.lora_variant:
            raise _not_plain(name, type(layer.lora_variant[key]).__name__)
        if start not in PLAIN_STARTS:
            raise _not_plain(name, f"a start as in {start!r}")
        down, up = layer.lora_A[key], layer.lora_B[key]
        yield key, Adapter(name, down.weight, up.weight, up.bias, layer.scaling[key])


def _not_plain(name: str, found: str) -> InputError:
    return InputError(
        f"the adapter on {name} is not plain LoRA, so that frozen neurons could not be kept in it: found {found}, "
        "expected peft.LoraConfig with its usual start and without use_dora or other variants; it may be put on the "
        "attention alone"
    )
