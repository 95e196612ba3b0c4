"""Hidden states of two model states compared: alignment (CKA), means (cosine), and a direction's share, by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from safeneuron.data import Prompt
from safeneuron.directions import decoder_layers, last_of_stream
from safeneuron.errors import InputError
from safeneuron.ffn import network_of
from safeneuron.logistic import held_out_accuracy
from safeneuron.models import Model
from safeneuron.streaming import Progress, length_batches, prompts_alone


def hidden_states(
    model: Model,
    prompts: Sequence[Prompt],
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> Tensor:
    """``[prompt, layer, hidden]`` float32: the residual stream at each layer's input, at the last token of each prompt.

    One vector a prompt and layer is kept, so choose how many prompts. Raises ``InputError`` if they are not finite.
    """
    layers = decoder_layers(network_of(model))
    encoded = [one.ids for one in prompts_alone(model, prompts, max_tokens)]
    found: dict[int, Tensor] = {}
    for batch in length_batches(encoded, batch_tokens):
        states = last_of_stream(model, layers, [encoded[index] for index in batch]).float()
        found.update(zip(batch, states, strict=True))
        if progress is not None:
            progress(len(found), len(prompts))
    stacked = torch.stack([found[index] for index in range(len(prompts))])
    if not torch.isfinite(stacked).all():
        raise InputError("the model's residual stream is not finite on some prompts; load it with dtype = 'float32'")
    return stacked


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two representations ``[prompt, *]`` of the same prompts, at least 4.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X X', L = Y Y'

    (Kornblith et al. 2019) with the unbiased estimate of HSIC (Song et al. 2012), since with fewer prompts than
    dimensions the usual one is near 1 for anything. 1: the same but for rotation and scale; around 0: unrelated, and
    then it may be a little below. nan if one does not vary.
    """
    kernels = [_kernel(states) for states in (first, second)]
    cross, one, other = (_hsic(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    return cross / math.sqrt(one * other) if one > 0 and other > 0 else math.nan


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """The mean over prompts of the cosine of their two states ``[prompt, hidden]``."""
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1).mean())


def projections(unsafe: Tensor, safe: Tensor, directions: Tensor) -> list[float]:
    """How far the class means lie apart along a unit vector of each layer, in units of the spread along it.

        (mean unsafe - mean safe) . r / s,   s = pooled standard deviation of x . r

    ``unsafe`` and ``safe`` are ``[prompt, layer, hidden]``, ``directions`` is ``[layer, hidden]``: give those of an
    earlier state to see whether a training has kept its refusal direction. nan where nothing varies.
    """
    found = []
    for layer, direction in enumerate(directions.double()):
        one, other = (states[:, layer].double() @ direction for states in (unsafe, safe))
        spread = ((one.var() * (len(one) - 1) + other.var() * (len(other) - 1)) / (len(one) + len(other) - 2)).sqrt()
        found.append(float((one.mean() - other.mean()) / spread) if spread > 1e-9 else math.nan)
    return found


def mean_directions(unsafe: Tensor, safe: Tensor) -> Tensor:
    """The unit difference of the class means at each layer, ``[layer, hidden]`` float64; zeros where they are equal."""
    return torch.nn.functional.normalize(unsafe.double().mean(dim=0) - safe.double().mean(dim=0), dim=1)


def separability(unsafe: Tensor, safe: Tensor, seed: int = 0) -> list[float]:
    """For each layer the share of prompts that a linear probe puts in the right class without having seen them."""
    signs = torch.cat([torch.ones(len(unsafe)), -torch.ones(len(safe))]).double()
    both = torch.cat([unsafe, safe]).double()
    return [held_out_accuracy(both[:, layer], signs, seed=seed) for layer in range(both.shape[1])]


def _kernel(states: Tensor) -> Tensor:
    """X X' of the centred states, without its diagonal."""
    values = states.double() - states.double().mean(dim=0)
    return (values @ values.T).fill_diagonal_(0)


def _hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5)."""
    n = len(first)
    assert n >= 4, "the estimate needs four prompts"
    trace = (first * second).sum()
    outer = first.sum() * second.sum() / ((n - 1) * (n - 2))
    cross = first.sum(dim=0) @ second.sum(dim=0) * 2 / (n - 2)
    return float((trace + outer - cross) / (n * (n - 3)))
