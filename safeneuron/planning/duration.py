"""How long the stages of a config will take, in proportion to the seconds that finished stages of a run recorded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import nan, prod
from pathlib import Path
from statistics import mean
from typing import Any

from safeneuron.config.schema import Config
from safeneuron.config.states import State, selectors_for, states_of
from safeneuron.config.tables import ModelTable, PairsTable
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.models.shape import Shape
from safeneuron.planning.lengths import number_of
from safeneuron.planning.plan import aligned, time_words
from safeneuron.runtime.files import read_json

NOTE = "in proportion to weights, prompts, pairs, epochs and the longest answers; all else is as in that run"
_FARTHEST = 30  # times as many weights, or as few: small models spend their time on other things
WORK = {  # what the time of each kind of stage is proportional to
    "measure": ("weights", "prompts"), "select": ("weights",), "iterate": ("weights", "prompts", "searches"),
    "rivals": ("weights", "prompts"), "attack": ("weights", "tests", "tokens"), "judge": ("tests",),
    "capability": ("weights",), "pairs": ("weights", "pairs"), "align": ("weights", "pairs", "epochs"),
}  # fmt: skip


@dataclass(frozen=True)
class TimeRecord:
    """What a run recorded: its folder, its config, and the seconds of its finished stages by name (``T1/align``)."""

    folder: Path
    config: Config
    seconds: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> TimeRecord:
        """The record in the folder of a run, finished or not. Raises ``InputError`` where there is none."""
        done = [path for path in sorted(folder.glob("*/*/done.json")) if path.parent.name in WORK]
        seconds = {path.parent.relative_to(folder).as_posix(): float(read_json(path)["seconds"]) for path in done}
        return cls(folder, read_config(folder / "config.toml"), seconds)

    def ratios(self, config: Config, variant: str) -> dict[str, float]:
        """How many times as much work a config has as the run, by what it is counted in; NaN where unknown."""
        before, ratios = _sizes(self.config, variant), dict.fromkeys(_sizes(config, variant), nan)
        for what, size in _sizes(config, variant).items():
            with suppress(InputError, ZeroDivisionError):
                ratios[what] = 1.0 if size == before[what] else _number(size) / _number(before[what])
        return ratios

    def forecast(self, state: State, kind: str, ratios: dict[str, float]) -> float:
        """Seconds of a stage, by the same one or else the mean of its kind; NaN where they are unknown."""
        alike = {name: seconds for name, seconds in self.seconds.items() if name.endswith(f"/{kind}")}
        trained = [seconds for name, seconds in alike.items() if not name.startswith("T0/")]
        taken = alike.get(f"{state.name}/{kind}", mean(trained or alike.values() or [nan]))
        return taken * prod(ratios[what] for what in WORK[kind])


def table_of_times(config: Config, record: TimeRecord) -> list[str]:
    """What the stages of a config take by a run's record, as lines of text: how many of a kind, each, and all."""
    states, attack = states_of(config), config.attack
    wanted = dict.fromkeys(WORK, states)
    wanted["iterate"] = states if "iterated" in attack.knowledge else []
    wanted["rivals"] = [one for one in states if "fine-tune" in attack.attempts or selectors_for(attack, one)]
    wanted["capability"], wanted["align"] = states if config.capability.enabled else [], states[1:]
    wanted["pairs"], rows, total = states[: len(states) > 1], [["", "stages", "each", "in all"]], 0.0
    ratios = {variant: record.ratios(config, variant) for variant in {state.variant for state in states}}
    if ratios[""]["weights"] > _FARTHEST or ratios[""]["weights"] < 1 / _FARTHEST:
        return [f"time: unknown; {record.folder} is of a model of another size, give a run of one of about this size"]
    for kind in (kind for kind in WORK if wanted[kind]):
        seconds = [record.forecast(state, kind, ratios[state.variant]) for state in wanted[kind]]
        rows.append([kind, str(len(seconds)), time_words(mean(seconds)), time_words(sum(seconds))])
        total += sum(seconds)
    rows.append(["in all", "", "", time_words(total)])
    took = f"{len(record.seconds)} finished stages of {record.folder} ({time_words(sum(record.seconds.values()))})"
    return [f"time, by the {took}", "", *aligned(rows), "", NOTE]


def _sizes(config: Config, variant: str) -> dict[str, Any]:
    """The settings that the work is proportional to; a variant that a config does not have is its main training."""
    table, data, attack = config.variant(variant if variant in config.variants else ""), config.data, config.attack
    return {
        "weights": config.model, "prompts": (*data.unsafe, *data.safe), "tests": (*data.test_unsafe, *data.test_safe),
        "pairs": config.pairs, "epochs": table.epochs, "tokens": attack.max_new_tokens, "searches": attack.searches - 1,
    }  # fmt: skip


def _number(size: Any) -> float:
    """How much there is: active weights, prompts, pairs; NaN where texts have yet to be fetched."""
    if isinstance(size, ModelTable):
        return Shape.read(size.name, size.revision, size.trust_remote_code).active
    if isinstance(size, PairsTable):
        parts = [(*size.unsafe, *size.safe) if part == "on-policy" else part for part in (size.safety, size.general)]
        number = sum(map(_number, parts))
        return min(size.count or number, number)
    return float(number_of(size)) if isinstance(size, tuple) else float(size)
