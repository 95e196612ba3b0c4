"""How much a neuron set owes to the prompts it was found with, and to the way of measuring: the record of a model.

The numbers of resampled prompts are in ``resampling``; here is what is measured, and what is held against what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from torch import Tensor

from safeneuron.analysis.records import Number, PartRecord, TableRow, flat, rows_of
from safeneuron.analysis.resampling import (
    Needed,
    Resampled,
    Spread,
    halves,
    prompts_needed,
    resampled,
)
from safeneuron.analysis.settings import DENSITY_MULTIPLES, LEAST, Classes, Effort, finder
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.models.forward import POOLINGS
from safeneuron.models.model import Model
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, bootstrap_weights, pair_weights
from safeneuron.runs.inputs import measurement_of
from safeneuron.runtime.progress import Progress
from safeneuron.selection.measurement import measure, measure_groups
from safeneuron.selection.ranking import rank_correlation
from safeneuron.selection.scores import criteria, select

SIZES = (10, 20, 40, 80, 160, 320, 640)
"""Sizes of the disjoint samples: prompts of each class."""


@dataclass(frozen=True)
class BootstrapRecord:
    """Sets of resampled prompts against that of all: how alike they are, and how often each neuron is found.

    ``always`` counts the neurons in nearly all of the sets, ``ever`` those in any; ``frequencies`` counts these by the
    tenth in which the share of sets that hold them lies, the rarest first.
    """

    jaccard: Spread
    correlation: Spread
    always: int
    always_neurons: dict[str, list[int]]
    ever: int
    frequencies: list[int]


@dataclass(frozen=True)
class SampleRecord:
    """Jaccard of the sets of two samples of ``prompts`` prompts of each class, by chance too, and correlation of d."""

    prompts: int
    mean: Number
    low: Number
    high: Number
    values: int
    chance: Number
    correlation: Number


@dataclass(frozen=True)
class ThresholdRecord:
    """Jaccard of the sets of two samples at another density, and by chance."""

    density: float
    jaccard: Spread
    chance: Number


@dataclass(frozen=True)
class SetSimilarity:
    """Jaccard of two sets, and Spearman's correlation of the effect sizes behind them."""

    jaccard: Number
    correlation: Number


@dataclass(frozen=True)
class VariantRecord:
    """The set measured in another way against the run's own."""

    variant: str
    jaccard: Number
    correlation: Number


@dataclass(frozen=True)
class AlsoRecord:
    """The set of other prompts against the run's own; see ``also_record``.

    ``prompts`` counts those of both classes. ``wording`` and ``fewer`` are of the requests that both have, NaN where
    these are too few.
    """

    prompts_of: str
    prompts: list[int]
    jaccard: Number
    correlation: Number
    same_requests: int
    wording: SetSimilarity
    fewer: SetSimilarity


