"""From activation statistics to safety neurons: effect size, activation shift, significance, thresholds (Eq. 4-10).

All vectors are ``[neuron]`` over all layers laid end to end, float64; ``widths`` cuts them back into layers. The scores
of every neuron are kept, so that thresholds can change without running the model again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.special import stdtr
from scipy.stats import false_discovery_control
from torch import Tensor

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, Moments, load_tensors, save_tensors

DEFAULT_DENSITY = 0.01
FEWEST = 8
"""An expert to which fewer prompts of a class were routed is not scored: its means would say nothing."""
_VECTORS = ("d", "shift", "z", "t", "q")


def pooled_deviation(unsafe: Moments, safe: Moments) -> Tensor:
    """Pooled standard deviation of each neuron over both classes (Eq. 6).

    s = sqrt(((n_u - 1) var_u + (n_s - 1) var_s) / (n_u + n_s - 2))
    """
    if unsafe.counts is None and safe.counts is None:
        return ((unsafe.m2 + safe.m2) / (unsafe.count + safe.count - 2)).sqrt()
    return ((unsafe.m2 + safe.m2) / (unsafe.per_neuron + safe.per_neuron - 2).clamp(min=1)).sqrt()


def effect_size(unsafe: Moments, safe: Moments) -> Tensor:
    """Standardised gap of each neuron between unsafe and safe prompts: signed Cohen's d (Eq. 5).

        d = (mean_unsafe - mean_safe) / s,   s = pooled standard deviation (Eq. 6)

    A neuron that never varies gets 0, not infinity.

    Args:
        unsafe: Moments over the unsafe prompts.
        safe: Moments over the safe prompts.

    Returns:
        d ``[neuron]``, float64.
    """
    deviation = pooled_deviation(unsafe, safe)
    gap = unsafe.mean - safe.mean
    return torch.where(deviation > 0, gap / torch.where(deviation > 0, deviation, 1.0), 0.0)


def activation_shift(unsafe: Moments, safe: Moments) -> Tensor:
    """Difference of the mean activations (Eq. 9): D = mean_unsafe - mean_safe."""
    return unsafe.mean - safe.mean


def shift_zscore(shift: Tensor, widths: tuple[int, ...], scored: Tensor | None = None) -> Tensor:
    """How far each neuron's shift stands out among the neurons of its own layer (Eq. 10).

        z = (D - mean of D over the layer) / standard deviation of D over the layer

    A layer whose shifts are all equal gets 0. Neurons that are not ``scored``, boolean ``[neuron]``, are left out and
    get 0.
    """
    scores = torch.zeros_like(shift)
    counted = torch.ones_like(shift, dtype=torch.bool) if scored is None else scored
    parts = zip(
        torch.split_with_sizes(shift, widths),
        torch.split_with_sizes(counted, widths),
        torch.split_with_sizes(scores, widths),
        strict=True,
    )
    for layer, here, z in parts:
        shifts = layer[here]
        centred = shifts - shifts.mean()
        deviation = centred.square().mean().sqrt()
        if len(shifts) and deviation > 0:
            z[here] = centred / deviation
    return scores


def t_statistic(d: Tensor, unsafe_count: int | Tensor, safe_count: int | Tensor) -> Tensor:
    """Student's t of each effect size: t = d sqrt(n_u n_s / (n_u + n_s)); counts of all neurons, or of each.

    This, not d, has the null distribution that Theorem 3.1 assumes.
    """
    if isinstance(unsafe_count, int) and isinstance(safe_count, int):
        return d * math.sqrt(unsafe_count * safe_count / (unsafe_count + safe_count))
    both = torch.as_tensor(unsafe_count + safe_count).double()
    return d * (unsafe_count * safe_count / both.clamp(min=1)).sqrt()


def q_values(t: Tensor, degrees: int | Tensor) -> Tensor:
    """One-sided p-values of ``t`` under Student's t, corrected for the false-discovery rate (Benjamini-Hochberg)."""
    p = stdtr(degrees if isinstance(degrees, int) else degrees.numpy(), -t.numpy())
    return torch.from_numpy(false_discovery_control(p, method="bh"))


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """How many neurons are chosen: by both thresholds, or by a density; with neither, by a density of 1 %.

    Args:
        effect_size: A neuron with a larger effect size d is in ES (Eq. 7; the paper: 3 for Qwen, 2 for Llama).
        shift: A neuron with a larger z-score of its shift is in SAS (Eq. 10; the paper: 2).
        density: The share of all neurons that ES | SAS shall hold.

    Raises:
        InputError: If only one threshold is given, or thresholds and a density.
    """

    effect_size: float | None = None
    shift: float | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        thresholds = (self.effect_size is not None, self.shift is not None)
        if any(thresholds) and (not all(thresholds) or self.density is not None):
            raise InputError("give both thresholds effect_size and shift, or a density alone, not a mixture of the two")


