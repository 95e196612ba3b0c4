"""Neurons that differ between conditions: two states of a model, twin prompts, harmful and benign by gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import Batch, Exchange, common_ending, run_backward, run_decoder, total_over_batches
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import recorded, require_eager
from safeneuron.neurons.layout import feed_forwards, require_dense
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.runtime.progress import Progress, progress_of_section
from safeneuron.selection.ranking import Ranking


def activation_contrast(
    model: Model,
    other: Model,
    exchanges: Sequence[Exchange],
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Ranking:
    """How far each neuron is from where it is in another state of the model, while both read the same answers.

        score = sqrt(mean over answer tokens of (a_model - a_other)**2)

    Generation-time activation contrasting of Chen et al. (2406.14144; github.com/THU-KEG/SafetyNeuron), who compare an
    aligned model with an unaligned one and prune the top of the ranking. The two run the same batches in turn, so that
    only sums are kept.

    Args:
        model: Whose neurons are ranked.
        other: Another state of it.
        exchanges: Prompts with the answers that both read.
        batch_tokens: Tokens in one forward pass, padding included.
        progress: Called after each batch.

    Returns:
        The ranking, labelled ``contrast``.

    Raises:
        InputError: For models of different shapes, or activations that are not finite.
    """
    if model.widths != other.widths:
        raise InputError(
            f"the two models have {sum(model.widths):,} and {sum(other.widths):,} neurons in {len(model.widths)} and "
            f"{len(other.widths)} layers; expected two states of one model"
        )

    def work(part: Sequence[Exchange]) -> Tensor:
        batch = Batch.of(model, part)
        with recorded(model, lambda activations: activations[batch.answer]) as first:
            run_decoder(model, batch)
        batch_of_other = Batch.of(other, part)
        sums = {}
        with recorded(other, lambda activations: activations[batch_of_other.answer]) as second:
            run_decoder(other, batch_of_other)
        for layer, activations in first.layers.items():
            gap = activations.double().cpu() - second.layers[layer].double().cpu()
            # A token counts for an expert where both states have routed it there.
            sums[layer] = gap.square().nansum(dim=0) if layer in first.routed else gap.square().sum(dim=0)
        return torch.cat([sums[layer] for layer in sorted(sums)])

    tokens = sum(len(exchange.ids) - exchange.prompt for exchange in exchanges)
    squares = total_over_batches(exchanges, work, batch_tokens, progress)
    return Ranking((squares / tokens).sqrt(), model.widths, model.fingerprint, "contrast")


def twins(unsafe: Sequence[Prompt], safe: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that have a twin, a harmful and a harmless one with the same id.

    Args:
        unsafe: Harmful prompts.
        safe: Harmless prompts.

    Returns:
        The harmful and the harmless prompts that have one, both in the order of the harmful ones.

    Raises:
        InputError: If there are none.
    """
    by_id = {prompt.id: prompt for prompt in safe if prompt.id}
    paired = [prompt for prompt in unsafe if prompt.id in by_id]
    if not paired:
        raise InputError("no unsafe prompt has a twin among the safe ones; expected prompts that share their id")
    return paired, [by_id[prompt.id] for prompt in paired]


def twin_difference(stats: ActivationStats) -> Ranking:
    """The mean difference between a harmful prompt and its harmless twin, in size: |mean_unsafe - mean_safe|.

    The ranking of TwinBreak (github.com/tkr-research/twinbreak), which prunes the top 1 % of each layer that is not in
    the top of the same score between two halves of the harmless prompts, in five rounds (``measurement.search``). Over
    twins (``twins``) the mean of the differences is the difference of the means, so ``measure`` is the pass.

    Args:
        stats: Measured on twins.

    Returns:
        The ranking, labelled ``twins``.
    """
    gap = (stats.unsafe.mean - stats.safe.mean).abs()
    return Ranking(gap, stats.widths, stats.fingerprint, "twins")


def gradient_gap(
    model: Model,
    refused: Sequence[Exchange],
    safe: Sequence[Exchange],
    batch_tokens: int = 1024,
    progress: Progress | None = None,
) -> Ranking:
    """How much of a refusal hangs on each neuron, to first order: gradient x activation gap.

        score = sum over t of E_refused[d log p(answer) / d a_t] * (E_refused[a_t] - E_safe[a_t])

    ``t`` runs over the tokens that the template puts after the request, where the model makes up its mind, and p is
    the geometric mean over the answer's tokens. ``refused`` are harmful prompts with refusals as answers, ``safe`` are
    harmless prompts, whose answers are not read. A positive score says that to move the neuron to its harmless mean
    makes the refusal less likely. The ranking of "A Single Neuron Is Sufficient to Bypass Safety Alignment"
    (2605.08513), which pins the first of it to a value of the opposite sign (``Edit.opposite``); no code was found, so
    the averages are taken as above. One pass forward and back over ``refused``, one forward over ``safe``.

    Args:
        model: A dense model.
        refused: Harmful prompts with refusals as answers.
        safe: Harmless prompts; their answers are not read.
        batch_tokens: Tokens in one pass, padding included.
        progress: Called after each batch, of both passes together.

    Returns:
        The ranking, labelled ``gradient``.

    Raises:
        InputError: For a mixture of experts, offloaded weights, or values that are not finite.
    """
    count = min(common_ending(model), *(exchange.prompt for exchange in (*refused, *safe)))

    whole = len(refused) + len(safe)
    harmful = total_over_batches(
        refused,
        lambda part: _ending(model, part, count, gradients=True),
        batch_tokens,
        progress_of_section(progress, 0, whole),
    )
    gradient, activation = harmful / len(refused)
    (harmless,) = total_over_batches(
        safe,
        lambda part: _ending(model, part, count, gradients=False),
        batch_tokens,
        progress_of_section(progress, len(refused), whole),
    ) / len(safe)
    scores = (gradient * (activation - harmless)).sum(dim=0)
    return Ranking(scores, model.widths, model.fingerprint, "gradient")


def _ending(model: Model, part: Sequence[Exchange], count: int, gradients: bool) -> Tensor:
    """Sums over the rows at the last ``count`` tokens of the prompts: ``[kind, token, neuron]`` float64.

    The kinds are the gradient of the answer's log-likelihood and the activation, or the activation alone.
    """
    require_eager(model)
    require_dense(model, "the gradient x activation gap")
    batch = Batch.of(model, part)
    rows = torch.arange(len(part), device=model.device)[:, None]
    places = batch.ends[:, None] + torch.arange(-count, 0, device=model.device)
    activations: dict[int, Tensor] = {}
    slopes: dict[int, Tensor] = {}

    def at_the_end(values: Tensor) -> Tensor:
        return values.detach()[rows.to(values.device), places.to(values.device)].double().sum(dim=0).cpu()

    def look(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations[layer] = at_the_end(inputs[0])
            if gradients:
                # The loss is the negative log-likelihood.
                inputs[0].register_hook(lambda slope: slopes.__setitem__(layer, -at_the_end(slope)))  # type: ignore[no-untyped-call]

        return forward

    with ExitStack() as stack:
        for block in feed_forwards(model):
            stack.callback(block.output.register_forward_pre_hook(look(block.layer)).remove)
        if gradients:
            run_backward(model, batch)
        else:
            run_decoder(model, batch)
    kinds = [slopes, activations] if gradients else [activations]
    return torch.stack([torch.cat([kind[layer] for layer in sorted(kind)], dim=1) for kind in kinds])
