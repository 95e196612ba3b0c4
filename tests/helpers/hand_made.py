"""Numbers of every part of an analysis made by hand, of the size that real ones have, for figures and tables."""

from __future__ import annotations

import math
from typing import Any

LAYERS = 30
Record = dict[str, Any]


def by_layer(value: Any) -> list[Any]:
    return [value(layer) for layer in range(LAYERS)]


def topics() -> Record:
    def overlaps(start: float) -> list[Record]:
        return [{"topics": k, "jaccard": start / k**0.6, "shared": 1.5 * start / k**0.4} for k in range(2, 11)]

    ends = {f"{name}_{end}": 0.004 for name in ("jaccard", "shared") for end in ("low", "high")}
    roles = {
        "core": by_layer(lambda layer: 3 + layer % 3),
        "shared": by_layer(lambda layer: 10 + round(6 * math.sin(layer / 4))),
        "specific": by_layer(lambda layer: 12 + layer % 7),
    }
    chance = [{**one, **ends} for one in overlaps(0.01)]
    return {"widths": [1536] * LAYERS, "layers": roles, "overlaps": overlaps(0.5), "shuffled_topics": overlaps(0.52),
            "random_neurons": chance}  # fmt: skip


def depth(*names: str) -> Record:
    def one(number: int, name: str) -> Record:
        density = [0.01 * (0.4 + 2 * math.exp(-(((n + 0.5) / 20 - 0.2 - 0.1 * number) ** 2) / 0.02)) for n in range(20)]
        return {"name": name, "neurons": 461, "density": density, "thirds": [0.5, 0.3, 0.2], "mean_depth": 0.4}

    return {"sets": [one(number, name) for number, name in enumerate(names)]}


def stability(*sizes: int) -> Record:
    jaccards = [1 - 2.4 / size**0.45 for size in sizes]
    samples = [
        {"prompts": size, "mean": mean, "low": mean - 0.06, "high": mean + 0.06, "chance": 0.005}
        for size, mean in zip(sizes, jaccards, strict=True)
    ]
    variants = (("pooling mean", 0.31), ("pooling max", 0.2), ("no chat template", 0.15), ("bfloat16", 0.97))
    also = {"prompts_of": "de", "jaccard": 0.12, "wording": {"jaccard": 0.2}, "fewer": {"jaccard": 0.4}}
    return {
        "samples": samples,
        "bootstrap": {"frequencies": [400, 140, 90, 70, 60, 50, 50, 60, 90, 190]},
        "variants": [{"variant": name, "jaccard": jaccard} for name, jaccard in variants],
        "also": [also],
    }


def changed(name: str, moved: bool = True) -> Record:
    weights = [{"inside": 0.0, "outside": 0.002 + 0.0001 * layer} for layer in range(LAYERS)]
    return {
        "state": name,
        "turnover": {
            "kept": by_layer(lambda layer: round(8 + 5 * math.sin(layer))),
            "lost": by_layer(lambda layer: 3 + layer % 4),
            "new": by_layer(lambda layer: 2 + layer % 5),
        },
        "moved": weights if moved else None,
        "cka_unsafe": by_layer(lambda layer: 0.99 - 0.005 * layer if layer else None),
        "cka_safe": by_layer(lambda layer: 0.995 - 0.002 * layer if layer else None),
        "cosine_unsafe": by_layer(lambda layer: 1 - 0.0003 * layer**2),
        "along_own": by_layer(lambda layer: 0.3 * layer**0.7),
        "along_T0": by_layer(lambda layer: 0.2 * layer**0.7),
        "separability": by_layer(lambda layer: min(1, 0.5 + 0.1 * layer)),
        "separability_pruned": by_layer(lambda layer: min(0.97, 0.5 + 0.06 * layer)),
    }


def share(refused: float) -> Record:
    return {"refused": refused, "refused_low": max(0, refused - 0.12), "refused_high": min(1, refused + 0.1)}


def redundancy(
    name: str, left: list[float], numbers: dict[str, tuple[int | None, int | None, int | None]] | None
) -> Record:
    """A state of which sets and curve leave these shares; ``numbers`` are each with both ends of its interval."""
    intact = share(0.9 if numbers else 0.1)
    names = ("redundancy_index", "sets_to_halve", "neurons_to_halve")
    values = {key: (numbers or {}).get(key, (None, None, None)) for key in names}
    return {
        "state": name,
        "intact": intact,
        "sets": [{"neurons": 461, "alone": share(one), "together": share(one)} for one in left],
        "curve": [{"neurons": 400 * n, **share(one)} for n, one in enumerate([intact["refused"], *left])],
        **{key: value for key, (value, _, _) in values.items()},
        "intervals": {key: {"low": low, "high": high} for key, (_, low, high) in values.items()} if numbers else None,
    }


def redundancies() -> Record:
    states = [
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
    ]  # fmt: skip
    return {"states": states}


def methods() -> tuple[Record, Record]:
    """The record, and the points of the volcano plot."""
    pairs = (("ES", "SAS", 120), ("ES", "probe", 90), ("ES", "snip", 14), ("SAS", "probe", 80), ("probe", "snip", 10))
    agreements = [
        {"first": first, "second": second, "both": both, "chance": 1.1,
         "layers": by_layer(lambda layer, n=number, both=both: round(both / 30 * (1 + math.sin(layer / 3 + n))))}
        for number, (first, second, both) in enumerate(pairs)
    ]  # fmt: skip
    d = [math.sin(7 * n) * 2 for n in range(600)]
    shift = [value * 10 ** (math.cos(3 * n) * 2 - 1.5) for n, value in enumerate(d)]
    kind = [(2 if value > 1.5 else 1) if value > 1 else 0 for value in d]
    return {"agreements": agreements}, {"d": d, "shift": shift, "kind": kind}


def scale(*trainings: str) -> list[Record]:
    attacks = (("ORI", "none"), ("FULL", "static"), ("FULL", "adaptive"))
    return [
        {"label": label, "set": which, "knowledge": knowledge, "pairs": pairs, "rate": rate, "low": rate - 0.05,
         "high": rate + 0.05}
        for number, label in enumerate(trainings)
        for kind, (which, knowledge) in enumerate(attacks)
        for pairs in (40, 80, 160, 320, 384)
        for rate in [0.1 + 0.05 * number + 0.05 * kind + 0.5 * math.exp(-pairs / 150)]
    ]  # fmt: skip


def rounds() -> list[Record]:
    return [
        {"state": f"T{n}", "frozen": 430 * n or None, "ASR ORI": 0.9 / (1 + 5 * n), "ASR FULL static": 0.5 / (1 + n),
         "ASR FULL adaptive": 0.5 / (1 + 0.4 * n), "ASR FULL iterated": None}
        for n in range(4)
    ]  # fmt: skip
