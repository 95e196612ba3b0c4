"""Time and memory of an analysis of a 7B-sized statistics file: python benchmarks/analysis.py

28 layers of 18,944 neurons, ten topics of 200 prompts, random but for a part that the topics share. What is timed is
reading the file, the sets of all topics, roles, overlaps with 200 draws of the baseline, depth, and the volcano plot.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from safeneuron.analysis.depth import density_over_depth, thirds
from safeneuron.analysis.methods import discoveries, volcano
from safeneuron.analysis.topics import chance_overlaps, core_of, overlaps, roles, sets_of
from safeneuron.neurons.statistics import ActivationStats, GroupMoments, Moments, TopicStats
from safeneuron.selection.scores import SelectionSettings, score

WIDTHS, TOPICS, PROMPTS = (18_944,) * 28, 10, 200


def write(path: Path) -> None:
    """A statistics file of that size."""
    torch.manual_seed(0)
    neurons = sum(WIDTHS)
    common = torch.randn(neurons, dtype=torch.float64) * 0.2
    own = torch.randn(TOPICS, neurons, dtype=torch.float64) * 0.1
    m2 = torch.full((TOPICS, neurons), float(PROMPTS - 1), dtype=torch.float64)
    groups = GroupMoments(torch.full((TOPICS,), float(PROMPTS), dtype=torch.float64), common + own, m2)
    safe = Moments(2000, torch.randn(neurons, dtype=torch.float64) * 0.02, torch.full((neurons,), 1999.0).double())
    names = tuple(f"topic {number}" for number in range(TOPICS))
    TopicStats(names, groups, safe, WIDTHS, "benchmark", "last").save(path)


def analyse(path: Path) -> None:
    """All of it, printed with its time and the peak memory of the process."""
    begun = time.perf_counter()
    stats = TopicStats.load(path)
    sets = sets_of(stats, SelectionSettings(density=0.01))
    found = [roles(sets), core_of(sets), overlaps(sets), chance_overlaps(sets, 200), [thirds(one) for one in sets]]
    found += [density_over_depth(one) for one in sets]
    scores = score(ActivationStats(stats.unsafe.group(0), stats.safe, WIDTHS, stats.fingerprint, "last"))
    found += [discoveries(scores, sets[0]), volcano(scores, sets[0])]
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.1f} s, {peak:,.0f} MB at its peak, file of {path.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        analyse(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "topics.safetensors"
            write(path)
            # In a process of its own, whose peak is that of the analysis and not of making the file.
            subprocess.run([sys.executable, __file__, str(path)], check=True)
