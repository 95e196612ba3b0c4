"""Activation statistics of a model on unsafe and safe prompts, in one streaming pass whose memory does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from safeneuron.data.prompts import check_classes
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import length_batches, pooled
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, Moments
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import Halving
from safeneuron.runtime.progress import Progress

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
    _require_known(pooling)
    check_classes(list(unsafe), list(safe))
    total = len(unsafe) + len(safe)
    halving, moments = _halving(), []
    for prompts, before in ((unsafe, 0), (safe, len(unsafe))):
        own = Moments.zero((sum(model.widths),))
        told = None if progress is None else _after(progress, before, total)
        for _, vectors in _vectors(model, prompts, pooling, batch_tokens, max_tokens, halving, told):
            own = own.merge(Moments.of(vectors))
        moments.append(_of_all_ranks(own))
    return ActivationStats(moments[0], moments[1], model.widths, model.fingerprint, pooling)


def measure_groups(
    model: Model,
    prompts: Sequence[Prompt],
    weights: Tensor,
    pooling: str = "last",
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> GroupMoments:
    """Moments of every neuron over each of many groups of prompts, from one pass; see ``groups`` for ``weights``.

    As ``measure`` does it, for ``weights`` ``[prompt, group]``. What is kept is 16 bytes a neuron and group. Raises
    ``InputError`` for activations that are not finite, and for weights that are not one row a prompt.
    """
    _require_known(pooling)
    if len(weights) != len(prompts):
        raise InputError(f"groups need one row of weights a prompt: found {len(weights)} for {len(prompts)} prompts")
    own = GroupMoments.zero(weights.shape[1], sum(model.widths))
    for batch, vectors in _vectors(model, prompts, pooling, batch_tokens, max_tokens, _halving(), progress):
        _require_heard(vectors)
        own = own.merge(GroupMoments.of(vectors, weights[batch]))
    return _groups_of_all_ranks(own)


def activations_of(
    model: Model,
    prompts: Sequence[Prompt],
    neurons: NeuronSet,
    pooling: str = "last",
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> Tensor:
    """The pooled activations of some neurons, ``[prompt, neuron]`` float32, in the order of the prompts and of the set.

    Every rank does all of it. Raises ``InputError`` for a neuron set of another model, an unknown pooling, or
    activations that are not finite.
    """
    _require_known(pooling)
    neurons.require(model.fingerprint, model.widths)
    found = torch.zeros(len(prompts), len(neurons))
    encoded = [model.ask(prompt, max_tokens) for prompt in prompts]
    done = 0
    for batch in length_batches(encoded, batch_tokens):
        vectors = pooled(model, [encoded[index] for index in batch], pooling)[:, neurons.flat]
        problem = _not_finite(vectors, [prompts[index] for index in batch])
        if problem:
            raise InputError(problem)
        _require_heard(vectors)
        found[batch] = vectors
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    return found


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


def _vectors(
    model: Model,
    prompts: Sequence[Prompt],
    pooling: str,
    batch_tokens: int,
    max_tokens: int,
    halving: Halving[list[int]],
    progress: Progress | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's batches: the numbers of their prompts, and their pooled vectors ``[prompt, neuron]``."""
    encoded = [model.ask(prompt, max_tokens) for prompt in prompts]
    done, problem = 0, ""
    for number, batch in enumerate(length_batches(encoded, batch_tokens)):
        if number % distributed.world() == distributed.rank():
            rows = [encoded[index] for index in batch]
            vectors = torch.cat(halving.over(rows, lambda part: pooled(model, part, pooling)))
            problem = _not_finite(vectors, [prompts[index] for index in batch])
            if problem:
                break
            yield batch, vectors
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    distributed.agree(problem)


def _halving() -> Halving[list[int]]:
    """What runs a batch, in halves where it does not fit into memory."""
    advice = "use a smaller max_tokens, or a device with more memory"
    return Halving("measuring", advice, lambda rows: len(rows) * max(map(len, rows)))


def _require_known(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown; expected one of {', '.join(POOLINGS)}")


def _require_heard(vectors: Tensor) -> None:
    """Raise ``InputError`` where neurons of an expert were not asked about a prompt."""
    if vectors.isnan().any():
        raise InputError(
            "some neurons are not run on every prompt, as those of experts or of layers that look at images; the "
            "analysis of groups of prompts expects a dense model"
        )


def _after(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one list of prompts as progress of all, of which so many came before."""
    return lambda done, own: progress(before + done, total)


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
    totals = distributed.gather((own.count, own.counts is not None))
    merged = Moments.zero(tuple(own.mean.shape))
    parts = torch.stack([own.mean, own.m2, own.per_neuron.double()])
    for (count, routed), (mean, m2, counts) in zip(totals, distributed.each_tensor(parts), strict=True):
        merged = merged.merge(Moments(count, mean, m2, counts.long() if routed else None))
    return merged


def _groups_of_all_ranks(own: GroupMoments) -> GroupMoments:
    """The same for groups."""
    counts = distributed.gather(own.counts.tolist())
    merged = GroupMoments.zero(*own.mean.shape)
    for count, (mean, m2) in zip(counts, distributed.each_tensor(torch.stack([own.mean, own.m2])), strict=True):
        merged = merged.merge(GroupMoments(torch.tensor(count, dtype=torch.float64), mean, m2))
    return merged
