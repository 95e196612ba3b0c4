"""NeuroStrike's selector: per layer a logistic probe that tells harmful from benign prompts, and its weights."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from safeneuron import ranks
from safeneuron.data import Prompt, check_classes
from safeneuron.errors import InputError
from safeneuron.halving import Halving
from safeneuron.logistic import logistic_weights
from safeneuron.models import Model
from safeneuron.rankings import Ranking
from safeneuron.selecting import shift_zscore
from safeneuron.streaming import Progress, length_batches, over_ranks, pooled, prompts_alone

THRESHOLD = 3.0
"""The z-score that a probe's weight must exceed, in the source: ``probe(...).above(THRESHOLD)``."""


def probe(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    pooling: str = "last",
    penalty: float = 1e-3,
    most: int = 512,
    seed: int = 0,
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> Ranking:
    """How far the weight of each neuron in its layer's probe stands out: z-scores of positive weights, at most 0 else.

        weights = argmin mean log(1 + exp(-y (w a + b))) + penalty / 2 |w|**2,   y = 1 harmful, -1 benign

    NeuroStrike (2509.11864; github.com/wu-lichao/NeuroStrike-Neuron-Level-Attacks-on-Aligned-LLMs) selects where
    z > 3 and w > 0 (``THRESHOLD``). It stops Adam after 5,000 epochs on that loss, with the intercept penalised too;
    here it is solved to its minimum. It probes the outputs of the gate and up projections at their maximum over the
    prompt; here a neuron is a(x), as everywhere.

    A logistic fit must see every prompt many times, so one pooled vector a prompt is kept, 4 bytes a neuron, of at most
    ``most`` prompts of each class, drawn by ``seed``: memory is bounded however many prompts there are. Raises
    ``InputError`` for a class with fewer than 2 prompts, or activations that are not finite.
    """
    check_classes(list(unsafe), list(safe))
    draw = random.Random(seed)
    chosen = [list(prompts) if len(prompts) <= most else draw.sample(list(prompts), most) for prompts in (unsafe, safe)]
    vectors = _vectors(model, [*chosen[0], *chosen[1]], pooling, batch_tokens, max_tokens, progress)
    signs = torch.cat([torch.ones(len(chosen[0])), -torch.ones(len(chosen[1]))]).double()
    layers = torch.split_with_sizes(vectors, model.widths, dim=1)
    weights = torch.cat([logistic_weights(layer.double(), signs, penalty) for layer in layers])
    scores = shift_zscore(weights, model.widths)
    return Ranking(torch.where(weights > 0, scores, scores.clamp(max=0)), model.widths, model.fingerprint, "probe")


def _vectors(
    model: Model, prompts: Sequence[Prompt], pooling: str, batch_tokens: int, max_tokens: int, progress: Progress | None
) -> Tensor:
    """One pooled vector a prompt, ``[prompt, neuron]`` float32 in the order of the prompts, on every rank."""
    encoded = [one.ids for one in prompts_alone(model, prompts, max_tokens)]
    halving: Halving[list[int]] = Halving("probing", "use a smaller max_tokens, or a device with more memory")
    found, done = torch.zeros(len(prompts), sum(model.widths)), 0
    for number, batch in enumerate(length_batches(encoded, batch_tokens)):
        if number % ranks.world() == ranks.rank():
            parts = halving.over([encoded[index] for index in batch], lambda part: pooled(model, part, pooling))
            # An expert that was not asked says nothing.
            found[batch] = torch.cat(parts).nan_to_num(0.0, torch.inf, -torch.inf)
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    found = over_ranks(found)
    bad = (~torch.isfinite(found)).any(dim=1).nonzero()
    if len(bad):
        raise InputError(
            f"the model's activations are not finite on the prompt {prompts[int(bad[0])].text[:60]!r}; load it with "
            "dtype = 'float32', or use another checkpoint"
        )
    return found
