"""Which topics share which neurons: core, shared, specific; overlap over all K topics; what chance would give.

Every neuron has a pattern, one bit a topic: whether it is in that topic's set. All numbers come from the histogram of
the patterns, ``[2**n]``, so that the cost does not grow with the sizes of the sets. A word on counting: the neurons in
every set of S are those whose pattern holds S, those in none of S are those whose pattern misses S, and both are sums
over the histogram that one pass a topic gives for all S at once (the zeta transform).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from safeneuron.analysis.records import Number, PartRecord, TableRow, rows_of
from safeneuron.analysis.settings import LEAST, Classes, Effort
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, TopicStats, label_weights
from safeneuron.runs.inputs import measurement_of, selection_of
from safeneuron.runtime.progress import Progress
from safeneuron.selection.measurement import measure_groups
from safeneuron.selection.ranking import one_model
from safeneuron.selection.scores import SelectionSettings, select

MOST_TOPICS = 16
"""With more, the histogram of patterns has too many entries."""

Histogram = NDArray[np.int64]
"""How many neurons have each pattern, ``[2**n]``."""


@dataclass(frozen=True)
class Roles:
    """How many neurons of each layer are found for all topics, for 2 to n - 1 of them, and for one alone."""

    core: list[int]
    shared: list[int]
    specific: list[int]


@dataclass(frozen=True)
class Overlap:
    """Mean over all choices of ``topics`` topics: |intersection| / |union|, and intersection / mean size.

    A choice whose sets are all empty counts in neither; with no other choice both are nan.
    """

    topics: int
    jaccard: Number
    shared: Number


@dataclass(frozen=True)
class Chance:
    """An overlap that random sets of the same sizes have: mean, and the 2.5 and 97.5 percentiles, of each of both."""

    topics: int
    jaccard: Number
    jaccard_low: Number
    jaccard_high: Number
    shared: Number
    shared_low: Number
    shared_high: Number


@dataclass(frozen=True)
class TopicSize:
    """A topic with its number of unsafe prompts, and of neurons in its set."""

    topic: str
    prompts: int
    neurons: int


@dataclass(frozen=True)
class TopicsRecord(PartRecord):
    """The numbers of the part ``topics``.

    ``layers`` has the roles by layer, ``core_by_chance`` how many neurons random sets would have in common. The
    overlaps are those of the topics, of random neurons, and of the prompts dealt to topics at random; without such a
    deal ``shuffled_topics`` is empty and ``shuffled_core`` None.
    """

    topics: list[TopicSize]
    widths: list[int]
    layers: Roles
    core: int
    core_by_chance: Number
    core_neurons: dict[str, list[int]]
    overlaps: list[Overlap]
    random_neurons: list[Chance]
    shuffled_topics: list[Overlap]
    shuffled_core: int | None

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a topic, a layer, and a number of topics."""
        roles = zip(self.widths, self.layers.core, self.layers.shared, self.layers.specific, strict=True)
        return {
            "topics": rows_of(self.topics),
            "layers": [
                {"layer": layer, "width": width, "core": core, "shared": shared, "specific": specific}
                for layer, (width, core, shared, specific) in enumerate(roles)
            ],
            "overlaps": rows_of(self.overlaps),
            "random_neurons": rows_of(self.random_neurons),
            "shuffled_topics": rows_of(self.shuffled_topics),
        }


def sets_of(stats: TopicStats, settings: SelectionSettings) -> list[NeuronSet]:
    """The safety neurons of each topic: its own unsafe prompts against all safe ones; settings as in ``select``."""
    sets = []
    for number, topic in enumerate(stats.topics):
        unsafe = stats.unsafe.group(number)
        one_topic = ActivationStats(unsafe, stats.safe, stats.widths, stats.fingerprint, stats.pooling)
        sets.append(select(one_topic, settings).labelled(topic))
    return sets