@dataclass(frozen=True)
class StabilityRecord(PartRecord):
    """The numbers of the part ``stability``, of one state; ``prompts`` counts those of both classes."""

    prompts: list[int]
    neurons: int
    bootstrap: BootstrapRecord
    samples: list[SampleRecord]
    needed: Needed
    thresholds: list[ThresholdRecord]
    variants: list[VariantRecord]
    also: list[AlsoRecord] = field(default_factory=list)
    state: str = ""

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a sample size, a way to measure, a density, and other prompts, if there are any."""
        tables = {
            "samples": rows_of(self.samples),
            "variants": rows_of(self.variants),
            "thresholds": [
                {"density": threshold.density, **asdict(threshold.jaccard), "chance": threshold.chance}
                for threshold in self.thresholds
            ],
        }
        if self.also:
            tables["also"] = [flat(row) for row in rows_of(self.also)]
        return tables


def stability_record(
    config: Config,
    model: Model,
    *,
    state: str,
    classes: Classes,
    variants: Sequence[tuple[str, Model]],
    effort: Effort,
    also: Sequence[tuple[str, Classes]] = (),
    progress: Progress | None = None,
) -> StabilityRecord:
    """Bootstrap, disjoint samples of growing size, poolings, thresholds, and other forms of the model.

    Args:
        config: The run's config, for how activations are measured and neurons selected.
        model: The state's model.
        state: The state's name.
        classes: The unsafe and safe prompts.
        variants: Other forms of the model by name, such as one in another number format.
        effort: For how many samples.
        also: Other prompts by name, such as translations, whose sets are held against the model's own.
        progress: Is told of the sizes that are done.
    """
    find = finder(config)
    whole = _measured(config, model, classes, progress)
    neurons, effects = find(whole), criteria(whole).d
    samples, thresholds = _samples(config, model, classes, whole, effort, progress)
    settings = measurement_of(config)
    others = [
        (f"pooling {pooling}", measure(model, *classes, replace(settings, pooling=pooling)))
        for pooling in POOLINGS
        if pooling != settings.pooling
    ]
    others += [(name, _measured(config, variant, classes)) for name, variant in variants]
    return StabilityRecord(
        prompts=[len(prompts) for prompts in classes],
        neurons=len(neurons),
        bootstrap=bootstrap_record(_bootstrap(config, model, classes, whole, effort)),
        samples=samples,
        needed=prompts_needed([(sample.prompts, sample.mean) for sample in samples]),
        thresholds=thresholds,
        variants=[
            VariantRecord(name, neurons.jaccard(find(stats)), rank_correlation(effects, criteria(stats).d))
            for name, stats in others
        ],
        also=[also_record(config, model, classes, whole, name, prompts) for name, prompts in also],
        state=state,
    )


def also_record(
    config: Config, model: Model, classes: Classes, whole: ActivationStats, name: str, others: Classes
) -> AlsoRecord:
    """The set found with other prompts against the one of all of ``classes``, whose statistics are ``whole``.

    Where ``LEAST`` or more of them are the same requests (the same id in both classes), two more: the sets of these
    requests alone in both wordings, which differ by the wording and nothing else; and the set of these requests as
    ``classes`` word them against that of all, which is what so few prompts cost.
    """
    find = finder(config)

    def alike(first: ActivationStats, second: ActivationStats) -> SetSimilarity:
        correlation = rank_correlation(criteria(first).d, criteria(second).d)
        return SetSimilarity(find(first).jaccard(find(second)), correlation)

    of_all = alike(whole, _measured(config, model, others))
    ids = [{prompt.id for prompt in prompts if prompt.id} for prompts in (*classes, *others)]
    same = set.intersection(*ids)
    wording = fewer = SetSimilarity(math.nan, math.nan)
    if len(same) >= LEAST:
        as_run, reworded = (
            _measured(config, model, (_with_ids(unsafe, same), _with_ids(safe, same)))
            for unsafe, safe in (classes, others)
        )
        wording, fewer = alike(as_run, reworded), alike(whole, as_run)
    return AlsoRecord(
        prompts_of=name,
        prompts=[len(prompts) for prompts in others],
        jaccard=of_all.jaccard,
        correlation=of_all.correlation,
        same_requests=len(same),
        wording=wording,
        fewer=fewer,
    )


def bootstrap_record(drawn: Resampled) -> BootstrapRecord:
    """Resampled sets as numbers, with the neurons ever found counted by tenths of the samples that find them."""
    # Sums of 1/n are a little off, and one above 1.0 would be in no tenth.
    tenths = (drawn.frequency * 10 - 1e-6).ceil()
    return BootstrapRecord(
        jaccard=drawn.jaccard,
        correlation=drawn.correlation,
        always=len(drawn.always),
        always_neurons=drawn.always.to_json()["neurons"],
        ever=drawn.ever,
        frequencies=[int((tenths == tenth).sum()) for tenth in range(1, 11)],
    )


def _measured(config: Config, model: Model, classes: Classes, progress: Progress | None = None) -> ActivationStats:
    """Statistics of both classes by the run's settings."""
    return measure(model, *classes, measurement_of(config), progress=progress)


def _groups(config: Config, model: Model, prompts: Sequence[Prompt], weights: Tensor) -> GroupMoments:
    """Moments of weighted groups of the prompts by the run's settings."""
    return measure_groups(model, prompts, weights, measurement_of(config))


def _bootstrap(config: Config, model: Model, classes: Classes, whole: ActivationStats, effort: Effort) -> Resampled:
    """Bootstrap samples of both classes, each class drawn with its own seed."""
    unsafe, safe = (
        _groups(config, model, prompts, bootstrap_weights(len(prompts), effort.samples, config.seed + side))
        for side, prompts in enumerate(classes)
    )
    return resampled(whole, unsafe, safe, finder(config))


def _samples(
    config: Config, model: Model, classes: Classes, whole: ActivationStats, effort: Effort, progress: Progress | None
) -> tuple[list[SampleRecord], list[ThresholdRecord]]:
    """Pairs of disjoint samples of growing size, and of the largest size also at other densities."""
    half = min(map(len, classes)) // 2
    sizes = sorted({size for size in (*SIZES, half) if 2 <= size <= half})
    density = max(len(finder(config)(whole)), 1) / sum(whole.widths)
    samples, thresholds = list[SampleRecord](), list[ThresholdRecord]()
    for number, size in enumerate(sizes):
        unsafe, safe = (
            _groups(config, model, prompts, pair_weights(len(prompts), size, effort.pairs, config.seed + side))
            for side, prompts in enumerate(classes)
        )
        pairs = halves(whole, unsafe, safe, finder(config))
        samples.append(
            SampleRecord(size, **asdict(pairs.jaccard), chance=pairs.chance, correlation=pairs.correlation.mean)
        )
        if progress is not None:
            progress(number + 1, len(sizes) + len(POOLINGS))
        if size == sizes[-1]:
            for wanted in (min(density * share, 0.5) for share in DENSITY_MULTIPLES):
                pairs = halves(whole, unsafe, safe, partial(select, density=wanted))
                thresholds.append(ThresholdRecord(wanted, pairs.jaccard, pairs.chance))
    return samples, thresholds


def _with_ids(prompts: Sequence[Prompt], ids: set[str]) -> list[Prompt]:
    """The first prompt of each of these ids."""
    by_id: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.id in ids:
            by_id.setdefault(prompt.id, prompt)
    return list(by_id.values())
