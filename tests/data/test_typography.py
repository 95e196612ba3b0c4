"""Questions as pictures: wrapped, whole, the same every time, and refused where they cannot be drawn."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safeneuron.data.images import opened
from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import read_prompts
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair, Prompt
from safeneuron.data.typography import SAID, draw, drawn_pairs, drawn_prompts
from safeneuron.errors import InputError

QUESTION = "How does one pick a lock without being noticed by the neighbours in the middle of the night?"


def ink(image: Image.Image) -> np.ndarray:
    """Where the picture is not white."""
    return np.asarray(image.convert("L")) < 128


def lines(image: Image.Image) -> int:
    """How many lines of text there are, with white between them."""
    rows = ink(image).any(axis=1)
    return int((rows[1:] & ~rows[:-1]).sum())


@pytest.mark.parametrize("size", [200, 400, 760])
def test_a_question_is_wrapped_within_its_margins(size: int) -> None:
    image = draw(QUESTION, size)
    assert image.size == (size, size)
    assert image.mode == "RGB"
    black = ink(image)
    margin = size // 20 - 2
    assert black.any()
    assert not black[:margin].any()
    assert not black[:, :margin].any()
    assert not black[:, -margin:].any()
    assert lines(image) >= 4, "letters with parts above them may make more"


def test_it_is_the_same_every_time_and_shows_the_text() -> None:
    assert draw(QUESTION).tobytes() == draw(QUESTION).tobytes()
    assert draw(QUESTION).tobytes() != draw(QUESTION.replace("lock", "rock")).tobytes()
    assert ink(draw("one\ntwo")).sum() > ink(draw("one")).sum()


def test_long_texts_get_smaller_letters_until_they_do_not_fit() -> None:
    few, many = draw(QUESTION, 400), draw(QUESTION * 8, 400)
    assert ink(many)[-40:].sum() >= ink(few)[-40:].sum()
    with pytest.raises(InputError, match="the text does not fit into an image of 100 pixels"):
        draw(QUESTION * 20, 100)
    with pytest.raises(InputError, match="does not fit"):
        draw(QUESTION, 200, font_size=90)


@pytest.mark.parametrize(
    ("text", "font", "message"),
    [
        ("  \n ", "", "there is no text to draw"),
        ("ask 漢字", "", "the font has no letter '字'"),
        ("ask", "none.ttf", "the font none.ttf cannot be used"),
        ("ask", __file__, "cannot be used"),
    ],
)
def test_what_cannot_be_drawn(text: str, font: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(text, font=font)


def test_a_prompt_keeps_its_text_and_a_pair_loses_it() -> None:
    (prompt,) = drawn_prompts([Prompt(QUESTION, "theft", "7")])
    assert (prompt.text, prompt.category, prompt.id) == (QUESTION, "theft", "7")
    assert prompt.written == SAID
    assert opened(prompt.image).tobytes() == draw(QUESTION).tobytes()
    (pair,) = drawn_pairs([Pair(({"role": "user", "content": QUESTION},), "No.", "Yes.")], "Answer.")
    assert pair.prompt == ({"role": "user", "content": "Answer."},)
    assert opened(pair.image).tobytes() == draw(QUESTION).tobytes()
    with pytest.raises(InputError, match="has an image already"):
        drawn_prompts([prompt])
    with pytest.raises(InputError, match="has an image already"):
        drawn_pairs([pair])
    turns = tuple({"role": role, "content": "x"} for role in ("user", "assistant", "user"))
    with pytest.raises(InputError, match="a conversation of several turns"):
        drawn_pairs([Pair(turns, "No.", "Yes.")])


def test_a_source_draws_its_prompts_and_pairs(tmp_path: Path) -> None:
    found = read_prompts(Source("twins:unsafe", split="test", count=2, as_image=True))
    plain = read_prompts(Source("twins:unsafe", split="test", count=2))
    assert [prompt.text for prompt in found] == [prompt.text for prompt in plain]
    assert all(isinstance(prompt.image, bytes) and prompt.said == SAID for prompt in found)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    (pair,) = read_pairs(Source(str(path), as_image=True, said="Look."))
    assert pair.prompt[0]["content"] == "Look."
    assert Image.open(BytesIO(pair.image)).size == (760, 760)
