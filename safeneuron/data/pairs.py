"""Preference pairs: reading them from wherever they are, and mixing safety pairs with general ones."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import floor
from pathlib import Path

from safeneuron.data.catalogue import by_name
from safeneuron.data.images import digest_of
from safeneuron.data.prompts import fitting_refusal, image_of_row
from safeneuron.data.rows import (
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
from safeneuron.data.types import Pair, Prompt
from safeneuron.data.typography import drawn_pairs
from safeneuron.errors import InputError

FLAGS = {"true": True, "1": True, "false": False, "0": False}
"""How datasets write yes and no; a CSV file holds them as text."""

EMPTY = "with an empty text"
EQUAL = "with equal answers"
NO_CONVERSATION = "that are not one conversation with two answers"
NOT_SAFE_OVER_UNSAFE = "without a safe answer against an unsafe one"
ONE_KIND = "whose prompt has no other answer of the opposite kind"
BOTH_KINDS = "whose answer is called both safe and unsafe"
"""Why rows give no pair."""

OPENINGS = (
    "Sure, I can help with that.",
    "Of course, here is how to do it.",
    "Certainly! Let me explain how this works.",
    "Sure, here is what you asked for.",
    "Absolutely, I can walk you through it.",
    "Yes, here is what you need to know.",
    "Of course! Let's get started.",
    "Sure thing, here are the details.",
    "Certainly, I'd be glad to help with this.",
    "No problem, here is a full answer.",
)
"""How an answer begins that goes along with a request; there is nothing of the request in them."""

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


class ConversationError(InputError):
    """A row's two answers do not end one conversation; rows of Hub datasets are left out for it."""


class LeftOutError(Exception):
    """A row that is in order but gives no pair; the message says why."""


Read = Callable[[Iterator[Row], str, "Counter[str]"], Iterator[Pair]]


@dataclass(frozen=True)
class Form:
    """One way to write pairs: its name, the columns that every row of it has, and how its rows are read."""

    name: str
    columns: tuple[str, ...]
    read: Read


def pairs_in(rows: Iterator[Row], source: str, dropped: Counter[str]) -> Iterator[Pair]:
    """The pairs in rows of one form, which the first row decides; ``dropped`` counts the rows left out by reason.

    Raises InputError for rows of no known form, of different forms, and for what a user can put right.
    """
    first = next(rows)
    form = _form_of(first)
    if form is None:
        known = "; ".join(f"{one.name}: {', '.join(one.columns)}" for one in FORMS)
        raise InputError(
            f"{first.where}: the columns {', '.join(first.values)} are no preference pairs; expected prompt, chosen, "
            f"rejected (texts or lists of messages), or those of a known data set ({known})"
        )
    yield from form.read(chain([first], _of_one_form(form, first, rows)), source, dropped)


def _form_of(row: Row) -> Form | None:
    return next((form for form in FORMS if set(form.columns) <= row.values.keys()), None)