def patterns(sets: Sequence[NeuronSet]) -> NDArray[np.int64]:
    """The pattern of each neuron, ``[neuron]``: bit k is set where set k holds it.

    Raises:
        InputError: For fewer than 2 or more than ``MOST_TOPICS`` sets, or sets of different models.
    """
    if not 2 <= len(sets) <= MOST_TOPICS:
        raise InputError(f"overlap needs 2 to {MOST_TOPICS} topics, found {len(sets)}; choose that many")
    bits = np.zeros(sets[0].total, dtype=np.int64)
    for number, neurons in enumerate(sets):
        one_model(sets[0], neurons)
        bits[neurons.flat.numpy()] |= 1 << number
    return bits


def roles(sets: Sequence[NeuronSet]) -> Roles:
    """Core, shared and specific neurons of each layer (Fig. 3)."""
    times = np.bitwise_count(patterns(sets))
    layers = torch.split_with_sizes(torch.from_numpy(times.astype(np.int64)), sets[0].widths)
    n = len(sets)
    return Roles(
        [int((layer == n).sum()) for layer in layers],
        [int(((layer > 1) & (layer < n)).sum()) for layer in layers],
        [int((layer == 1).sum()) for layer in layers],
    )


def core_of(sets: Sequence[NeuronSet]) -> NeuronSet:
    """The neurons that are in every set."""
    mask = torch.from_numpy(patterns(sets) == (1 << len(sets)) - 1)
    return NeuronSet.of_mask(mask, sets[0].widths, sets[0].fingerprint, "core")


def overlaps(sets: Sequence[NeuronSet]) -> list[Overlap]:
    """Overlap against the number of topics K = 2 to n, over all C(n, K) choices of them (Fig. 5)."""
    return overlaps_of(np.bincount(patterns(sets), minlength=1 << len(sets)), len(sets))


def overlaps_of(histogram: Histogram, n: int) -> list[Overlap]:
    """The same from the histogram ``[2**n]`` of patterns."""
    intersection, union = _sums(histogram, n)
    chosen = np.arange(1 << n)
    sizes = intersection[1 << np.arange(n)]
    mean_size = np.array([(chosen >> k & 1) * sizes[k] for k in range(n)]).sum(axis=0) / np.maximum(
        np.bitwise_count(chosen), 1
    )
    by_count = []
    for count in range(2, n + 1):
        which = (np.bitwise_count(chosen) == count) & (union > 0)
        if which.any():
            both = intersection[which]
            by_count.append(
                Overlap(count, float((both / union[which]).mean()), float((both / mean_size[which]).mean()))
            )
        else:
            by_count.append(Overlap(count, float("nan"), float("nan")))
    return by_count


def chance_overlaps(sets: Sequence[NeuronSet], draws: int = 200, seed: int = 0) -> list[Chance]:
    """The overlaps of random sets with as many neurons in every layer as these: the permutation baseline."""
    draw, n, widths = np.random.default_rng(seed), len(sets), sets[0].widths
    starts = np.cumsum([0, *widths[:-1]])
    sizes = [neurons.counts for neurons in sets]
    values = []
    pattern = np.zeros(sum(widths), dtype=np.int64)
    for _ in range(draws):
        pattern[:] = 0
        for number, counts in enumerate(sizes):
            for start, width, count in zip(starts, widths, counts, strict=True):
                pattern[start + draw.choice(width, count, replace=False, shuffle=False)] |= 1 << number
        drawn = overlaps_of(np.bincount(pattern, minlength=1 << n), n)
        values.append([(overlap.jaccard, overlap.shared) for overlap in drawn])
    mean = np.mean(values, axis=0)
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    return [
        Chance(k + 2, *(float(part[k, which]) for which in (0, 1) for part in (mean, low, high))) for k in range(n - 1)
    ]


