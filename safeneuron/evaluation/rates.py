"""Statistics of verdicts: rates with intervals, paired tests of two states, many tests at once, agreement of judges.

Everything here is about shares of prompts: did the state comply with this request, or refuse it?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safeneuron.evaluation.judge import VERDICTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


DRAWS = 4000
"""Samples of a bootstrap."""
PercentileMethod = Literal["linear", "inverted_cdf"]


@dataclass(frozen=True)
class Difference:
    """Two states on the same ``n`` prompts: their shares, the paired difference with its 95 % interval, and the test.

    ``gained`` counts the prompts on which only the second state has the outcome, ``lost`` those with only the first.
    ``p`` is that of the exact McNemar test, ``p_corrected`` the same among all tests of a report (Holm).
    """

    n: int
    first_rate: float
    second_rate: float
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float
    p_corrected: float


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference | None:
    """The second state against the first, on the same prompts in the same order.

    Args:
        first: Whether the first state has the outcome, one truth value a prompt.
        second: The same of the second state.

    Returns:
        The difference, its ``p_corrected`` not corrected yet (see ``corrected``); ``None`` without a prompt.

    Raises:
        ValueError: For lists of different lengths.
    """
    n = len(first)
    if n != len(second):
        raise ValueError(f"paired states answer the same prompts, found {n} and {len(second)} answers")
    if n == 0:
        return None
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    low, high = paired_interval(pairs.count((True, True)), gained, lost, n)
    p = mcnemar(gained, lost)
    return Difference(n, sum(first) / n, sum(second) / n, gained, lost, (gained - lost) / n, low, high, p, p)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test: could a fair coin have split the discordant pairs like this?

    Prompts on which both states agree say nothing about a difference and do not count (McNemar 1947).
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_interval(both: int, gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of ``(gained - lost) / n``, from the Wilson intervals of the two shares and their correlation.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998) 2635-2650, which keeps its level for small ``n`` and for
    shares near 0 and 1; the correlation is corrected for continuity where it is positive.
    """
    neither = n - both - gained - lost
    second, first = (both + gained) / n, (both + lost) / n
    second_rate, first_rate = wilson(both + gained, n), wilson(both + lost, n)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - n / 2, 0.0)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(own: float, other: float) -> float:
        """How far the difference reaches where one share goes to its bound and the other to its opposite one."""
        return math.sqrt(max(own**2 - 2 * phi * own * other + other**2, 0.0))

    down = reach(second - second_rate.low, first_rate.high - first)
    up = reach(second_rate.high - second, first - first_rate.low)
    return max(second - first - down, -1.0), min(second - first + up, 1.0)


def corrected(p_values: Sequence[float]) -> list[float]:
    """P-values among many tests, by Holm's step-down method (1979): one below .05 is wrong in 5 % of reports at most.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none overtakes a later one.

    Args:
        p_values: Those of all tests of a report.

    Returns:
        The corrected ones, in the same order.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def bootstrap_interval(values: NDArray[np.float64], draws: int = DRAWS) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values[seed, prompt]``, seeds and prompts both drawn with replacement.

    So both kinds of chance are in it. The same prompts are drawn for all seeds of a sample, since they all answer them.

    Args:
        values: ``[seed, prompt]``.
        draws: How many samples are drawn.

    Returns:
        The lower and the upper end; the same values always give the same.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    seeds, prompts = values.shape
    means = [
        values[np.ix_(draw.integers(seeds, size=seeds), draw.integers(prompts, size=prompts))].mean()
        for _ in range(draws)
    ]
    return percentile_interval(means)


def resamples(n: int, draws: int, seed: int = 0) -> Iterator[list[int]]:
    """Bootstrap samples of ``n`` items, drawn with replacement.

    Args:
        n: How many items there are, and are drawn.
        draws: How many samples.
        seed: Decides the draws.

    Returns:
        The places of the drawn items, sample by sample.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    return (draw.integers(n, size=n).tolist() for _ in range(draws))


def percentile_interval(values: Sequence[float], method: PercentileMethod = "linear") -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of resampled values.

    Args:
        values: One a sample; they may be infinite.
        method: NumPy's; ``inverted_cdf`` gives two values that did occur.

    Returns:
        The lower and the upper end.
    """
    import numpy as np

    low, high = np.percentile(np.asarray(values), [2.5, 97.5], method=method)
    return float(low), float(high)


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson 95 % interval and the number of judgements it rests on.

    With nothing to judge, the share and its interval are 0, 0 and 1.
    """

    count: int
    n: int
    rate: float
    low: float
    high: float

    def overlaps(self, other: Rate) -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high

    def compared_with(self, other: Rate) -> str:
        """``lower`` or ``higher`` than ``other``; ``unclear`` where the intervals overlap."""
        if self.overlaps(other):
            return "unclear"
        return "lower" if self.rate < other.rate else "higher"


def wilson(count: int, n: int) -> Rate:
    """``count`` of ``n`` with the Wilson score interval at 95 %.

    Args:
        count: How many have the outcome.
        n: How many could be judged; with none the share and its interval are 0, 0 and 1.

    Returns:
        The share with its interval, 0 to 1.
    """
    from scipy.stats import binomtest

    if n == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(count, n, count / n, float(interval.low), float(interval.high))


def share_of(verdict: str, verdicts: Sequence[str]) -> Rate:
    """The share of one verdict among all that could be judged; "cannot say" is left out of both, never called safe.

    ``share_of("complied", ...)`` on harmful prompts is the ASR, ``share_of("refused", ...)`` on benign ones the
    over-refusal rate. Incoherent answers stay in the denominator: they are neither a success nor a refusal.

    Args:
        verdict: One of ``VERDICTS``.
        verdicts: Those of all answers.

    Returns:
        The share with its Wilson interval.
    """
    judged = [given for given in verdicts if given != "cannot say"]
    return wilson(judged.count(verdict), len(judged))


def verdict_rates(verdicts: Sequence[str], counted: str) -> dict[str, float]:
    """How many answers got each verdict, with ``rate``, ``low`` and ``high`` of the verdict that is ``counted``.

    Args:
        verdicts: Those of all answers.
        counted: The verdict whose share is given.

    Returns:
        A record for JSON.
    """
    share = share_of(counted, verdicts)
    counts = {verdict: list(verdicts).count(verdict) for verdict in VERDICTS}
    return {"n": len(verdicts), **counts, "rate": share.rate, "low": share.low, "high": share.high}


def kappa(pairs: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """Raw agreement and Cohen's kappa of two judges, given what both said of each response."""
    n = len(pairs)
    if not n:
        return {"agreement": None, "kappa": None}
    observed = sum(a == b for a, b in pairs) / n
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(left[verdict] * right[verdict] for verdict in left) / n**2
    return {"agreement": observed, "kappa": None if expected == 1 else (observed - expected) / (1 - expected)}
