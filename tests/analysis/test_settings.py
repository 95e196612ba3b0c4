"""The finder of neurons follows the run's settings."""

from __future__ import annotations

from safeneuron.analysis.settings import finder
from safeneuron.config.toml import read_config
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import select
from tests.helpers import planted

STATS = measure(planted.model(), *planted.twins(12))


def test_a_density_and_thresholds_are_those_of_the_config():
    find = finder(read_config("demo", ["select.density=0.0348"]))
    assert find(STATS) == select(STATS, density=0.0348)
    find = finder(read_config("demo", ["select.density=0.05"]))
    assert len(find(STATS)) > len(select(STATS, density=0.0348))
