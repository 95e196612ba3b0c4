"""A state's neurons seen from all sides, as records for JSON: by topic, under other prompts, and one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from safeneuron.config import Config
from safeneuron.data import Prompt
from safeneuron.errors import InputError
from safeneuron.groups import TopicStats, bootstrap_weights, one_of_each, pair_weights
from safeneuron.measuring import POOLINGS, activations_of, measure, measure_groups
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.portraits import portraits
from safeneuron.selecting import Scores, criteria, select
from safeneuron.stability import Halves, Resampled, halves, prompts_needed, rank_correlation, resampled
from safeneuron.statistics import ActivationStats
from safeneuron.streaming import Progress
from safeneuron.topics import MOST_TOPICS, chance_overlaps, core_of, expected_core, overlaps, roles, sets_of

LEAST = 6
"""A topic with fewer prompts is left out: its deviations would be noise."""
SIZES = (10, 20, 40, 80, 160, 320, 640)
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The densities of the pruning curve, as multiples of the density of the state's own set."""

Classes = tuple[Sequence[Prompt], Sequence[Prompt]]


@dataclass(frozen=True)
class Effort:
    """How much work an analysis may be: bootstrap samples, pairs of samples, prompts, disjoint sets, portraits."""

    samples: int = 20
    pairs: int = 4
    prompts: int = 64
    sets: int = 4
    neurons: int = 12
    draws: int = 200


def finder(config: Config) -> Callable[[ActivationStats], NeuronSet]:
    """From statistics to a set, by the run's settings."""
    table = config.select
    return lambda stats: select(stats, table.effect_size, table.shift, table.density)


def topic_names(prompts: Sequence[Prompt]) -> list[str]:
    """The topics with enough prompts, most prompts first, then by name; at most ``MOST_TOPICS``."""
    counts = Counter(prompt.category for prompt in prompts if prompt.category)
    enough = [name for name, count in counts.items() if count >= LEAST]
    return sorted(enough, key=lambda name: (-counts[name], name))[:MOST_TOPICS]


def topic_stats(
    config: Config, model: Model, classes: Classes, labels: Sequence[str], progress: Progress | None = None
) -> TopicStats:
    """Statistics by topic, where ``labels`` are the topics of the unsafe prompts; one streaming pass a class.

    Raises ``InputError`` where fewer than two topics have enough prompts.
    """
    unsafe, safe = classes
    names = topic_names([Prompt(prompt.text, label) for prompt, label in zip(unsafe, labels, strict=True)])
    if len(names) < 2:
        raise InputError(
            f"the unsafe prompts have {len(names)} topics with {LEAST} prompts or more, and topics need "
            "2; give prompts with a category column"
        )
    table = config.measure
    settings = (table.pooling, table.batch_tokens, table.max_tokens)
    groups = measure_groups(model, unsafe, one_of_each(labels, names), *settings, progress)
    whole = measure_groups(model, safe, one_of_each([""] * len(safe), [""]), *settings)
    return TopicStats(tuple(names), groups, whole.group(0), model.widths, model.fingerprint, table.pooling)


def topics_record(config: Config, stats: TopicStats, shuffled: TopicStats | None, effort: Effort) -> dict[str, Any]:
    """Roles by layer and overlaps, beside those of random neurons and of prompts dealt to topics at random."""
    table = config.select
    chosen = (table.effect_size, table.shift, table.density)
    sets = sets_of(stats, *chosen)
    mixed = None if shuffled is None else sets_of(shuffled, *chosen)
    core = core_of(sets)
    return {
        "topics": [
            {"topic": one.label, "prompts": stats.unsafe.group(number).count, "neurons": len(one)}
            for number, one in enumerate(sets)
        ],
        "widths": list(stats.widths),
        "layers": roles(sets)._asdict(),
        "core": len(core),
        "core_by_chance": expected_core(sets),
        "core_neurons": core.to_json()["neurons"],
        "overlaps": [one._asdict() for one in overlaps(sets)],
        "random_neurons": [one._asdict() for one in chance_overlaps(sets, effort.draws, config.seed)],
        "shuffled_topics": [] if mixed is None else [one._asdict() for one in overlaps(mixed)],
        "shuffled_core": None if mixed is None else len(core_of(mixed)),
    }


