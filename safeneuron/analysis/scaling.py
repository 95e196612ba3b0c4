"""What finished runs say together: attack success against the preference data, and round by round (Table 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safeneuron.analysis.records import Number, PartRecord, TableRow, finite, rows_of
from safeneuron.errors import InputError
from safeneuron.reporting.results import Counts, RunResults, StateResults

ATTACKS = (("ORI", "none"), ("FULL", "static"), ("FULL", "adaptive"), ("FULL", "iterated"))
"""The attacks of the tables: the set and what the attacker knew."""


_RATE, _COUNT = "ASR ", "complied "


@dataclass(frozen=True)
class ScalePoint:
    """Attack success of one trained state under one attack, by its preference pairs.

    ``rate`` lies in the interval from ``low`` to ``high`` and is of ``n`` answers; ``share`` is the pairs over the most
    that a run with the same label has.
    """

    run: str
    state: str
    label: str
    pairs: int
    set: str
    knowledge: str
    rate: Number
    low: Number
    high: Number
    n: int
    share: Number


@dataclass(frozen=True)
class RoundRecord:
    """One state of the main training: its neurons, those frozen in its training, attacks and capability.

    ``rates`` and ``complied`` are by attack, such as ``FULL static``, with None where it was not run; ``capability`` is
    by task.
    """

    state: str
    neurons: int
    frozen: int | None
    rates: dict[str, float | None]
    complied: dict[str, int | None]
    capability: dict[str, float]

    def row(self) -> TableRow:
        """One row, with the columns ``ASR ATTACK``, ``complied ATTACK`` and those of the tasks."""
        row: TableRow = {"state": self.state, "neurons": self.neurons, "frozen": self.frozen}
        for attack, rate in self.rates.items():
            row |= {f"{_RATE}{attack}": rate, f"{_COUNT}{attack}": self.complied[attack]}
        return row | self.capability

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> RoundRecord:
        """The record of a row."""
        named = ("state", "neurons", "frozen")
        return cls(
            state=row["state"],
            neurons=row["neurons"],
            frozen=row["frozen"],
            rates={key.removeprefix(_RATE): value for key, value in row.items() if key.startswith(_RATE)},
            complied={key.removeprefix(_COUNT): value for key, value in row.items() if key.startswith(_COUNT)},
            capability={
                key: value for key, value in row.items() if key not in named and not key.startswith((_RATE, _COUNT))
            },
        )


@dataclass(frozen=True)
class ScaleRecord(PartRecord):
    """The numbers of the part ``scale``: attack success by preference pairs over runs, and one run round by round."""

    scale: list[ScalePoint]
    iterations: list[RoundRecord]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON, with a state of the iterations as its row."""
        record: dict[str, Any] = finite(self.tables())
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The record that ``to_json`` wrote; ``InputError`` for anything else."""
        rounds = [RoundRecord.of_row(row) for row in record.get("iterations", [])]
        return super().from_json({**record, "iterations": rounds})

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a trained state and attack, and one a state of the main training."""
        return {"scale": rows_of(self.scale), "iterations": [state.row() for state in self.iterations]}


def required_results(folder: Path) -> RunResults:
    """The results of a finished run; ``InputError`` for a folder without them."""
    path = folder / "report" / "results.json"
    if not path.exists():
        raise InputError(f"{folder} has no report yet; finish it first with: safeneuron run {folder}/config.toml")
    return RunResults.load(path)


def data_scale(results: Sequence[RunResults]) -> list[ScalePoint]:
    """Attack success of each trained state under each attack of each run, with its interval, by its pairs (Fig. 6).

    Args:
        results: The results of the runs.

    Returns:
        The points by label, attack, pairs and run.
    """
    attacked = [
        (run, state, state.align.pairs, attack, counts)
        for run in results
        for state in run.states
        if state.align is not None
        for attack, counts in _harmful(state).items()
    ]
    most: dict[str, int] = {}
    for _, state, pairs, _, _ in attacked:
        most[state.label] = max(most.get(state.label, 0), pairs)
    points = [
        ScalePoint(
            run=run.name,
            state=state.name,
            label=state.label,
            pairs=pairs,
            set=name,
            knowledge=knowledge,
            rate=math.nan if counts.rate is None else counts.rate,
            low=math.nan if counts.low is None else counts.low,
            high=math.nan if counts.high is None else counts.high,
            n=counts.n,
            share=pairs / most[state.label],
        )
        for run, state, pairs, (name, knowledge), counts in attacked
    ]
    return sorted(points, key=lambda point: (point.label, point.set, point.knowledge, point.pairs, point.run))


def iterations(results: RunResults) -> list[RoundRecord]:
    """The iteration table (Table 2): each round of the main training with its neurons, attacks and capability.

    ``frozen`` counts the neurons that its training kept, which grow from round to round; the rates have the counts
    behind them, None where an attack was not run.

    Args:
        results: The results of one run.
    """
    rounds = []
    for state in results.states:
        if state.variant or state.neurons is None:
            continue
        attacks = {" ".join(attack).replace(" none", ""): state.attack(*attack) for attack in ATTACKS}
        counts = {name: attack.harmful if attack else None for name, attack in attacks.items()}
        rounds.append(
            RoundRecord(
                state=state.name,
                neurons=state.neurons.full,
                frozen=None if state.align is None else state.align.frozen,
                rates={name: harmful.rate if harmful else None for name, harmful in counts.items()},
                complied={name: harmful.complied if harmful else None for name, harmful in counts.items()},
                capability={task: score.value for task, score in state.scores().items()},
            )
        )
    return rounds


def _harmful(state: StateResults) -> dict[tuple[str, str], Counts]:
    """The counts on harmful prompts under those of ``ATTACKS`` that were run."""
    counts = {(attack.set, attack.knowledge): attack.harmful for attack in state.attacks}
    return {attack: known for attack in ATTACKS if (known := counts.get(attack)) is not None}
