"""The forms of pairs beyond those in test_data.py: what is read of each row, what is left out, what is refused."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safeneuron.data.pairs import (
    BOTH_KINDS,
    EMPTY,
    EQUAL,
    NO_CONVERSATION,
    NOT_SAFE_OVER_UNSAFE,
    ONE_KIND,
    OPENINGS,
    left_out,
    pairs_in,
    read_pairs,
)
from safeneuron.data.rows import Row
from safeneuron.errors import InputError

TALK = "\n\nHuman: Why?\n\nAssistant: "
LABELLED = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
BEAVER = {"prompt": "Why?", "response": "So.", "is_safe": True}
WILD = {"vanilla": "Why?", "adversarial": "", "completion": "So.", "data_type": "vanilla_benign"}
SAFE_RLHF = {
    "prompt": "Why?",
    "response_0": "So.",
    "response_1": "No.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "safer_response_id": 0,
}


def read(rows: Sequence[dict[str, Any]], mendable: bool = False) -> tuple[list[tuple[str, str]], Counter[str]]:
    dropped: Counter[str] = Counter()
    placed = (Row(f"place {number}", row, mendable) for number, row in enumerate(rows))
    return [(pair.chosen, pair.rejected) for pair in pairs_in(placed, "made", dropped)], dropped


def refused(rows: Sequence[dict[str, Any]], mendable: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        read(rows, mendable)
    return str(caught.value)


# -- transcripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Why?",
        "Human: Why?\n\nAssistant: So.",
        "\n\nAssistant: So.",
        "\n\nHuman: Why?",
        "\n\nHuman: Why?\n\nHuman: Why?\n\nAssistant: So.",
        "\n\nHuman: \n\nAssistant: So.",
        "Before.\n\nHuman: Why?\n\nAssistant: So.",
    ],
)
def test_what_is_no_transcript(text: str) -> None:
    row = {"chosen": text, "rejected": TALK + "No."}
    message = refused([row], mendable=True)
    assert message.startswith("place 0: ")
    assert "no column 'prompt'" in message or "must end in a message of the role 'assistant'" in message
    good = {"chosen": TALK + "So.", "rejected": TALK + "No."}
    assert read([row, good]) == ([("So.", "No.")], {NO_CONVERSATION: 1})


def test_transcripts_that_part_before_their_end_or_end_in_nothing() -> None:
    other = {"chosen": TALK + "So.", "rejected": "\n\nHuman: How?\n\nAssistant: No."}
    assert "same conversation up to their last message" in refused([other], mendable=True)
    empty = {"chosen": TALK, "rejected": TALK + "No."}
    assert "'chosen' is empty" in refused([empty], mendable=True)
    assert read([other, empty]) == ([], {NO_CONVERSATION: 1, EMPTY: 1})


# -- BeaverTails ------------------------------------------------------------------------------------------------------


def beaver(*marks: tuple[str, str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": answer, "is_safe": safe} for prompt, answer, safe in marks]


def test_safe_answers_meet_unsafe_ones_of_their_prompt_once() -> None:
    rows = beaver(
        ("A", "a safe", True),
        ("B", "b unsafe", False),
        ("A", "a unsafe", False),
        ("A", "a safe too", True),
        ("A", "a unsafe too", False),
        ("A", "a third", True),
        ("B", "b safe", True),
        ("C", "c safe", True),
    )
    pairs, dropped = read(rows)
    assert pairs == [("a safe", "a unsafe"), ("a safe too", "a unsafe too"), ("b safe", "b unsafe")]
    assert dropped == {ONE_KIND: 2}


def test_an_answer_that_is_called_both_is_neither() -> None:
    rows = beaver(
        ("A", "odd", True), ("A", "bad", False), ("A", "odd", False), ("A", "good", True), ("A", "bad", False)
    )
    assert read(rows) == ([("good", "bad")], {BOTH_KINDS: 2})


def test_labels_and_texts_that_are_none() -> None:
    assert "'is_safe' must be true, false, 0 or 1, found 'perhaps'" in refused(beaver(("A", "x", "perhaps")))
    assert "'response' is empty" in refused(beaver(("A", "", True)), mendable=True)
    rows = beaver(("A", "", True), ("A", "good", "True"), ("A", "bad", "false"))
    assert read(rows) == ([("good", "bad")], {EMPTY: 1})


# -- WildJailbreak ----------------------------------------------------------------------------------------------------


def wild(kind: str, request: str) -> dict[str, Any]:
    style = kind.split("_")[0]
    return {"vanilla": "", "adversarial": "", style: request, "completion": "Mine.", "data_type": kind}


def test_the_made_answer_depends_on_the_request_alone_and_varies() -> None:
    rows = [wild("adversarial_harmful", f"request {number}") for number in range(60)]
    pairs, dropped = read(rows)
    assert {chosen for chosen, _ in pairs} == {"Mine."}
    assert {rejected for _, rejected in pairs} == set(OPENINGS)
    assert read(rows[::-1])[0] == pairs[::-1]
    assert not dropped
    benign, _ = read([wild("vanilla_benign", f"request {number}") for number in range(60)])
    assert len({rejected for _, rejected in benign}) > 10


def test_kinds_that_are_not_known() -> None:
    assert "'data_type' must be vanilla or adversarial" in refused([WILD | {"data_type": "vanilla_odd"}])
    assert "'vanilla' is empty" in refused([WILD | {"vanilla": ""}], mendable=True)
    assert read([WILD | {"adversarial": None}, WILD | {"completion": None}])[1] == {EMPTY: 1}


# -- every form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [LABELLED, BEAVER, WILD, SAFE_RLHF])
@pytest.mark.parametrize("second", [LABELLED, BEAVER, WILD, SAFE_RLHF])
def test_rows_of_different_forms(first: dict[str, Any], second: dict[str, Any]) -> None:
    if first is second:
        read([first, second])
    else:
        message = refused([first, second])
        assert message.startswith("place 1: this row is in the form '")
        assert "but place 0 in the form '" in message
        assert "make one file of each" in message


def test_images() -> None:
    row = {"image": "photo.png", "question": "Why?", "chosen": "So.", "rejected": "No."}
    assert refused([row]).startswith("place 0: the image")
    assert "photo.png does not exist" in refused([row])
    assert "'image' must be the path of a picture, found 7" in refused([row | {"image": 7}])
    assert "'image' is empty" in refused([row | {"image": ""}], mendable=True)


def test_unknown_columns_name_what_is_known() -> None:
    message = refused([{"question": "Why?", "good": "So."}])
    for words in ("place 0", "question, good", "prompt, chosen, rejected", "BeaverTails: prompt, response, is_safe"):
        assert words in message


def test_reasons_are_counted_and_told(tmp_path: Path) -> None:
    both = SAFE_RLHF | {"is_response_1_safe": True}
    same = SAFE_RLHF | {"response_1": "So."}
    assert read([SAFE_RLHF, both, same, both]) == ([("So.", "No.")], {NOT_SAFE_OVER_UNSAFE: 2, EQUAL: 1})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (both, same, both)), encoding="utf-8")
    dropped: Counter[str] = Counter()
    with pytest.raises(InputError) as caught:
        read_pairs(path, dropped=dropped)
    told = "3 rows were left out, 2 without a safe answer against an unsafe one, 1 with equal answers"
    assert f"{path} holds no usable pair: {told}; use another" in str(caught.value)
    assert left_out(Counter({NOT_SAFE_OVER_UNSAFE: 2, EQUAL: 1})) == told
