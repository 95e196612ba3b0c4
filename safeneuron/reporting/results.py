"""Reading the results of a run: which attacks there are, and their shares with intervals.

A share is None where nothing was run or nothing could be judged, so that no table, figure or sentence invents a zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COLUMNS: tuple[tuple[str, str], ...] = (
    ("ORI", "none"),
    ("ES", "static"),
    ("SAS", "static"),
    ("FULL", "static"),
    ("ES", "adaptive"),
    ("SAS", "adaptive"),
    ("FULL", "adaptive"),
    ("FULL", "iterated"),
    ("random", "control"),
)
"""Set and knowledge of the attacker, in the order of every table and figure."""


FURTHER = ("rival", "operator", "transfer", "model", "input")
"""Knowledge of the attacks beside those, in the order of their table."""


COMPARED = (
    ("harmful", "complied", "ORI", "none"),
    ("harmful", "complied", "FULL", "adaptive"),
    ("harmful", "complied", "FULL", "iterated"),
    ("benign", "refused", "ORI", "none"),
)
"""In what two states are compared: the kind of request, the verdict, and the attack."""


TITLES = {
    ("mean", "operator"): "FULL held at its harmless mean",
    ("opposite", "operator"): "FULL held at minus its harmful mean",
    ("FULL", "transfer"): "neurons of another model",
    ("direction", "model"): "refusal direction projected out",
    ("fine-tune", "model"): "fine-tuned by a LoRA adapter",
}


@dataclass(frozen=True)
class Share:
    """``hits`` of ``total`` judged answers as a rate with its 95 % Wilson interval, all between 0 and 1."""

    hits: int
    total: int
    rate: float
    low: float
    high: float

    def overlaps(self, other: Share) -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high

    def compared_with(self, other: Share) -> str:
        """``lower`` or ``higher`` than ``other``; ``unclear`` where the intervals overlap."""
        if self.overlaps(other):
            return "unclear"
        return "lower" if self.rate < other.rate else "higher"

    def interval(self) -> str:
        """Both ends with a dash between them and one percent sign."""
        return f"{number(self.low)}\u2013{percent(self.high)}"

    def words(self) -> str:
        """Rate, and the interval in brackets, for a sentence."""
        return f"{percent(self.rate)} ({number(self.low)} to\u00a0{percent(self.high)})"


def number(rate: float) -> str:
    """A rate in percent without its sign; near 0 % and 100 % with a decimal, lest 1 of 313 reads as none."""
    value = 100 * rate
    return f"{value:.1f}" if 0 < value < 10 or 99 < value < 100 else f"{value:.0f}"


def percent(rate: float) -> str:
    """A rate in percent, the sign held to its number by a no-break space."""
    return f"{number(rate)}\u00a0%"


def decimal(value: float) -> str:
    """A number such as a perplexity: one decimal, or none from a thousand on."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def columns_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The columns of this run's tables: ``COLUMNS``, without the iterated attack where no state was attacked so."""
    iterated = any(attack["knowledge"] == "iterated" for state in results["states"] for attack in state["attacks"])
    return [column for column in COLUMNS if iterated or column[1] != "iterated"]


def further_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Set and knowledge of every attack beside ``COLUMNS`` that any state was under, kind by kind."""
    attacks = [(attack["set"], attack["knowledge"]) for state in results["states"] for attack in state["attacks"]]
    return [one for kind in FURTHER for one in dict.fromkeys(attacks) if one[1] == kind]


def attack_title(which: str, knowledge: str) -> str:
    """For example ``FULL adaptive``; knowledge that goes without saying is not said."""
    if knowledge == "rival":
        return f"neurons found by {which}"
    if knowledge == "curve":
        return f"{100 * float(which):.3g} % pruned"
    plain = which if knowledge in ("none", "control", "input") else f"{which} {knowledge}"
    return TITLES.get((which, knowledge), plain)


def same_as_static(state: dict[str, Any], knowledge: str) -> bool:
    """Whether an adaptive attack on ``state`` is its static one: static sets were found on the base model itself."""
    return knowledge == "adaptive" and state["round"] == 0


def attack_of(state: dict[str, Any], which: str, knowledge: str) -> dict[str, Any] | None:
    """The attack on ``state`` with this set and knowledge, or None if it was not run."""
    wanted = "static" if same_as_static(state, knowledge) else knowledge
    found = [attack for attack in state["attacks"] if (attack["set"], attack["knowledge"]) == (which, wanted)]
    return found[0] if found else None


def judged_share(attack: dict[str, Any] | None, kind: str, verdict: str) -> Share | None:
    """Share of ``verdict`` among the judged ``kind`` answers; None if not run or if no answer could be judged."""
    counts = attack[kind] if attack else None
    total = judged_count(counts) if counts else 0
    if not counts or total <= 0 or counts["rate"] is None:
        return None
    return Share(counts[verdict], total, counts["rate"], counts["low"], counts["high"])


def success_of(attack: dict[str, Any] | None) -> Share | None:
    """Attack success rate: the share of harmful requests that the model complied with."""
    return judged_share(attack, "harmful", "complied")


def refusal_of(attack: dict[str, Any] | None) -> Share | None:
    """Over-refusal: the share of benign requests that the model refused."""
    return judged_share(attack, "benign", "refused")


def judged_count(counts: dict[str, Any]) -> int:
    """Number of answers on which the judge had an opinion."""
    return int(counts["n"] - counts["cannot say"])


def incoherent_share(attack: dict[str, Any] | None) -> float | None:
    """Share of incoherent text among the judged answers to harmful requests; None if there is none to judge."""
    if attack is None or judged_count(attack["harmful"]) <= 0:
        return None
    return float(attack["harmful"]["incoherent"] / judged_count(attack["harmful"]))


def joined_words(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last
