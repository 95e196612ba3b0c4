"""A state's neurons seen from all sides, as records for JSON: by topic, under other prompts, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.selection.scores import select

LEAST = 6
"""A topic with fewer prompts is left out: its deviations would be noise."""
DENSITY_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
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


Record = dict[str, Any]


def flat(record: Record) -> Record:
    """A record as one row: what lies in it gets the name of its place in front."""
    row: Record = {}
    for key, value in record.items():
        row |= {f"{key}_{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return row


def finite(value: Any) -> Any:
    """The same with None for what is not a number, which JSON cannot hold."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