def stability_record(
    config: Config,
    model: Model,
    classes: Classes,
    variants: Sequence[tuple[str, Model]],
    effort: Effort,
    progress: Progress | None = None,
    also: Sequence[tuple[str, Classes]] = (),
) -> dict[str, Any]:
    """Bootstrap, disjoint samples of growing size, poolings, thresholds, and ``variants``: other forms of the model.

    ``also`` are other prompts by name, such as translations, whose sets are held against the model's own.
    """
    table, find = config.measure, finder(config)
    count = min(map(len, classes))
    sizes = sorted({size for size in (*SIZES, count // 2) if 2 <= size <= count // 2})
    settings = (table.pooling, table.batch_tokens, table.max_tokens)
    unsafe, safe = classes
    whole = measure(model, unsafe, safe, *settings, progress)
    boots = [
        measure_groups(model, prompts, bootstrap_weights(len(prompts), effort.samples, config.seed + side), *settings)
        for side, prompts in enumerate(classes)
    ]
    again = resampled(whole, boots[0], boots[1], find)
    curve: list[tuple[int, Halves]] = []
    thresholds: list[dict[str, Any]] = []
    density = max(len(find(whole)), 1) / sum(whole.widths)
    for number, size in enumerate(sizes):
        pairs = [
            measure_groups(
                model, prompts, pair_weights(len(prompts), size, effort.pairs, config.seed + side), *settings
            )
            for side, prompts in enumerate(classes)
        ]
        curve.append((size, halves(whole, pairs[0], pairs[1], find)))
        if progress is not None:
            progress(number + 1, len(sizes) + len(POOLINGS))
        if size == sizes[-1]:
            for wanted in (min(density * share, 0.5) for share in SHARES):
                one = halves(whole, pairs[0], pairs[1], partial(select, density=wanted))
                thresholds.append({"density": wanted, "jaccard": one.jaccard._asdict(), "chance": one.chance})
    others = [
        (f"pooling {name}", measure(model, unsafe, safe, name, *settings[1:]))
        for name in POOLINGS
        if name != settings[0]
    ]
    others += [(name, measure(other, unsafe, safe, *settings)) for name, other in variants]
    own = find(whole)
    ranks = criteria(whole).d
    return {
        "prompts": [len(prompts) for prompts in classes],
        "neurons": len(own),
        "bootstrap": _bootstrap(again),
        "samples": [
            {"prompts": size, **one.jaccard._asdict(), "chance": one.chance, "correlation": one.correlation.mean}
            for size, one in curve
        ],
        "needed": prompts_needed([(size, one.jaccard.mean) for size, one in curve])._asdict(),
        "thresholds": thresholds,
        "variants": [
            {
                "variant": name,
                "jaccard": own.jaccard(find(stats)),
                "correlation": rank_correlation(ranks, criteria(stats).d),
            }
            for name, stats in others
        ],
        "also": [also_record(config, model, classes, whole, *one) for one in also],
    }


def also_record(
    config: Config, model: Model, classes: Classes, whole: ActivationStats, name: str, others: Classes
) -> dict[str, Any]:
    """The set found with other prompts against the one of all of ``classes``, whose statistics are ``whole``.

    Where ``LEAST`` or more of them are the same requests (the same id in both classes), two more: the sets of these
    requests alone in both wordings, which differ by the wording and nothing else; and the set of these requests as
    ``classes`` word them against that of all, which is what so few prompts cost.
    """
    find, table = finder(config), config.measure

    def measured(prompts: Classes) -> ActivationStats:
        return measure(model, *prompts, table.pooling, table.batch_tokens, table.max_tokens)

    def alike(first: ActivationStats, second: ActivationStats) -> dict[str, float]:
        correlation = rank_correlation(criteria(first).d, criteria(second).d)
        return {"jaccard": find(first).jaccard(find(second)), "correlation": correlation}

    record = {"prompts_of": name, "prompts": [len(prompts) for prompts in others], **alike(whole, measured(others))}
    ids = [{prompt.id for prompt in prompts if prompt.id} for prompts in (*classes, *others)]
    same = set.intersection(*ids)
    if len(same) < LEAST:
        unknown = {"jaccard": None, "correlation": None}
        return {**record, "same_requests": len(same), "wording": unknown, "fewer": unknown}
    own, worded = (measured((_with_ids(unsafe, same), _with_ids(safe, same))) for unsafe, safe in (classes, others))
    return {**record, "same_requests": len(same), "wording": alike(own, worded), "fewer": alike(whole, own)}


def _with_ids(prompts: Sequence[Prompt], ids: set[str]) -> list[Prompt]:
    """The first prompt of each of these ids."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.id in ids:
            found.setdefault(prompt.id, prompt)
    return list(found.values())


def _bootstrap(again: Resampled) -> dict[str, Any]:
    # Sums of 1/n are a little off, and one above 1.0 would be in no tenth.
    tenths = (again.frequency * 10 - 1e-6).ceil()
    return {
        "jaccard": again.jaccard._asdict(),
        "correlation": again.correlation._asdict(),
        "always": len(again.always),
        "always_neurons": again.always.to_json()["neurons"],
        "ever": again.ever,
        "frequencies": [int((tenths == tenth).sum()) for tenth in range(1, 11)],
    }


def portraits_record(
    config: Config, model: Model, own: NeuronSet, scores: Scores, prompts: Sequence[Prompt], effort: Effort
) -> list[dict[str, Any]]:
    """Portraits of the neurons of the set with the largest effect sizes, the largest first."""
    table = config.measure
    best = own.flat[scores.d[own.flat].sort(descending=True).indices[: effort.neurons]]
    chosen = NeuronSet(best.sort().values, own.widths, own.fingerprint, "portraits")
    activations = activations_of(model, prompts, chosen, table.pooling, table.batch_tokens, table.max_tokens)
    found = [
        {**asdict(one), "d": float(scores.d[flat]), "exciting": [prompts[index].text for index in one.exciting]}
        for one, flat in zip(portraits(model, chosen, prompts, activations), chosen.flat.tolist(), strict=True)
    ]
    return sorted(found, key=lambda one: -one["d"])