class Thresholds(NamedTuple):
    """What a neuron must exceed: d for ES (Eq. 7), z for SAS (Eq. 10)."""

    effect_size: float
    shift: float


class Selection(NamedTuple):
    """The sets of one model state: by effect size, by activation shift, and their union (SN = ES | SAS)."""

    es: NeuronSet
    sas: NeuronSet
    union: NeuronSet
    thresholds: Thresholds


@dataclass(frozen=True)
class Criteria:
    """What neurons are chosen by: effect size ``d``, shift ``D``, and its layer-wise ``z``.

    ``scored``, boolean ``[neuron]``, says whose experts saw too few prompts to be scored: those have zeros and
    can never be chosen. ``None`` where all neurons are scored.
    """

    d: Tensor
    shift: Tensor
    z: Tensor
    widths: tuple[int, ...]
    fingerprint: str
    scored: Tensor | None = None


@dataclass(frozen=True)
class Scores(Criteria):
    """All scores of all neurons: the criteria, and beside them ``t`` and its q-value, which cost as much again."""

    t: Tensor = field(kw_only=True)
    q: Tensor = field(kw_only=True)

    @property
    def unscored(self) -> int:
        """Number of neurons that could not be scored."""
        return 0 if self.scored is None else int((~self.scored).sum())

    @property
    def significant(self) -> int:
        """Number of neurons more active on unsafe prompts at a false-discovery rate of 5 %."""
        return int((self.q < 0.05).sum())

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {name: vars(self)[name] for name in _VECTORS}
        if self.scored is not None:
            tensors["scored"] = self.scored
        save_tensors(path, tensors, {"kind": "scores", "widths": list(self.widths), "fingerprint": self.fingerprint})

    @staticmethod
    def load(path: Path) -> Scores:
        """Read scores written by ``save``; ``InputError`` for a missing or foreign file."""
        tensors, header = load_tensors(path, "scores", _VECTORS)
        d, shift, z, t, q = (tensors[name] for name in _VECTORS)
        return Scores(d, shift, z, tuple(header["widths"]), header["fingerprint"], tensors.get("scored"), t=t, q=q)


def criteria(stats: ActivationStats) -> Criteria:
    """What neurons are chosen by (Eq. 5, 6, 9, 10), from the statistics alone.

    In a mixture of experts a neuron is scored over the prompts that were routed to its expert, if they are ``FEWEST``
    or more in each class.

    Args:
        stats: Of both classes.

    Returns:
        Effect size, shift and its z-score of every neuron.
    """
    d, shift = effect_size(stats.unsafe, stats.safe), activation_shift(stats.unsafe, stats.safe)
    if stats.unsafe.counts is None and stats.safe.counts is None:
        return Criteria(d, shift, shift_zscore(shift, stats.widths), stats.widths, stats.fingerprint)
    scored = (stats.unsafe.per_neuron >= FEWEST) & (stats.safe.per_neuron >= FEWEST)
    d, shift = torch.where(scored, d, 0.0), torch.where(scored, shift, 0.0)
    return Criteria(d, shift, shift_zscore(shift, stats.widths, scored), stats.widths, stats.fingerprint, scored)


def score(stats: ActivationStats) -> Scores:
    """Every score of every neuron, from the statistics alone: its ``criteria``, and how significant its d is.

    Args:
        stats: Of both classes.

    Returns:
        The criteria with Student's t and its q-value.
    """
    chosen_by = criteria(stats)
    if chosen_by.scored is None:
        t = t_statistic(chosen_by.d, stats.unsafe.count, stats.safe.count)
        q = q_values(t, stats.unsafe.count + stats.safe.count - 2)
    else:
        unsafe_counts, safe_counts = stats.unsafe.per_neuron, stats.safe.per_neuron
        t = t_statistic(chosen_by.d, unsafe_counts, safe_counts)
        q = torch.ones_like(t)
        if bool(chosen_by.scored.any()):
            q[chosen_by.scored] = q_values(t[chosen_by.scored], (unsafe_counts + safe_counts - 2)[chosen_by.scored])
    return Scores(
        chosen_by.d, chosen_by.shift, chosen_by.z, chosen_by.widths, chosen_by.fingerprint, chosen_by.scored, t=t, q=q
    )


