"""NeuroStrike's selector: per layer a logistic probe that tells harmful from benign prompts, and its weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from safeneuron.data.prompts import check_classes
from safeneuron.data.types import Prompt
from safeneuron.models.forward import MeasurementSettings, over_ranks, pooled_batches
from safeneuron.models.model import Model
from safeneuron.runtime.progress import Progress
from safeneuron.selection.ranking import Ranking
from safeneuron.selection.scores import shift_zscore

FREE = 1e4
"""How much less than a weight the intercept is penalised."""


class Plane(NamedTuple):
    """What tells the two classes apart: positive where ``vectors @ weights + intercept`` is."""

    weights: Tensor
    intercept: float


def logistic_plane(vectors: Tensor, signs: Tensor, penalty: float) -> Plane:
    """The penalised logistic regression of ``signs`` (1 or -1) on ``vectors`` ``[row, column]``, both float64.

        argmin mean log(1 + exp(-y (w x + b))) + penalty / 2 (|w|**2 + b**2 / FREE)

    The intercept is as good as free, lest columns that are always large do its work. There are far fewer rows than
    columns, so it is solved in the space of rows: with the kernel K = (X X' + ``FREE``) / (n penalty) the minimum is
    the mode of a Gaussian process, which Newton's method finds in a few steps without inverting K (Rasmussen and
    Williams 2006, algorithm 3.1).
    """
    scale = len(vectors) * penalty
    kernel = (vectors @ vectors.T + FREE) / scale
    margins, dual = torch.zeros_like(signs), torch.zeros_like(signs)
    best = _objective(margins, dual, signs)
    for _ in range(100):
        chance = torch.sigmoid(margins)
        slope = (signs + 1) / 2 - chance
        root = (chance * (1 - chance)).sqrt()
        system = torch.eye(len(signs), dtype=signs.dtype) + root[:, None] * kernel * root
        right = root.square() * margins + slope
        factor = torch.linalg.cholesky(system)
        inner = torch.cholesky_solve((root * (kernel @ right))[:, None], factor)[:, 0]
        step = right - root * inner - dual
        # The objective is concave, but a full step may overshoot it.
        for size in (0.5**halvings for halvings in range(30)):
            tried = dual + size * step
            value = _objective(kernel @ tried, tried, signs)
            if value >= best:
                break
        else:
            break
        gained, best = value - best, value
        dual, margins = tried, kernel @ tried
        if gained <= 1e-12 * (1 + abs(best)):
            break
    return Plane(vectors.T @ dual / scale, FREE * float(dual.sum()) / scale)


def logistic_weights(vectors: Tensor, signs: Tensor, penalty: float) -> Tensor:
    """The weights of ``logistic_plane`` alone, ``[column]``."""
    return logistic_plane(vectors, signs, penalty).weights


def held_out_accuracy(vectors: Tensor, signs: Tensor, penalty: float = 1e-2, folds: int = 5, seed: int = 0) -> float:
    """The share of rows told right by regressions that have not seen them: cross-validation in ``folds`` parts.

    Each class is dealt evenly over the folds. Columns are centred and brought to a mean square of 1 in all (one factor,
    that of the rows learnt from), so that one penalty fits streams of any size. 0.5 is chance for classes of one size.

    Args:
        vectors: ``[row, column]`` float64.
        signs: The class of each row, 1 or -1.
        penalty: Of the weights' squares; see ``logistic_plane``.
        folds: In how many parts the rows are dealt.
        seed: Of the deal.

    Returns:
        Between 0 and 1.
    """
    if len(vectors) != len(signs):
        raise ValueError(f"one sign a row is expected, found {len(vectors)} rows and {len(signs)} signs")
    draw = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(signs), dtype=torch.int64)
    for sign in (1, -1):
        rows = (signs == sign).nonzero().flatten()
        fold[rows[torch.randperm(len(rows), generator=draw)]] = torch.arange(len(rows)) % folds
    right = 0
    for number in range(folds):
        test = fold == number
        centre = vectors[~test].mean(dim=0)
        learnt = vectors[~test] - centre
        size = learnt.square().sum(dim=1).mean().sqrt().clamp(min=1e-30)
        plane = logistic_plane(learnt / size, signs[~test], penalty)
        margins = ((vectors[test] - centre) / size) @ plane.weights + plane.intercept
        right += int(((margins > 0) == (signs[test] > 0)).sum())
    return right / len(signs)


def _objective(margins: Tensor, dual: Tensor, signs: Tensor) -> float:
    """Minus n times the penalised loss: log likelihood minus half of dual' K dual, with margins = K dual."""
    return float(functional.logsigmoid(signs * margins).sum() - dual @ margins / 2)


THRESHOLD = 3.0
"""The z-score that a probe's weight must exceed, in the source: ``probe(...).above(THRESHOLD)``."""


def probe(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    settings: MeasurementSettings = MeasurementSettings(),
    *,
    penalty: float = 1e-3,
    most: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ranking:
    """How far the weight of each neuron in its layer's probe stands out: z-scores of positive weights, at most 0 else.

        weights = argmin mean log(1 + exp(-y (w a + b))) + penalty / 2 |w|**2,   y = 1 harmful, -1 benign

    NeuroStrike (2509.11864; github.com/wu-lichao/NeuroStrike-Neuron-Level-Attacks-on-Aligned-LLMs) selects where
    z > 3 and w > 0 (``THRESHOLD``). It stops Adam after 5,000 epochs on that loss, with the intercept penalised too;
    here it is solved to its minimum. It probes the outputs of the gate and up projections at their maximum over the
    prompt; here a neuron is a(x), as everywhere. A logistic fit must see every prompt many times, so one pooled vector
    a prompt is kept, 4 bytes a neuron: memory is bounded by ``most`` however many prompts there are.

    Args:
        model: The model, in evaluation mode.
        unsafe: Harmful prompts, at least 2.
        safe: Harmless prompts, at least 2.
        settings: The pooling, and how many tokens a batch and a prompt may have.
        penalty: Of the weights' squares, in the formula.
        most: So many prompts of each class, at most.
        seed: Of the draw among more prompts than that.
        progress: Called after each batch.

    Returns:
        The ranking of all neurons, labelled ``probe``.

    Raises:
        InputError: For a class with fewer than 2 prompts, or activations that are not finite.
    """
    check_classes(list(unsafe), list(safe))
    draw = random.Random(seed)
    chosen = [list(prompts) if len(prompts) <= most else draw.sample(list(prompts), most) for prompts in (unsafe, safe)]
    prompts = [*chosen[0], *chosen[1]]
    vectors = torch.zeros(len(prompts), sum(model.widths))
    for batch, pooled_vectors in pooled_batches(model, prompts, settings, progress):
        # An expert to which nothing was routed says nothing.
        vectors[batch] = pooled_vectors.nan_to_num(0.0)
    vectors = over_ranks(vectors)
    signs = torch.cat([torch.ones(len(chosen[0])), -torch.ones(len(chosen[1]))]).double()
    layers = torch.split_with_sizes(vectors, model.widths, dim=1)
    weights = torch.cat([logistic_weights(layer.double(), signs, penalty) for layer in layers])
    scores = shift_zscore(weights, model.widths)
    return Ranking(torch.where(weights > 0, scores, scores.clamp(max=0)), model.widths, model.fingerprint, "probe")
