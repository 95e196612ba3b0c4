"""Numbers, rates and attacks as text: how a report writes each of them, everywhere in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from safeneuron.evaluation.rates import Rate

NOTHING = "\u2013"
"""What stands in a table where nothing was measured."""
TITLES = {
    ("mean", "operator"): "FULL held at its harmless mean",
    ("opposite", "operator"): "FULL held at minus its harmful mean",
    ("FULL", "transfer"): "neurons of another model",
    ("direction", "model"): "refusal direction projected out",
    ("fine-tune", "model"): "fine-tuned by a LoRA adapter",
}


class Table(NamedTuple):
    """A table as text: its header and rows, and where it stands alone what it shows and a last remark."""

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""


def number(rate: float) -> str:
    """A rate in percent without its sign; near 0 % and 100 % with a decimal, lest 1 of 313 reads as none."""
    value = 100 * rate
    return f"{value:.1f}" if 0 < value < 10 or 99 < value < 100 else f"{value:.0f}"


def percent(rate: float) -> str:
    """A rate in percent, the sign held to its number by a no-break space."""
    return f"{number(rate)}\u00a0%"


def interval(rate: Rate) -> str:
    """Both ends of a rate's interval with a dash between them and one percent sign."""
    return f"{number(rate.low)}\u2013{percent(rate.high)}"


def with_interval(rate: float, low: float, high: float) -> str:
    """A rate and its interval in brackets, each with its sign."""
    return f"{percent(rate)} ({percent(low)} to {percent(high)})"


def in_words(rate: Rate) -> str:
    """A rate, and its interval in brackets, for a sentence."""
    return f"{percent(rate.rate)} ({number(rate.low)} to\u00a0{percent(rate.high)})"


def decimal(value: float) -> str:
    """A number such as a perplexity: one decimal, or none from a thousand on."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def p_value(p: float) -> str:
    """A p-value in three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def attack_title(which: str, knowledge: str) -> str:
    """For example ``FULL adaptive``; knowledge that goes without saying is not said.

    Args:
        which: The neurons pruned, or the name of another attack.
        knowledge: What the attacker knew.

    Returns:
        A few words.
    """
    if knowledge == "rival":
        return f"neurons found by {which}"
    if knowledge == "curve":
        return f"{100 * float(which):.3g} % pruned"
    plain = which if knowledge in ("none", "control", "input") else f"{which} {knowledge}"
    return TITLES.get((which, knowledge), plain)


def joined_words(parts: Iterable[str]) -> str:
    """``a, b and c``.

    Args:
        parts: At least one word.

    Returns:
        The words with commas, and an ``and`` before the last.
    """
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last