def thresholds_for(scores: Criteria, density: float) -> Thresholds:
    """The thresholds at which ES | SAS holds the share ``density`` of all neurons, ES and SAS having equal parts.

    Found by bisection over the common number of neurons that each criterion takes from the top of its ranking, at least
    one. Only neurons that are more active on unsafe prompts can be taken, so that the share may stay below ``density``.

    Args:
        scores: The criteria of all neurons.
        density: Between 0 and 1.

    Returns:
        What a neuron must exceed.

    Raises:
        InputError: For a density out of range.
    """
    if not 0 < density < 1:
        raise InputError(f"density must lie between 0 and 1, found {density}; 0.01 selects one neuron in a hundred")
    total = len(scores.d)
    target = max(1, round(density * total))
    # More than the target can never be taken from the top of a ranking.
    most = min(target + 1, total)
    d_order = scores.d.topk(most).values
    z_order = torch.where(scores.shift > 0, scores.z, -torch.inf).topk(most).values

    def at(count: int) -> Thresholds:
        # A threshold is exceeded strictly, so the value just after the last neuron taken is the threshold.
        return Thresholds(max(float(d_order[count]), 0.0), max(float(z_order[count]), 0.0))

    low, high = min(1, total - 1), min(target, total - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if int(_masks(scores, at(middle))[2].sum()) <= target:
            low = middle
        else:
            high = middle - 1
    return at(low)


def choose(scores: Criteria, thresholds: Thresholds) -> Selection:
    """ES: d > tau_ES (Eq. 7). SAS: z > tau_SAS and D > 0 (Eq. 10). SN: their union.

    Args:
        scores: The criteria of all neurons.
        thresholds: tau_ES and tau_SAS.

    Returns:
        The three sets, labelled ``ES``, ``SAS`` and ``FULL``.
    """
    es, sas, union = _masks(scores, thresholds)

    def named(mask: Tensor, label: str) -> NeuronSet:
        return NeuronSet.of_mask(mask, scores.widths, scores.fingerprint, label)

    return Selection(named(es, "ES"), named(sas, "SAS"), named(union, "FULL"), thresholds)


def select(
    stats: ActivationStats,
    settings: SelectionSettings | None = None,
    *,
    effect_size: float | None = None,
    shift: float | None = None,
    density: float | None = None,
) -> NeuronSet:
    """The safety neurons SN = ES | SAS of a model.

    Args:
        stats: Its statistics on both classes of prompts.
        settings: Thresholds, or a density. The keywords below say the same without this object.
        effect_size: See ``SelectionSettings``.
        shift: See ``SelectionSettings``.
        density: See ``SelectionSettings``.

    Returns:
        The union of both criteria's sets, labelled ``FULL``.

    Raises:
        InputError: As ``SelectionSettings`` does, and where settings are given in both ways.
    """
    by_keyword = SelectionSettings(effect_size=effect_size, shift=shift, density=density)
    if settings is not None and by_keyword != SelectionSettings():
        raise InputError("give the settings of a selection as one object or as keywords, not both")
    scores = criteria(stats)
    return choose(scores, resolve_thresholds(scores, settings or by_keyword)).union


def resolve_thresholds(scores: Criteria, settings: SelectionSettings) -> Thresholds:
    """The thresholds that settings ask for.

    Args:
        scores: The criteria of all neurons.
        settings: Thresholds, which are returned, or a density, for which they are found.

    Returns:
        What a neuron must exceed.
    """
    if settings.effect_size is not None and settings.shift is not None:
        return Thresholds(settings.effect_size, settings.shift)
    return thresholds_for(scores, DEFAULT_DENSITY if settings.density is None else settings.density)


def _masks(scores: Criteria, thresholds: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
    es = scores.d > thresholds.effect_size
    sas = (scores.z > thresholds.shift) & (scores.shift > 0)
    return es, sas, es | sas
