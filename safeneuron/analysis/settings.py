"""What all parts of an analysis share: how much work it may be, and the finder of neurons by a run's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.runs.inputs import selection_of
from safeneuron.selection.scores import select

LEAST = 6
"""A topic with fewer prompts is left out: its deviations would be noise."""
DENSITY_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The densities of the pruning curve, as multiples of the density of the state's own set."""

Classes = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Unsafe and safe prompts."""


@dataclass(frozen=True)
class Effort:
    """How much work an analysis may be.

    Args:
        samples: Bootstrap samples of the prompts for stability.
        pairs: Pairs of disjoint samples of each size for stability.
        prompts: Prompts of each class for states, and harmful test prompts for redundancy.
        sets: Disjoint sets that redundancy looks for at most.
        neurons: Portraits.
        draws: Draws of random sets for the baseline of topics.
    """

    samples: int = 20
    pairs: int = 4
    prompts: int = 64
    sets: int = 4
    neurons: int = 12
    draws: int = 200


def finder(config: Config) -> Callable[[ActivationStats], NeuronSet]:
    """From statistics to a set, by the run's settings."""
    settings = selection_of(config)
    return lambda stats: select(stats, settings)
