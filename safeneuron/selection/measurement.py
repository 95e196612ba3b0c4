"""Activation statistics of a model on unsafe and safe prompts, in one streaming pass whose memory does not grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safeneuron.data.prompts import check_classes
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import MeasurementSettings, pooled_batches, prompts_in_halves
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, Moments
from safeneuron.runtime import distributed
from safeneuron.runtime.progress import Progress, progress_of_part, progress_of_section


def measure(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    settings: MeasurementSettings = MeasurementSettings(),
    *,
    progress: Progress | None = None,
) -> ActivationStats:
    """Moments of every neuron over both classes of prompts (the means and variances of Eq. 4-6).

    Each prompt goes through the chat template with the generation prompt and gives one activation vector a layer:
    that of its ``last`` token, or the ``mean`` or ``max`` over its tokens; padding never counts. Prompts of like length
    share a batch, but prompts with an image share none with prompts without one. An expert counts the prompts that were
    routed to it alone (see ``forward.pooled``). The LM head is never run. Several ranks take the same batches in turn,
    and all get the statistics over all of them; so all must call it. A batch that does not fit into memory is run in
    halves, with a ``MemoryShortage`` warning, and so are all later ones with as many tokens.

    Args:
        model: The model, in evaluation mode.
        unsafe: Harmful prompts, at least 2.
        safe: Harmless prompts, at least 2.
        settings: The pooling, and how many tokens a batch and a prompt may have.
        progress: Called after each batch with the number of prompts done, of both classes.

    Returns:
        Moments ``[neuron]`` of each class, float64.

    Raises:
        InputError: For a class with fewer than 2 prompts, or activations that are not finite.
    """
    check_classes(list(unsafe), list(safe))
    total = len(unsafe) + len(safe)
    halving, moments = prompts_in_halves(), []
    for prompts, before in ((unsafe, 0), (safe, len(unsafe))):
        merged = Moments.zero((sum(model.widths),))
        of_class = progress_of_section(progress, before, total)
        for _, vectors in pooled_batches(model, prompts, settings, of_class, halving=halving):
            merged = merged.merge(Moments.of(vectors))
        moments.append(_of_all_ranks(merged))
    return ActivationStats(moments[0], moments[1], model.widths, model.fingerprint, settings.pooling)


def measure_groups(
    model: Model,
    prompts: Sequence[Prompt],
    weights: Tensor,
    settings: MeasurementSettings = MeasurementSettings(),
    *,
    progress: Progress | None = None,
) -> GroupMoments:
    """Moments of every neuron over each of many groups of prompts, from one pass as ``measure`` does it.

    What is kept is 16 bytes a neuron and group.

    Args:
        model: A dense model, in evaluation mode.
        prompts: The prompts of all groups.
        weights: ``[prompt, group]``: how often each prompt counts in each group (see ``neurons.statistics``).
        settings: The pooling, and how many tokens a batch and a prompt may have.
        progress: Called after each batch.

    Returns:
        Moments ``[group, neuron]``, float64.

    Raises:
        InputError: For activations that are not finite, neurons that are not run on every prompt, and weights that are
            not one row a prompt.
    """
    if len(weights) != len(prompts):
        raise InputError(f"groups need one row of weights a prompt: found {len(weights)} for {len(prompts)} prompts")
    merged = GroupMoments.zero(weights.shape[1], sum(model.widths))
    for batch, vectors in pooled_batches(model, prompts, settings, progress):
        _require_counted(vectors)
        merged = merged.merge(GroupMoments.of(vectors, weights[batch]))
    return _groups_of_all_ranks(merged)


def activations_of(
    model: Model,
    prompts: Sequence[Prompt],
    neurons: NeuronSet,
    settings: MeasurementSettings = MeasurementSettings(),
    *,
    progress: Progress | None = None,
) -> Tensor:
    """The pooled activations of some neurons on each prompt; every rank does all of it.

    Args:
        model: The model, in evaluation mode.
        prompts: The prompts.
        neurons: Whose activations.
        settings: The pooling, and how many tokens a batch and a prompt may have.
        progress: Called after each batch.

    Returns:
        ``[prompt, neuron]`` float32, in the order of the prompts and of the set.

    Raises:
        InputError: For a neuron set of another model, neurons that are not run on every prompt, or activations that are
            not finite.
    """
    neurons.require(model.fingerprint, model.widths)
    activations = torch.zeros(len(prompts), len(neurons))
    with distributed.alone():
        for batch, vectors in pooled_batches(model, prompts, settings, progress):
            chosen = vectors[:, neurons.flat]
            _require_counted(chosen)
            activations[batch] = chosen
    return activations


def search(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    find: Callable[[ActivationStats], NeuronSet],
    rounds: int,
    *,
    first: NeuronSet | None = None,
    settings: MeasurementSettings = MeasurementSettings(),
    progress: Progress | None = None,
) -> list[NeuronSet]:
    """What an attacker prunes who finds neurons, prunes them, and finds again on what is left, ``rounds`` times.

    The first set of the result is the adaptive attack, the last the iterated one. A neuron at zero has no activation
    shift, so no neuron is found twice.

    Args:
        model: The model, in evaluation mode.
        unsafe: Harmful prompts, at least 2.
        safe: Harmless prompts, at least 2.
        find: Turns statistics into a set, for example ``scores.select``.
        rounds: How many searches.
        first: What the first search finds, if that is known.
        settings: As in ``measure``.
        progress: Called after each batch with the number of prompts done, of all searches.

    Returns:
        ``rounds`` sets, each of which holds the one before it.

    Raises:
        InputError: As ``measure`` does.
    """
    sets: list[NeuronSet] = [] if first is None else [first]
    for number in range(len(sets), rounds):
        with pruned(model, sets[-1] if sets else None):
            stats = measure(model, unsafe, safe, settings, progress=progress_of_part(progress, number, rounds))
        new = find(stats)
        sets.append(sets[-1] | new if sets else new)
    return sets


def _require_counted(vectors: Tensor) -> None:
    """Raise ``InputError`` where neurons of an expert were not run on a prompt."""
    if vectors.isnan().any():
        raise InputError(
            "some neurons are not run on every prompt, as those of experts or of layers that look at images; the "
            "analysis of groups of prompts expects a dense model"
        )


def _of_all_ranks(moments: Moments) -> Moments:
    """The moments over what all ranks have seen, merged in the order of the ranks: the same on each of them."""
    totals = distributed.gather((moments.count, moments.counts is not None))
    merged = Moments.zero(tuple(moments.mean.shape))
    parts = torch.stack([moments.mean, moments.m2, moments.per_neuron.double()])
    for (count, routed), (mean, m2, counts) in zip(totals, distributed.each_tensor(parts), strict=True):
        merged = merged.merge(Moments(count, mean, m2, counts.long() if routed else None))
    return merged


def _groups_of_all_ranks(moments: GroupMoments) -> GroupMoments:
    """The same for groups."""
    counts = distributed.gather(moments.counts.tolist())
    merged = GroupMoments.zero(*moments.mean.shape)
    for count, (mean, m2) in zip(counts, distributed.each_tensor(torch.stack([moments.mean, moments.m2])), strict=True):
        merged = merged.merge(GroupMoments(torch.tensor(count, dtype=torch.float64), mean, m2))
    return merged