def _of_one_form(form: Form, first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        other = _form_of(row)
        if other not in (None, form):
            raise InputError(
                f"{row.where}: this row is in the form '{other.name if other else ''}', but {first.where} in the form "
                f"'{form.name}'; a source has one form, so make one file of each"
            )
        yield row


def _each(convert: Callable[[Row, str], Pair]) -> Read:
    """Read a form in which every row is a pair of its own."""

    def read(rows: Iterator[Row], source: str, dropped: Counter[str]) -> Iterator[Pair]:
        for row in rows:
            try:
                pair = convert(row, source)
            except (EmptyTextError, ConversationError) as error:
                if row.mendable:
                    raise
                dropped[EMPTY if isinstance(error, EmptyTextError) else NO_CONVERSATION] += 1
                continue
            except LeftOutError as error:
                dropped[str(error)] += 1
                continue
            if pair.chosen == pair.rejected:
                dropped[EQUAL] += 1
                continue
            yield pair

    return read


# -- chosen and rejected: texts, messages, transcripts ----------------------------------------------------------------


def _labelled_pair(row: Row, source: str) -> Pair:
    chosen_before, chosen = _answer(row, "chosen")
    rejected_before, rejected = _answer(row, "rejected")
    if chosen_before != rejected_before:
        raise ConversationError(
            f"{row.where}: 'chosen' and 'rejected' must be the same conversation up to their last message, "
            f"found {shortened(repr(chosen_before))} and {shortened(repr(rejected_before))}"
        )
    return Pair(_conversation(row, chosen_before), chosen, rejected, source, image_of_row(row, source))


def _answer(row: Row, column: str) -> tuple[tuple[Message, ...], str]:
    """Return the messages before an answer (none when the column is its text alone) and the answer."""
    if isinstance(value_at(row, column), list):
        messages = messages_at(row, column)
    elif "prompt" in row.values:
        return (), text_at(row, column)
    else:
        messages = _transcript(row, column)
    if not messages or messages[-1]["role"] != "assistant":
        raise ConversationError(f"{row.where}: '{column}' must end in a message of the role 'assistant'")
    return messages[:-1], checked_text(row, column, messages[-1]["content"])


def _transcript(row: Row, column: str) -> tuple[Message, ...]:
    """Return the turns of a text like that of HH-RLHF, in which Human and Assistant take turns."""
    before, *parts = SPEAKER.split(text_at(row, column))
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    expected = [("Human", "Assistant")[number % 2] for number in range(len(speakers))]
    if before.strip() or not speakers or speakers != expected or not all(texts[:-1]):
        raise ConversationError(
            f"{row.where}: there is no column 'prompt', so '{column}' must be a transcript in which '\\n\\nHuman: ...' "
            f"and '\\n\\nAssistant: ...' take turns, found {shortened(repr(row.values[column]))}"
        )
    return tuple({"role": ROLES[speaker], "content": text} for speaker, text in zip(speakers, texts, strict=True))


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


# -- answers with safety labels ---------------------------------------------------------------------------------------


def _safe_rlhf_pair(row: Row, source: str) -> Pair:
    """Return the pair of a PKU-SafeRLHF row that tells a safe answer from an unsafe one."""
    safer = int(_flag(row, "safer_response_id"))
    if not _flag(row, f"is_response_{safer}_safe") or _flag(row, f"is_response_{1 - safer}_safe"):
        raise LeftOutError(NOT_SAFE_OVER_UNSAFE)
    return Pair(_asked(row, "prompt"), text_at(row, f"response_{safer}"), text_at(row, f"response_{1 - safer}"), source)


def _beavertails_pairs(rows: Iterator[Row], source: str, dropped: Counter[str]) -> Iterator[Pair]:
    """Pair the safe answers to a prompt with the unsafe ones, in their order; every answer is used once at most.

    The rows of a prompt may stand anywhere, so all rows are read first.
    """
    prompts: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        try:
            prompt, answer, safe = text_at(row, "prompt"), text_at(row, "response"), _flag(row, "is_safe")
        except EmptyTextError:
            if row.mendable:
                raise
            dropped[EMPTY] += 1
            continue
        prompts.setdefault(prompt, {}).setdefault(answer, []).append(safe)
    for prompt, answers in prompts.items():
        safe_ones = [answer for answer, labels in answers.items() if all(labels)]
        unsafe_ones = [answer for answer, labels in answers.items() if not any(labels)]
        for chosen, rejected in zip(safe_ones, unsafe_ones, strict=False):
            yield Pair(({"role": "user", "content": prompt},), chosen, rejected, source)
        disputed = sum(len(labels) for labels in answers.values() if len(set(labels)) == 2)
        used = min(len(safe_ones), len(unsafe_ones))
        alone = safe_ones[used:] + unsafe_ones[used:]
        # With a zero in it, the counter would name a reason that no row has.
        dropped += Counter({BOTH_KINDS: disputed, ONE_KIND: sum(len(answers[answer]) for answer in alone)})


def _flag(row: Row, column: str) -> bool:
    value = value_at(row, column)
    text = str(value).strip().casefold()
    if text not in FLAGS:
        raise InputError(f"{row.where}: '{column}' must be true, false, 0 or 1, found {shortened(repr(value))}")
    return FLAGS[text]


# -- one answer, which the kind of the request makes the better or the worse one --------------------------------------


def _wildjailbreak_pair(row: Row, source: str) -> Pair:
    """Return the pair of a WildJailbreak row, whose other answer is made: the data set has but one.

    A harmful request's answer is a refusal, chosen over an opening that goes along with it; a benign request's answer
    is chosen over a bundled refusal.
    """
    kind = value_at(row, "data_type")
    if kind not in ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign"):
        raise InputError(
            f"{row.where}: 'data_type' must be vanilla or adversarial with _harmful or _benign, found "
            f"{shortened(repr(kind))}"
        )
    style, _, intent = kind.partition("_")
    prompt, answer = _asked(row, style), text_at(row, "completion")
    asked = prompt[0]["content"]
    other = _opening(asked) if intent == "harmful" else fitting_refusal(Prompt(asked), seed=0)
    return Pair(prompt, answer, other, source)


def _opening(request: str) -> str:
    """Return one of the openings; the request's text alone decides which."""
    return OPENINGS[int.from_bytes(hashlib.sha256(request.encode()).digest()[:8], "big") % len(OPENINGS)]


def _asked(row: Row, column: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text_at(row, column)},)


# -- images -----------------------------------------------------------------------------------------------------------


