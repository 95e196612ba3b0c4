"""Activation statistics of a model on unsafe and safe prompts, in one streaming pass whose memory does not grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safeneuron import ranks
from safeneuron.data import Prompt, check_classes
from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.halving import Halving
from safeneuron.models import Model
from safeneuron.moments import Moments
from safeneuron.neurons import NeuronSet
from safeneuron.statistics import ActivationStats
from safeneuron.streaming import Progress, length_batches, pooled

POOLINGS = ("last", "mean", "max")


def measure(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    pooling: str = "last",
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> ActivationStats:
    """Moments of every neuron over both classes of prompts (the means and variances of Eq. 4-6).

    Each prompt goes through the chat template with the generation prompt and gives one activation vector a layer:
    that of its ``last`` token, or the ``mean`` or ``max`` over its tokens; padding never counts. Prompts of like length
    share a batch of at most ``batch_tokens`` tokens, padding included; a prompt is cut to its last ``max_tokens``, but
    one with an image never is, and shares no batch with prompts without one. An expert counts the prompts that were
    routed to it alone (see ``streaming.pooled``). The LM head is never run. ``progress(done, total)`` is called after
    each batch. Several ranks take the same batches in turn, and all get the statistics over all of them; so all must
    call it. A batch that does not fit into memory is run in halves, with a ``MemoryShortage`` warning, and so are all
    later ones with as many tokens.

    Raises ``InputError`` for a class with fewer than 2 prompts, an unknown pooling, or activations that are not finite.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown; expected one of {', '.join(POOLINGS)}")
    check_classes(list(unsafe), list(safe))
    total, done = len(unsafe) + len(safe), 0
    advice = "use a smaller max_tokens, or a device with more memory"
    halving: Halving[list[int]] = Halving("measuring", advice, lambda rows: len(rows) * max(map(len, rows)))
    moments = []
    for prompts in (unsafe, safe):
        own, problem = Moments.zero((sum(model.widths),)), ""
        encoded = [model.ask(prompt, max_tokens) for prompt in prompts]
        for number, batch in enumerate(length_batches(encoded, batch_tokens)):
            if number % ranks.world() == ranks.rank():
                rows = [encoded[index] for index in batch]
                vectors = torch.cat(halving.over(rows, lambda part: pooled(model, part, pooling)))
                problem = _not_finite(vectors, [prompts[index] for index in batch])
                if problem:
                    break
                own = own.merge(Moments.of(vectors))
            done += len(batch)
            if progress is not None:
                progress(done, total)
        ranks.agree(problem)
        moments.append(_of_all_ranks(own))
    return ActivationStats(moments[0], moments[1], model.widths, model.fingerprint, pooling)


def search(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    find: Callable[[ActivationStats], NeuronSet],
    rounds: int,
    first: NeuronSet | None = None,
    pooling: str = "last",
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> list[NeuronSet]:
    """What an attacker prunes who finds neurons, prunes them, and finds again on what is left, ``rounds`` times.

    ``find`` turns statistics into a set, for example with ``selecting.select``; ``first`` is what the first search has
    found, if that is known. Each set of the result holds the one before it, so that the first is the adaptive attack
    and the last the iterated one. A neuron at zero has no activation shift, so no neuron is found twice.
    """
    found: list[NeuronSet] = [] if first is None else [first]
    for number in range(len(found), rounds):
        told = None if progress is None else _part(progress, number, rounds)
        with pruned(model, found[-1] if found else None):
            stats = measure(model, unsafe, safe, pooling, batch_tokens, max_tokens, told)
        new = find(stats)
        found.append(found[-1] | new if found else new)
    return found


def _part(progress: Progress, number: int, parts: int) -> Progress:
    """Progress of one part as progress of the whole, of which it is the part with this number."""
    return lambda done, total: progress(number * total + done, parts * total)


def _not_finite(vectors: Tensor, prompts: Sequence[Prompt]) -> str:
    """What is wrong with the activation vectors of these prompts, if anything."""
    bad = vectors.isinf().any(dim=1).nonzero()
    if not len(bad):
        return ""
    return (
        f"the model's activations are not finite on the prompt {prompts[int(bad[0])].text[:60]!r}; "
        "load it with dtype = 'float32', or use another checkpoint"
    )


def _of_all_ranks(own: Moments) -> Moments:
    """The moments over what all ranks have seen, merged in the order of the ranks: the same on each of them."""
    totals = ranks.gather((own.count, own.counts is not None))
    merged = Moments.zero(tuple(own.mean.shape))
    parts = torch.stack([own.mean, own.m2, own.per_neuron.double()])
    for (count, routed), (mean, m2, counts) in zip(totals, ranks.each_tensor(parts), strict=True):
        merged = merged.merge(Moments(count, mean, m2, counts.long() if routed else None))
    return merged
