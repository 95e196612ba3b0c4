"""Penalised logistic regression with far fewer rows than columns, solved to its minimum; accuracy on rows held out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
    """
    assert len(vectors) == len(signs), "one sign a row"
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
        said = ((vectors[test] - centre) / size) @ plane.weights + plane.intercept
        right += int(((said > 0) == (signs[test] > 0)).sum())
    return right / len(signs)


def _objective(margins: Tensor, dual: Tensor, signs: Tensor) -> float:
    """Minus n times the penalised loss: log likelihood minus half of dual' K dual, with margins = K dual."""
    return float(functional.logsigmoid(signs * margins).sum() - dual @ margins / 2)
