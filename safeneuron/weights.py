"""The weights of a network before and after training: copies, precisions, and how far they have moved."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from safeneuron.ffn import LINEAGE
from safeneuron.freezing import Freeze
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.quantising import dequantised, has_four_bits
from safeneuron.training import Training, is_sharded


def plain_copy(model: Model) -> PreTrainedModel:
    """A copy of the given network in float32, which may be changed and remembers whose neurons it has."""
    plain = dequantised(model.network)
    if plain is model.network:
        plain = copy.deepcopy(plain)
    store_in(torch.float32, plain.parameters())
    setattr(plain.config, LINEAGE, model.fingerprint)
    plain.train(False)
    return plain


def base_of_adapters(model: Model, training: Training) -> PreTrainedModel:
    """A copy of the given network for adapters: in 4 bits, if it is, or else in the precision that loses nothing.

    That is bfloat16 where training computes in it and the checkpoint was stored in it, with half the memory of float32.
    FSDP2 wants one precision for all.
    """
    base = copy.deepcopy(model.network)
    if not has_four_bits(base):
        lasting = lasting_dtype(base, model.stored_dtype)
        small = lasting == torch.bfloat16 and training.computes_in_bfloat16(model.device) and not is_sharded()
        store_in(torch.bfloat16 if small else torch.float32, base.parameters())
    setattr(base.config, LINEAGE, model.fingerprint)
    base.train(False)
    return base


def sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """The same model as another object whose weights are the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, dict(weights))


def gathered(trained: nn.Module, model: Model, frozen: NeuronSet | None) -> tuple[PreTrainedModel, Freeze | None]:
    """The trained weights, which are spread over the ranks, as a plain network on each, and the proof of its freeze.

    One parameter after the other is gathered; the proof compares with the values of the given ``model``.
    """
    whole = plain_copy(model)
    proof = Freeze(whole, frozen) if frozen is not None else None
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            now = trained.get_parameter(name)
            parameter.copy_(now.full_tensor() if isinstance(now, DTensor) else now)
    return whole, proof


def lasting_dtype(network: nn.Module, dtype: torch.dtype) -> torch.dtype:
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
    """Relative L2 change of what was trained; ``fixed`` holds the ids of the policy's parameters that were not.

    Frozen slices add nothing to the numerator, being identical.
    """
    change = size = 0.0
    for after, before in zip(policy.parameters(), reference.parameters(), strict=True):
        if id(after) in fixed:
            assert torch.equal(after.to(before.dtype), before), "a parameter that was not to be trained has changed"
            continue
        start = before.detach().double()
        change += float((after.detach().double() - start).square().sum())
        size += float(start.square().sum())
    if proof is not None:
        size -= sum(float(saved.double().square().sum()) for saved in proof.saved)
    return (change / size) ** 0.5 if size > 0 else 0.0