def expected_core(sets: Sequence[NeuronSet]) -> float:
    """How many neurons random sets of the same sizes by layer have in common on average: sum of w prod(s / w)."""
    # ``expected_overlap`` for any number of sets; for two the same but for the order of the floating-point operations.
    counts = np.array([neurons.counts for neurons in sets], dtype=np.float64)
    widths = np.array(sets[0].widths, dtype=np.float64)
    return float((widths * (counts / widths).prod(axis=0)).sum())


def _sums(histogram: Histogram, n: int) -> tuple[Histogram, Histogram]:
    """For every choice S of topics: |intersection| and |union| of its sets, ``[2**n]``."""
    if histogram.shape != (1 << n,):
        raise ValueError(f"histogram of shape {histogram.shape} for {n} topics; expected one entry a pattern")
    above, below = histogram.copy(), histogram.copy()
    for bit in range(n):
        # Views that pair each choice without the bit with the same one with it.
        up, down = above.reshape(-1, 2, 1 << bit), below.reshape(-1, 2, 1 << bit)
        up[:, 0] += up[:, 1]
        down[:, 1] += down[:, 0]
    # A neuron is in no set of S if its pattern lies within the other topics.
    union = histogram.sum() - below[::-1]
    return above, union


def topic_names(prompts: Sequence[Prompt]) -> list[str]:
    """The topics with enough prompts, most prompts first, then by name; at most ``MOST_TOPICS``."""
    counts = Counter(prompt.category for prompt in prompts if prompt.category)
    enough = [name for name, count in counts.items() if count >= LEAST]
    return sorted(enough, key=lambda name: (-counts[name], name))[:MOST_TOPICS]


def topic_stats(
    config: Config, model: Model, classes: Classes, labels: Sequence[str], progress: Progress | None = None
) -> TopicStats:
    """Statistics by topic; one streaming pass a class.

    Args:
        config: The run's config, for how activations are measured.
        model: The model.
        classes: The unsafe and safe prompts.
        labels: The topic of each unsafe prompt; those with fewer than ``LEAST`` prompts are left out.
        progress: Counts unsafe prompts.

    Raises:
        InputError: Where fewer than two topics have enough prompts.
    """
    unsafe, safe = classes
    names = topic_names([Prompt(prompt.text, label) for prompt, label in zip(unsafe, labels, strict=True)])
    if len(names) < 2:
        raise InputError(
            f"the unsafe prompts have {len(names)} topics with {LEAST} prompts or more, and topics need "
            "2; give prompts with a category column"
        )
    settings = measurement_of(config)
    groups = measure_groups(model, unsafe, label_weights(labels, names), settings, progress=progress)
    whole = measure_groups(model, safe, label_weights([""] * len(safe), [""]), settings)
    return TopicStats(tuple(names), groups, whole.group(0), model.widths, model.fingerprint, settings.pooling)


def topics_record(config: Config, stats: TopicStats, shuffled: TopicStats | None, effort: Effort) -> TopicsRecord:
    """Roles by layer and overlaps, beside those of random neurons and of prompts dealt to topics at random.

    Args:
        config: The run's config, for how neurons are selected.
        stats: Statistics by topic.
        shuffled: The same with the topics dealt to the prompts at random; None leaves this baseline out.
        effort: For how many draws of random sets.
    """
    settings = selection_of(config)
    sets = sets_of(stats, settings)
    mixed = None if shuffled is None else sets_of(shuffled, settings)
    core = core_of(sets)
    return TopicsRecord(
        topics=[
            TopicSize(neurons.label, stats.unsafe.group(number).count, len(neurons))
            for number, neurons in enumerate(sets)
        ],
        widths=list(stats.widths),
        layers=roles(sets),
        core=len(core),
        core_by_chance=expected_core(sets),
        core_neurons=core.to_json()["neurons"],
        overlaps=overlaps(sets),
        random_neurons=chance_overlaps(sets, effort.draws, config.seed),
        shuffled_topics=[] if mixed is None else overlaps(mixed),
        shuffled_core=None if mixed is None else len(core_of(mixed)),
    )
