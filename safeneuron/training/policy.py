"""The network that is trained: copied from the given one, in a precision that loses nothing, and put together again."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from safeneuron.models.model import Model
from safeneuron.neurons.layout import LINEAGE
from safeneuron.runtime.quantization import dequantised, has_four_bits
from safeneuron.training.freezing import Freeze
from safeneuron.training.settings import TrainingSettings, is_sharded


def plain_copy(model: Model) -> PreTrainedModel:
    """A copy of the given network in float32, which may be changed and remembers whose neurons it has."""
    plain = dequantised(model.network)
    if plain is model.network:
        plain = copy.deepcopy(plain)
    store_in(torch.float32, plain.parameters())
    setattr(plain.config, LINEAGE, model.fingerprint)
    plain.train(False)
    return plain


def base_of_adapters(model: Model, training: TrainingSettings) -> PreTrainedModel:
    """A copy of the given network for adapters: in 4 bits, if it is, or else in the precision that loses nothing.

    That is bfloat16 where training computes in it and the checkpoint was stored in it, with half the memory of float32.
    FSDP2 wants one precision for all.
    """
    base = copy.deepcopy(model.network)
    if not has_four_bits(base):
        lasting = checkpoint_dtype(base, model.stored_dtype)
        small = lasting == torch.bfloat16 and training.computes_in_bfloat16(model.device) and not is_sharded()
        store_in(torch.bfloat16 if small else torch.float32, base.parameters())
    setattr(base.config, LINEAGE, model.fingerprint)
    base.train(False)
    return base


def sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """The same model as another object whose weights are the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, dict(weights))


def gathered(trained: nn.Module, whole: PreTrainedModel) -> PreTrainedModel:
    """``whole`` with the trained weights, which are spread over the ranks; one parameter after the other is gathered.

    Args:
        trained: The network that was trained, its parameters sharded.
        whole: A plain network of the same form on each rank; it is changed.
    """
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            now = trained.get_parameter(name)
            parameter.copy_(now.full_tensor() if isinstance(now, DTensor) else now)
    return whole


def checkpoint_dtype(network: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The precision of the given checkpoint, in which the frozen slices are the given ones, bit for bit.

    float32, in which the policy was trained, if the given weights have been changed in memory to values that the
    checkpoint's precision cannot hold.
    """
    exact = all(torch.equal(given.to(dtype).to(given.dtype), given) for given in network.parameters())
    return dtype if exact else torch.float32


def store_in(dtype: torch.dtype, parameters: Iterable[nn.Parameter]) -> None:
    """Keep the parameters in this precision from now on."""
    # Parameters only: the rotary frequencies, which are buffers, are float32 in a model of any precision.
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


@contextmanager
def untrained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradient is computed for these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def free_change(policy: nn.Module, reference: nn.Module, proof: Freeze | None, fixed: Collection[int]) -> float:
    """Relative L2 change of what was trained: ``|after - before| / |before|`` without the frozen slices.

    Args:
        policy: The network after training.
        reference: The network before it, with the same parameters in the same order.
        proof: Holds the frozen slices, which add nothing to the numerator, being identical; ``None`` without any.
        fixed: The ids of the policy's parameters that were not trained.

    Raises:
        RuntimeError: If a parameter that was not to be trained has changed by a single bit.
    """
    change = size = 0.0
    for (name, after), before in zip(policy.named_parameters(), reference.parameters(), strict=True):
        if id(after) in fixed:
            if not torch.equal(after.to(before.dtype), before):
                raise RuntimeError(f"the parameter {name}, which was not to be trained, has changed")
            continue
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return (change / size) ** 0.5 if size > 0 else 0.0
