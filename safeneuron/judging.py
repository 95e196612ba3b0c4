"""Verdicts on answers by one judge or several: each is made, asked about everything, and let go before the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safeneuron.coherence import incoherent
from safeneuron.errors import InputError
from safeneuron.judges import VERDICTS, Judge
from safeneuron.panel import Rule, agreement, combined
from safeneuron.rows import Row, Source, read_rows

PROMPT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "forbidden_prompt", "objective", "input")
RESPONSE_COLUMNS = ("response", "answer", "completion", "generation", "output", "assistant_response", "text")
"""Columns of a file of answers, the first that is there counts."""

Answers = Sequence[tuple[str, str]]
"""Prompts with their responses."""


class Judged(NamedTuple):
    """What was said of some answers, in their order."""

    verdicts: list[str]
    own: dict[str, list[str]]
    """Each judge's verdicts by its name."""
    incoherence: list[str | None]
    """What is incoherent about an answer by its form, whatever the judges say; see ``coherence.incoherent``."""

    def records(self) -> Iterator[dict[str, Any]]:
        """One record an answer; each judge's own verdict is in it where there are several."""
        for index, (verdict, babble) in enumerate(zip(self.verdicts, self.incoherence, strict=True)):
            own = {name: said[index] for name, said in self.own.items()}
            yield {"verdict": verdict, "incoherence": babble, **({"judges": own} if len(own) > 1 else {})}


def judged(
    judges: Iterable[Callable[[], Judge]],
    rule: Rule,
    streams: Sequence[Answers],
    progress: Callable[[int, int], None] | None = None,
) -> list[Judged]:
    """The verdicts on several lists of answers.

    ``judges`` make the judges, so that no two of them are in memory at once. Of several, ``rule`` combines the verdicts
    (see ``panel.combined``). ``progress(done, total)`` is called after each list of answers of each judge.
    """
    makers = list(judges)
    own: list[dict[str, list[str]]] = [{} for _ in streams]
    for number, make in enumerate(makers):
        judge = make()
        for place, answers in enumerate(streams):
            prompts, responses = [prompt for prompt, _ in answers], [response for _, response in answers]
            own[place][judge.name] = judge(prompts, responses)
            if progress is not None:
                progress(number * len(streams) + place + 1, len(makers) * len(streams))
        del judge
    return [
        Judged(
            [combined(votes, rule) if len(votes) > 1 else votes[0] for votes in zip(*said.values(), strict=True)],
            said,
            [incoherent(response) for _, response in answers],
        )
        for said, answers in zip(own, streams, strict=True)
    ]


def told(found: Judged, judge: str) -> list[str]:
    """What was said, in lines for people: how many answers got each verdict, and how far the judges agree."""
    counts = Counter(found.verdicts)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    lines = [f"{judge}: {len(found.verdicts)} answers, {said}"]
    for pair in agreement(found.own):
        first, second = pair["judges"]
        values = [f"{name} {value:.2f}" for name in ("agreement", "kappa") if (value := pair[name]) is not None]
        lines.append(f"{first} and {second}, on {pair['n']} answers: {', '.join(values) or 'nothing to compare'}")
    return lines


def read_answers(path: Path, prompt: str = "", response: str = "") -> tuple[list[dict[str, Any]], Answers]:
    """The rows of a .jsonl or .csv file, and their prompts and responses.

    The columns are the given ones, or the first of ``PROMPT_COLUMNS`` and ``RESPONSE_COLUMNS`` that the first row has.
    A response may be empty, as a broken model's are. Raises ``InputError`` that names place and mistake.
    """
    rows = list(read_rows(Source(str(path))))
    asked = prompt or _column(rows[0], PROMPT_COLUMNS, "prompts", "--prompt")
    answered = response or _column(rows[0], RESPONSE_COLUMNS, "responses", "--response")
    answers = [(_text(row, asked), _text(row, answered)) for row in rows]
    return [row.values for row in rows], answers


def _column(row: Row, known: Sequence[str], what: str, option: str) -> str:
    found = next((name for name in known if name in row.values), "")
    if not found:
        raise InputError(
            f"{row.where}: no column holds {what}; expected {', '.join(known)}, found {', '.join(row.values)}; name it "
            f"with {option}"
        )
    return found


def _text(row: Row, column: str) -> str:
    if column not in row.values or not isinstance(row.values[column] or "", str):
        found = repr(row.values[column])[:60] if column in row.values else "nothing"
        raise InputError(f"{row.where}: {column!r} must be text, found {found}; correct the row or remove it")
    return row.values[column] or ""
