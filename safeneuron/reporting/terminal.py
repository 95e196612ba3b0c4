"""The result table of a run for a terminal: as lines for a pipe, or as a grid to be drawn to the terminal's width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from safeneuron.reporting.results import attack_of, attack_title, columns_of, further_of, number, success_of


class Grid(NamedTuple):
    """A table for a terminal, which knows its own width: what it shows, its header and rows, and a last remark."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def grid_of(results: dict[str, Any]) -> Grid:
    """The result table of a run with its intervals, one row an attack."""
    states = results["states"]
    rows = []
    for column in [*columns_of(results), *further_of(results)]:
        shares = [success_of(attack_of(state, *column)) for state in states]
        cells = ["-" if s is None else f"{number(s.rate)} ({number(s.low)}-{number(s.high)})" for s in shares]
        if any(shares):
            rows.append([attack_title(*column), *cells])
    title = f"Attack success of {results['model']}: harmful requests complied with, in %, and 95 % intervals"
    note = "; ".join(f"{state['name']}: {state['label']}" for state in states)
    note += ". Over-refusal, incoherent answers and perplexity stand in the report."
    return Grid(title, ["pruned", *(state["name"] for state in states)], rows, note)


def result_table(results: dict[str, Any]) -> Iterator[str]:
    """The attack table of a run, in lines that fit a terminal: ASR in per cent, one line a state."""
    columns = columns_of(results)
    titles = {"iterated": "iterated", "control": "random"}
    names = [state["label"] for state in results["states"]]
    width = max(map(len, names)) + 2
    yield f"ASR in % of {results['model']}: harmful test prompts that are answered, by neurons pruned"
    yield f"{'':<{width}}{'':>9}{'static':^27}{'adaptive':^27}"
    yield f"{'':<{width}}" + "".join(f"{titles.get(knowledge, name):>9}" for name, knowledge in columns)
    for name, state in zip(names, results["states"], strict=True):
        cells = []
        for column in columns:
            share = success_of(attack_of(state, *column))
            cells.append(f"{'-' if share is None else format(100 * share.rate, '.0f'):>9}")
        yield f"{name:<{width}}" + "".join(cells)
    others = further_of(results)
    if others:
        yield "other attacks, in the order of the states above"
    for column in others:
        shares = [success_of(attack_of(state, *column)) for state in results["states"]]
        rates = "".join(f"{'-' if share is None else format(100 * share.rate, '.0f'):>9}" for share in shares)
        yield f"{attack_title(*column):<{max(width, 56)}}{rates}"
    yield "intervals, over-refusal, incoherent answers and perplexity stand in the report"