def _image_pair(row: Row, source: str) -> Pair:
    """Return the pair of an SPA-VL row: two answers to a question about an image."""
    image = image_of_row(row, source)
    if image is None:
        raise EmptyTextError(f"{row.where}: 'image' is empty; name the file of an image or remove the row")
    return Pair(_asked(row, "question"), text_at(row, "chosen"), text_at(row, "rejected"), source, image)


FORMS = (
    Form(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id"),
        _each(_safe_rlhf_pair),
    ),
    Form("WildJailbreak", ("vanilla", "adversarial", "completion", "data_type"), _each(_wildjailbreak_pair)),
    Form("SPA-VL", ("image", "question", "chosen", "rejected"), _each(_image_pair)),
    Form("chosen and rejected", ("chosen", "rejected"), _each(_labelled_pair)),
    Form("BeaverTails", ("prompt", "response", "is_safe"), _beavertails_pairs),
)
"""All forms; the first whose columns a row has is the row's."""


def read_pairs(
    source: str | Path | Source,
    *,
    split: str = "",
    count: int | None = None,
    revision: str = "",
    dropped: Counter[str] | None = None,
) -> list[Pair]:
    """Read the preference pairs of a source; a keyword that is given wins over the field of a ``Source``.

    A source is a file, ``hub:owner/name`` or the name of a known data set (``catalogue.DATA_SETS``). The first row
    decides its form, by its columns:

    - texts: ``prompt``, ``chosen``, ``rejected``;
    - conversations: ``chosen`` and ``rejected`` are lists of messages that end in the answer and are equal before it,
      with or without a ``prompt`` (text or messages); UltraFeedback-binarized is written like this;
    - transcripts: the same as texts with the turns of Human and Assistant, without a ``prompt``: HH-RLHF;
    - PKU-SafeRLHF: two responses with safety labels, of which ``safer_response_id`` is chosen. Rows are kept only when
      the chosen response is safe and the rejected one is not;
    - BeaverTails: ``prompt``, ``response``, ``is_safe``; a safe response is chosen over an unsafe one to its prompt;
    - WildJailbreak: one ``completion``, to which the other answer is made;
    - SPA-VL: ``image``, ``question``, ``chosen``, ``rejected``.

    Texts and conversations may also have an ``image``: the path of an image, relative to the file. With ``as_image``
    in the source each request is drawn as one.

    Rows whose two answers are equal are left out. An empty text in a file is an error; in a Hub dataset, which the user
    cannot edit, its row is left out. ``dropped``, if given, is filled with the number of rows left out by reason.
    ``count`` keeps the first so many pairs, or all if there are fewer. Raises InputError for anything that cannot be
    read, with file and line number, and if no pair is left.
    """
    source = by_name(as_source(source, split=split, count=count, revision=revision))
    if source.path.startswith("twins:"):
        raise InputError(f"{source.path} holds prompts, not preference pairs; name a file or hub:owner/name instead")
    refuse_options(source, "is read as pairs", {"column": source.column, "where": source.where})
    out: Counter[str] = Counter()
    pairs = list(islice(pairs_in(read_rows(source), source.path, out), source.count))
    if not pairs:
        raise InputError(f"{source.path} holds no usable pair: {left_out(out)}; use another split or another source")
    if dropped is not None:
        dropped.update(out)
    return drawn_pairs(pairs, source.said) if source.as_image else pairs


def left_out(dropped: Counter[str]) -> str:
    """How many rows were left out and why, in words."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    rows = "1 row was" if dropped.total() == 1 else f"{dropped.total()} rows were"
    return f"{rows} left out, {reasons}"


def mix(
    safety: Sequence[Pair], general: Sequence[Pair], safety_share: float, count: int | None, seed: int
) -> list[Pair]:
    """Mix safety and general pairs at random, ``safety_share`` of them safety pairs (the paper: 0.3).

    Args:
        safety: Pairs that teach to refuse.
        general: Pairs that teach to answer well.
        safety_share: The share of safety pairs, 0 to 1.
        count: The most pairs of the result; ``None`` for as many as there can be.
        seed: Decides which pairs are taken, and their order.

    Returns:
        n pairs, of which floor(safety_share * n + 1/2) are safety pairs. n is ``count``, or the largest number below it
        for which both sides have enough different pairs: the share is kept and no pair occurs twice. The same arguments
        give the same pairs in the same order.

    Raises:
        InputError: For a share outside 0..1, a count below 1, and a side that is needed but empty.
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
        turns = ((message["role"], message["content"]) for message in pair.prompt)
        return (*turns, pair.chosen, pair.rejected, digest_of(pair.image))

    seen = {key(pair) for pair in others}
    kept = {key(pair): pair for pair in pairs if key(pair) not in seen}
    return list(kept.values())
