"""Preference pairs: reading the forms in which datasets write them, and mixing safety pairs with general ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from math import floor
from pathlib import Path

from safeneuron.data import Pair
from safeneuron.errors import InputError
from safeneuron.rows import (
    EmptyTextError,
    Message,
    Row,
    Source,
    as_source,
    checked_text,
    messages_at,
    read_rows,
    refuse_options,
    shortened,
    text_at,
    value_at,
)

RESPONSE_COLUMNS = ("response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id")
"""What marks a row as one of PKU-SafeRLHF, beside its ``prompt``."""

FLAGS = {"true": True, "1": True, "false": False, "0": False}
"""How datasets write yes and no; a CSV file holds them as text."""


def read_pairs(
    source: str | Path | Source, *, split: str = "", count: int | None = None, revision: str = ""
) -> list[Pair]:
    """Read the preference pairs of a source; a keyword that is given wins over the field of a ``Source``.

    Three forms are understood, and the first row decides which it is:

    - texts: ``prompt``, ``chosen``, ``rejected``;
    - conversations: ``chosen`` and ``rejected`` are lists of messages that end in the answer and are equal before it,
      with or without a ``prompt`` (text or messages); UltraFeedback-binarized is written like this;
    - PKU-SafeRLHF: two responses with safety labels, of which ``safer_response_id`` is chosen. Rows are kept only when
      the chosen response is safe and the rejected one is not.

    Rows whose chosen and rejected answers are equal are dropped. An empty text in a file is an error; in a Hub dataset,
    which the user cannot edit, its row is dropped. ``count`` keeps the first so many pairs, or all if there are fewer.
    Raises InputError for anything that cannot be read, with file and line number.
    """
    source = as_source(source, split=split, count=count, revision=revision)
    if source.path.startswith("twins:"):
        raise InputError(f"{source.path} holds prompts, not preference pairs; name a file or hub:owner/name instead")
    refuse_options(source, "is read as pairs", {"column": source.column})
    pairs = list(islice(_pairs(read_rows(source), source.path), source.count))
    if not pairs:
        raise InputError(f"{source.path} holds no usable pair: the two answers of a row must differ and not be empty")
    return pairs


def mix(
    safety: Sequence[Pair], general: Sequence[Pair], safety_share: float, count: int | None, seed: int
) -> list[Pair]:
    """Mix safety and general pairs at random, ``safety_share`` of them safety pairs (the paper: 0.3).

    The result has n pairs, of which floor(safety_share * n + 1/2) are safety pairs. n is ``count``, or the largest
    number below it for which both sides have enough different pairs; without ``count``, it is the largest such number.
    So the share is kept and no pair occurs twice. The same arguments give the same pairs in the same order.
    Raises InputError for a share outside 0..1, a count below 1, and a side that is needed but empty.
    """
    if not 0 <= safety_share <= 1:
        raise InputError(f"safety_share must lie between 0 and 1, found {safety_share}")
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1 to mix pairs, found {count}; leave it out to use all that fit")
    safety_side, general_side = _unlike(safety, ()), _unlike(general, safety)
    for name, side, share in (("safety", safety_side, safety_share), ("general", general_side, 1 - safety_share)):
        if share > 0 and not side:
            raise InputError(f"{share:.0%} of the pairs must be {name} pairs, but there are none; change safety_share")
    total = len(safety_side) + len(general_side)
    largest = total if count is None else min(count, total)
    sizes = ((size, floor(safety_share * size + 0.5)) for size in range(largest, -1, -1))
    size, share_size = next((n, s) for n, s in sizes if s <= len(safety_side) and n - s <= len(general_side))
    generator = random.Random(seed)
    mixed = generator.sample(safety_side, share_size) + generator.sample(general_side, size - share_size)
    generator.shuffle(mixed)
    return mixed


def _unlike(pairs: Iterable[Pair], others: Iterable[Pair]) -> list[Pair]:
    """Return each different pair once, without those among ``others``; where they come from makes no difference."""

    def key(pair: Pair) -> tuple[object, ...]:
        return (*((message["role"], message["content"]) for message in pair.prompt), pair.chosen, pair.rejected)

    seen = {key(pair) for pair in others}
    kept = {key(pair): pair for pair in pairs if key(pair) not in seen}
    return list(kept.values())


def _pairs(rows: Iterator[Row], source: str) -> Iterator[Pair]:
    first = next(rows)
    convert = _form(first)
    for row in chain([first], rows):
        try:
            pair = convert(row, source)
        except EmptyTextError:
            if row.mendable:
                raise
            continue
        if pair is not None and pair.chosen != pair.rejected:
            yield pair


def _form(row: Row) -> Callable[[Row, str], Pair | None]:
    """Return the function that reads rows of this form."""
    if {"chosen", "rejected"} <= row.values.keys():
        return _labelled_pair
    if set(RESPONSE_COLUMNS) <= row.values.keys():
        return _safe_rlhf_pair
    raise InputError(
        f"{row.where}: the columns {', '.join(row.values)} are no preference pairs; expected prompt, chosen, rejected "
        f"(texts or lists of messages), or those of PKU-SafeRLHF: prompt, {', '.join(RESPONSE_COLUMNS)}"
    )


def _labelled_pair(row: Row, source: str) -> Pair:
    chosen_before, chosen = _answer(row, "chosen")
    rejected_before, rejected = _answer(row, "rejected")
    if chosen_before != rejected_before:
        raise InputError(
            f"{row.where}: 'chosen' and 'rejected' must be the same conversation up to their last message, "
            f"found {shortened(repr(chosen_before))} and {shortened(repr(rejected_before))}"
        )
    return Pair(_conversation(row, chosen_before), chosen, rejected, source)


def _answer(row: Row, column: str) -> tuple[tuple[Message, ...], str]:
    """Return the messages before an answer (none when the column is text) and the answer."""
    if not isinstance(value_at(row, column), list):
        return (), text_at(row, column)
    messages = messages_at(row, column)
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(f"{row.where}: '{column}' must end in a message of the role 'assistant'")
    return messages[:-1], checked_text(row, column, messages[-1]["content"])


def _conversation(row: Row, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation up to the answer from ``prompt`` and from what stands ``before`` the answer.

    Datasets put it in either or repeat it in both; it must come out once.
    """
    if any(message["role"] == "user" for message in before) and not isinstance(row.values.get("prompt"), list):
        return before
    if not isinstance(value_at(row, "prompt"), list):
        return (*before, {"role": "user", "content": text_at(row, "prompt")})
    prompt = messages_at(row, "prompt")
    if not any(message["role"] == "user" for message in (*prompt, *before)):
        raise InputError(f"{row.where}: 'prompt' must hold a message of the role 'user'")
    return before if before[: len(prompt)] == prompt else prompt + before


def _safe_rlhf_pair(row: Row, source: str) -> Pair | None:
    """Return the pair of a PKU-SafeRLHF row, or None when it does not tell a safe answer from an unsafe one."""
    safer = int(_flag(row, "safer_response_id"))
    if not _flag(row, f"is_response_{safer}_safe") or _flag(row, f"is_response_{1 - safer}_safe"):
        return None
    prompt: Message = {"role": "user", "content": text_at(row, "prompt")}
    return Pair((prompt,), text_at(row, f"response_{safer}"), text_at(row, f"response_{1 - safer}"), source)


def _flag(row: Row, column: str) -> bool:
    value = value_at(row, column)
    text = str(value).strip().casefold()
    if text not in FLAGS:
        raise InputError(f"{row.where}: '{column}' must be true, false, 0 or 1, found {shortened(repr(value))}")
    return FLAGS[text]
