"""Answers as a reader may see them: masked unless asked for, and packed for the page's response browser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safeneuron.shares import attack_title

LONGEST = 20_000
"""Characters of one answer in the page."""
ROOM = 15_000_000
"""Bytes of all answers in the page; where they take more, each is cut, so that a page can still be sent by mail."""


def masked(text: str) -> tuple[str, int]:
    """The first words of a response and the number of characters held back.

    At most three words, 24 characters and half of the text, so that a short answer or one without spaces is masked too.
    """
    text = text.strip()
    opening = " ".join(text.split()[:3])[: min(24, len(text) // 2)].rstrip()
    return opening, len(text) - len(opening)


def shown(examples: Iterable[dict[str, Any]], show_text: bool) -> dict[str, list[dict[str, Any]]]:
    """Examples by state and attack as a reader may see them.

    Without ``show_text`` the response is cut here, before any template sees it.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        opening, hidden = (example["response"], 0) if show_text else masked(example["response"])
        title = f"{example['state']}, {attack_title(example['set'], example['knowledge'])}, {example['kind']}"
        kept.setdefault(title, []).append({**example, "response": opening, "hidden": hidden})
    return kept


def packed(responses: Sequence[dict[str, Any]], show_text: bool) -> dict[str, Any]:
    """The answers for the browser: lists of names and prompts, each once, and rows that point into them.

    A row is state, attack, kind, verdict, prompt (all indices), text, and the number of characters that are not there:
    those masked without ``show_text``, or cut where all answers would not find room.
    """
    names: dict[str, dict[str, int]] = {key: {} for key in ("states", "attacks", "kinds", "verdicts", "prompts")}

    def place(key: str, name: str) -> int:
        return names[key].setdefault(name, len(names[key]))

    cut = _cut_to(limit_of(responses)) if show_text else masked
    rows = [
        [
            place("states", response["state"]),
            place("attacks", attack_title(response["set"], response["knowledge"])),
            place("kinds", response["kind"]),
            place("verdicts", response["verdict"]),
            place("prompts", _asked(response)),
            *cut(response["response"]),
        ]
        for response in responses
    ]
    return {**{key: list(found) for key, found in names.items()}, "whole": show_text, "rows": rows}


def _asked(response: dict[str, Any]) -> str:
    """The request, with the name of its image if it had one."""
    return f"{response['prompt']} [image: {response['image']}]" if response.get("image") else str(response["prompt"])


def limit_of(responses: Sequence[dict[str, Any]]) -> int:
    """Characters of one answer for which there is room, the same for all of them."""
    size = sum(len(response["response"].encode()) for response in responses)
    if size <= ROOM:
        return LONGEST
    characters = sum(len(response["response"]) for response in responses)
    return min(LONGEST, int(ROOM / len(responses) * characters / size))


def _cut_to(limit: int) -> Callable[[str], tuple[str, int]]:
    return lambda text: (text[:limit], max(0, len(text) - limit))
