"""The result table of a run for a terminal: as lines for a pipe, or as a table to be drawn to the terminal's width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from safeneuron.reporting.formatting import Table, attack_title, number
from safeneuron.reporting.results import RunResults


def terminal_table(results: RunResults) -> Table:
    """The result table of a run with its intervals.

    Args:
        results: The results of a run.

    Returns:
        A row for each attack that any state was under, a column for each state, with a title and a note.
    """
    rows = []
    for column in [*results.columns(), *results.further()]:
        rates = [state.success(*column) for state in results.states]
        cells = ["-" if r is None else f"{number(r.rate)} ({number(r.low)}-{number(r.high)})" for r in rates]
        if any(rates):
            rows.append([attack_title(*column), *cells])
    title = f"Attack success of {results.model}: harmful requests complied with, in %, and 95 % intervals"
    note = "; ".join(f"{state.name}: {state.label}" for state in results.states)
    note += ". Over-refusal, incoherent answers and perplexity stand in the report."
    return Table(["pruned", *(state.name for state in results.states)], rows, title, note)


def result_lines(results: RunResults) -> Iterator[str]:
    """The attack table of a run, in lines that fit a terminal: ASR in per cent, one line a state.

    Args:
        results: The results of a run.

    Yields:
        Each line, without its end.
    """
    columns, states = results.columns(), results.states
    titles = {"iterated": "iterated", "control": "random"}
    width = max(len(state.label) for state in states) + 2

    def rates(attack: tuple[str, str]) -> list[str]:
        known = (state.success(*attack) for state in states)
        return ["-" if rate is None else f"{100 * rate.rate:.0f}" for rate in known]

    yield f"ASR in % of {results.model}: harmful test prompts that are answered, by neurons pruned"
    yield f"{'':<{width}}{'':>9}{'static':^27}{'adaptive':^27}"
    yield _line("", width, [titles.get(knowledge, name) for name, knowledge in columns])
    for state, cells in zip(states, zip(*map(rates, columns), strict=True), strict=True):
        yield _line(state.label, width, cells)
    others = results.further()
    if others:
        yield "other attacks, in the order of the states above"
    for attack in others:
        yield _line(attack_title(*attack), max(width, 56), rates(attack))
    yield "intervals, over-refusal, incoherent answers and perplexity stand in the report"


def _line(name: str, width: int, cells: Iterable[str]) -> str:
    return f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells)
