"""Records of every part of an analysis made by hand, of the size that real ones have, for figures and tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from safeneuron.analysis.depth import DepthRecord, SetDepth, Thirds
from safeneuron.analysis.disjoint_sets import Interval
from safeneuron.analysis.drift import Movement, StateRecord, StatesRecord, Turnover
from safeneuron.analysis.methods import Agreement, Discoveries, MethodsRecord, Volcano
from safeneuron.analysis.redundancy import CurvePoint, OutcomeRecord, RedundancyRecord, SetRecord, StateRedundancy
from safeneuron.analysis.resampling import Needed, Spread
from safeneuron.analysis.scaling import RoundRecord, ScalePoint
from safeneuron.analysis.stability import (
    AlsoRecord,
    BootstrapRecord,
    SampleRecord,
    SetSimilarity,
    StabilityRecord,
    VariantRecord,
)
from safeneuron.analysis.topics import Chance, Overlap, Roles, TopicSize, TopicsRecord

LAYERS = 30
T = TypeVar("T")


def by_layer(value: Callable[[int], T]) -> list[T]:
    return [value(layer) for layer in range(LAYERS)]


def topics() -> TopicsRecord:
    def overlaps(start: float) -> list[Overlap]:
        return [Overlap(k, start / k**0.6, 1.5 * start / k**0.4) for k in range(2, 11)]

    roles = Roles(
        core=by_layer(lambda layer: 3 + layer % 3),
        shared=by_layer(lambda layer: 10 + round(6 * math.sin(layer / 4))),
        specific=by_layer(lambda layer: 12 + layer % 7),
    )
    chance = [Chance(one.topics, one.jaccard, 0.004, 0.004, one.shared, 0.004, 0.004) for one in overlaps(0.01)]
    return TopicsRecord(
        topics=[TopicSize(f"topic {number}", 100, 461) for number in range(10)],
        widths=[1536] * LAYERS,
        layers=roles,
        core=sum(roles.core),
        core_by_chance=0.1,
        core_neurons={},
        overlaps=overlaps(0.5),
        random_neurons=chance,
        shuffled_topics=overlaps(0.52),
        shuffled_core=140,
    )


def depth(*names: str) -> DepthRecord:
    def placed(number: int, name: str) -> SetDepth:
        density = [0.01 * (0.4 + 2 * math.exp(-(((n + 0.5) / 20 - 0.2 - 0.1 * number) ** 2) / 0.02)) for n in range(20)]
        return SetDepth(name, 461, by_layer(lambda layer: 0.01), density, Thirds(0.5, 0.3, 0.2), 0.4)

    return DepthRecord([placed(number, name) for number, name in enumerate(names)])


def stability(*sizes: int) -> StabilityRecord:
    jaccards = [1 - 2.4 / size**0.45 for size in sizes]
    samples = [
        SampleRecord(size, mean, mean - 0.06, mean + 0.06, 4, chance=0.005, correlation=0.6)
        for size, mean in zip(sizes, jaccards, strict=True)
    ]
    variants = (("pooling mean", 0.31), ("pooling max", 0.2), ("no chat template", 0.15), ("bfloat16", 0.97))
    also = AlsoRecord("de", [300, 300], 0.12, 0.5, 9, wording=SetSimilarity(0.2, 0.5), fewer=SetSimilarity(0.4, 0.8))
    spread = Spread(0.6, 0.5, 0.7, 20)
    frequencies = [400, 140, 90, 70, 60, 50, 50, 60, 90, 190]
    return StabilityRecord(
        prompts=[1000, 1000],
        neurons=461,
        bootstrap=BootstrapRecord(spread, spread, 150, {}, sum(frequencies), frequencies),
        samples=samples,
        needed=Needed(0.9, None, "not reached", math.nan),
        thresholds=[],
        variants=[VariantRecord(name, jaccard, 0.5) for name, jaccard in variants],
        also=[also],
        state="T0",
    )


def changed(name: str, moved: bool = True) -> StateRecord:
    return StateRecord(
        state=name,
        turnover=Turnover(
            kept=by_layer(lambda layer: round(8 + 5 * math.sin(layer))),
            lost=by_layer(lambda layer: 3 + layer % 4),
            new=by_layer(lambda layer: 2 + layer % 5),
        ),
        jaccard_with_T0=0.6,
        cka_unsafe=by_layer(lambda layer: 0.99 - 0.005 * layer if layer else math.nan),
        cosine_unsafe=by_layer(lambda layer: 1 - 0.0003 * layer**2),
        cka_safe=by_layer(lambda layer: 0.995 - 0.002 * layer if layer else math.nan),
        cosine_safe=by_layer(lambda layer: 1 - 0.0001 * layer**2),
        along_own=by_layer(lambda layer: 0.3 * layer**0.7),
        along_T0=by_layer(lambda layer: 0.2 * layer**0.7),
        separability=by_layer(lambda layer: min(1, 0.5 + 0.1 * layer)),
        separability_pruned=by_layer(lambda layer: min(0.97, 0.5 + 0.06 * layer)),
        moved=by_layer(lambda layer: Movement(layer, 0.0, 0.002 + 0.0001 * layer)) if moved else None,
    )


def states(*records: StateRecord) -> StatesRecord:
    return StatesRecord([64, 64], list(records))


def outcome(refused: float) -> OutcomeRecord:
    return OutcomeRecord(refused, 1 - refused, 0, max(0, refused - 0.12), min(1, refused + 0.1))


def point(neurons: int, refused: float) -> CurvePoint:
    left = outcome(refused)
    return CurvePoint(neurons, left.refused, left.complied, left.incoherent, left.refused_low, left.refused_high)


def redundancy(
    name: str, left: list[float], numbers: dict[str, tuple[int | None, int | None, int | None]] | None
) -> StateRedundancy:
    """A state of which sets and curve leave these shares; ``numbers`` are each with both ends of its interval."""
    intact = outcome(0.9 if numbers else 0.1)
    values = {key: value for key, (value, _, _) in (numbers or {}).items()}
    ends = {key: Interval(low, high) for key, (_, low, high) in (numbers or {}).items()}
    return StateRedundancy(
        state=name,
        prompts=64,
        intact=intact,
        redundancy_index=values.get("redundancy_index"),
        coherent_index=values.get("redundancy_index"),
        sets_to_halve=values.get("sets_to_halve"),
        neurons_in_sets_to_halve=None,
        neurons_to_halve=values.get("neurons_to_halve"),
        intervals=ends if numbers else None,
        sets=[SetRecord(461, outcome(refused), outcome(refused)) for refused in left],
        curve=[point(400 * n, refused) for n, refused in enumerate([intact.refused, *left])],
    )


def redundancies() -> RedundancyRecord:
    return RedundancyRecord([
        redundancy("T0", [], None),
        redundancy("dpo-T1", [0.4, 0.8, 0.2, 0.1], {
            "redundancy_index": (1, 0, 1), "sets_to_halve": (1, 1, 2), "neurons_to_halve": (560, 350, 900),
        }),
        redundancy("ablate-T1", [0.85, 0.8, 0.6, 0.5], {
            "redundancy_index": (2, 1, 3), "sets_to_halve": (None, 3, None), "neurons_to_halve": (None, 1200, None),
        }),
        redundancy("refresh-T1", [0.85, 0.7, 0.4, 0.3], {
            "redundancy_index": (1, 0, 2), "sets_to_halve": (3, 2, None), "neurons_to_halve": (700, 450, 1000),
        }),
    ])  # fmt: skip


def methods() -> tuple[MethodsRecord, Volcano]:
    """The record, and the points of the volcano plot."""
    pairs = (("ES", "SAS", 120), ("ES", "probe", 90), ("ES", "snip", 14), ("SAS", "probe", 80), ("probe", "snip", 10))

    def layers(number: int, both: int) -> list[int]:
        return by_layer(lambda layer: round(both / 30 * (1 + math.sin(layer / 3 + number))))

    agreements = [
        Agreement(first, second, 230, 230, both, 1.1, 0.3, layers(number, both))
        for number, (first, second, both) in enumerate(pairs)
    ]
    d = [math.sin(7 * n) * 2 for n in range(600)]
    shift = [value * 10 ** (math.cos(3 * n) * 2 - 1.5) for n, value in enumerate(d)]
    kind = [(2 if value > 1.5 else 1) if value > 1 else 0 for value in d]
    points = Volcano(
        torch.tensor(d, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64), torch.zeros(600),
        torch.tensor(kind), torch.arange(600),
    )  # fmt: skip
    return MethodsRecord(agreements, [Discoveries("ES", 230, 100, 400, 300, 0.2)]), points


def scale(*trainings: str) -> list[ScalePoint]:
    attacks = (("ORI", "none"), ("FULL", "static"), ("FULL", "adaptive"))
    return [
        ScalePoint("run", "T1", label, pairs, which, knowledge, rate, rate - 0.05, rate + 0.05, 100, pairs / 384)
        for number, label in enumerate(trainings)
        for kind, (which, knowledge) in enumerate(attacks)
        for pairs in (40, 80, 160, 320, 384)
        for rate in [0.1 + 0.05 * number + 0.05 * kind + 0.5 * math.exp(-pairs / 150)]
    ]


def rounds() -> list[RoundRecord]:
    def rates(n: int) -> dict[str, float | None]:
        by_attack = {"ORI": 0.9 / (1 + 5 * n), "FULL static": 0.5 / (1 + n), "FULL adaptive": 0.5 / (1 + 0.4 * n)}
        return {**by_attack, "FULL iterated": None}

    return [RoundRecord(f"T{n}", 461, 430 * n or None, rates(n), dict.fromkeys(rates(n)), {}) for n in range(4)]
