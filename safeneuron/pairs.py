"""Preference pairs: reading them from wherever they are, and mixing safety pairs with general ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from math import floor
from pathlib import Path

from safeneuron.catalogue import by_name
from safeneuron.data import Pair
from safeneuron.drawing import drawn_pairs
from safeneuron.errors import InputError
from safeneuron.forms import pairs_in
from safeneuron.pictures import digest_of
from safeneuron.rows import Source, as_source, read_rows, refuse_options


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

    Texts and conversations may also have an ``image``: the path of a picture, relative to the file. With ``as_image``
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
        turns = ((message["role"], message["content"]) for message in pair.prompt)
        return (*turns, pair.chosen, pair.rejected, digest_of(pair.image))

    seen = {key(pair) for pair in others}
    kept = {key(pair): pair for pair in pairs if key(pair) not in seen}
    return list(kept.values())
