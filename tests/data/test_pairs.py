"""The forms of pairs: what is read of each row, what is left out or refused; the mix of safety and general pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.data.pairs import (
    BOTH_KINDS,
    EMPTY,
    EQUAL,
    NO_CONVERSATION,
    NOT_SAFE_OVER_UNSAFE,
    ONE_KIND,
    OPENINGS,
    left_out,
    mix,
    pairs_in,
    read_pairs,
)
from safeneuron.data.rows import Row, Source
from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from tests.helpers.records import assistant, message_of, user, write

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
    assert "'image' must be the path of an image, found 7" in refused([row | {"image": 7}])
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


# Pairs.


def test_pairs_of_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "So.", "rejected": word} for word in ("No.", "So.", "Never.")]
    path = write(tmp_path / "p.jsonl", *rows)
    first, second = read_pairs(path)
    assert first == Pair((user("Why?"),), "So.", "No.", str(path))
    assert second.rejected == "Never.", "the row in between has two equal answers"
    assert read_pairs(path, count=2) == [first, second], "count counts pairs, not rows"
    assert read_pairs(Source(str(path), count=1)) == [first]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [SYSTEM, user("Why?")], "chosen": "So.", "rejected": "No."}, [SYSTEM, user("Why?")]),
        ({"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}, [user("Why?")]),
        ({"prompt": "Why?", "chosen": [assistant("So.")], "rejected": [assistant("No.")]}, [user("Why?")]),
        (
            {
                "prompt": "Why?",
                "prompt_id": "1",
                "score_chosen": 8.0,
                "score_rejected": 7.0,
                "messages": [],
                "chosen": [user("Why?"), assistant("So.")],
                "rejected": [user("Why?"), assistant("No.")],
            },
            [user("Why?")],
        ),
        (
            {
                "chosen": [SYSTEM, user("Hi."), assistant("Hi."), user("Why?"), assistant("So.")],
                "rejected": [SYSTEM, user("Hi."), assistant("Hi."), user("Why?"), assistant("No.")],
            },
            [SYSTEM, user("Hi."), assistant("Hi."), user("Why?")],
        ),
        (
            {
                "prompt": [user("Why?")],
                "chosen": [user("Why?"), assistant("So.")],
                "rejected": [user("Why?"), assistant("No.")],
            },
            [user("Why?")],
        ),
        (
            {
                "prompt": [user("Hi.")],
                "chosen": [assistant("Hi."), user("Why?"), assistant("So.")],
                "rejected": [assistant("Hi."), user("Why?"), assistant("No.")],
            },
            [user("Hi."), assistant("Hi."), user("Why?")],
        ),
        (
            {"prompt": "Why?", "chosen": [SYSTEM, assistant("So.")], "rejected": [SYSTEM, assistant("No.")]},
            [SYSTEM, user("Why?")],
        ),
    ],
    ids=["prompt list", "answer lists", "prompt text", "ultrafeedback", "implicit", "repeated", "continued", "system"],
)
def test_pairs_of_conversations(tmp_path: Path, row: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    path = write(tmp_path / "p.jsonl", row)
    assert read_pairs(path) == [Pair(tuple(prompt), "So.", "No.", str(path))]


def safe_rlhf(safer: Any, *safe: Any) -> dict[str, Any]:
    return {
        "prompt": "Why?",
        "response_0": "zero",
        "response_1": "one",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": 0,
        "safer_response_id": safer,
    }


def test_safe_rlhf_keeps_only_safe_over_unsafe(tmp_path: Path) -> None:
    rows = [
        safe_rlhf(1, False, True),
        safe_rlhf(0, True, False),
        safe_rlhf(0, True, True),
        safe_rlhf(1, False, False),
        safe_rlhf(0, False, True),
    ]
    pairs = read_pairs(write(tmp_path / "p.jsonl", *rows))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("one", "zero"), ("zero", "one")]
    assert pairs[0].prompt == (user("Why?"),)
    assert "no usable pair" in message_of(read_pairs, write(tmp_path / "p.jsonl", *rows[2:]))


def test_safe_rlhf_as_csv(tmp_path: Path) -> None:
    row = safe_rlhf("1", "False", "True")
    path = tmp_path / "p.csv"
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n", "utf-8")
    assert [(pair.chosen, pair.rejected) for pair in read_pairs(path)] == [("one", "zero")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "chosen": "", "rejected": "No."}, "'chosen' is empty"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": 3}, "'rejected' must be text, found 3"),
        ({"prompt": "", "chosen": "So.", "rejected": "No."}, "'prompt' is empty"),
        ({"chosen": "So.", "rejected": "No."}, "no column 'prompt'"),
        ({"prompt": "Why?", "chosen": "So."}, "no column 'rejected'"),
        ({"prompt": [SYSTEM], "chosen": "So.", "rejected": "No."}, "must hold a message of the role 'user'"),
        (
            {"prompt": "Why?", "chosen": [user("So.")], "rejected": "No."},
            "must end in a message of the role 'assistant'",
        ),
        ({"prompt": "Why?", "chosen": [], "rejected": "No."}, "must end in a message of the role 'assistant'"),
        ({"prompt": "Why?", "chosen": [assistant(" ")], "rejected": "No."}, "'chosen' is empty"),
        (
            {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("How?"), assistant("No.")]},
            "the same conversation up to their last message",
        ),
    ],
)
def test_mistakes_in_pairs(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, row)
    message = message_of(read_pairs, path)
    assert message.startswith(f"{path} line 2: ")
    assert reason in message


def test_mistakes_in_safe_rlhf_labels(tmp_path: Path) -> None:
    for row in (safe_rlhf(2, False, True), safe_rlhf(0, True, "perhaps")):
        message = message_of(read_pairs, write(tmp_path / "p.jsonl", safe_rlhf(0, True, False), row))
        assert "p.jsonl line 2" in message
        assert "must be true, false, 0 or 1" in message


def test_unknown_form_of_pairs(tmp_path: Path) -> None:
    message = message_of(read_pairs, write(tmp_path / "p.jsonl", {"question": "Why?", "good": "So.", "bad": "No."}))
    for words in ("p.jsonl line 1", "question, good, bad", "prompt, chosen, rejected", "PKU-SafeRLHF"):
        assert words in message
    assert "'column' has no meaning" in message_of(read_pairs, Source("p.jsonl", column="question"))


def test_empty_answers_of_the_hub_are_dropped(hub: dict[str, Any]) -> None:
    rejected = [user("Why?"), assistant("No.")]
    hub["rows"] = [
        {"prompt": "Why?", "chosen": [user("Why?"), assistant(word)], "rejected": rejected} for word in ("", "So.")
    ]
    assert read_pairs("hub:owner/name", split="train_prefs") == [Pair((user("Why?"),), "So.", "No.", "hub:owner/name")]


# The mix.


def some_pairs(name: str, count: int) -> list[Pair]:
    return [Pair((user(f"{name} {number}"),), "Yes.", "No.", name) for number in range(count)]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.none() | st.integers(1, 90), st.integers(0, 5))
def test_mix_keeps_the_share_repeats_nothing_and_is_as_large_as_can_be(
    safety: int, general: int, share: float, count: int | None, seed: int
) -> None:
    mixed = mix(some_pairs("safety", safety), some_pairs("general", general), share, count, seed)
    size, sources = len(mixed), Counter(pair.source for pair in mixed)
    assert len({pair.prompt[0]["content"] for pair in mixed}) == size
    assert sources["safety"] == int(share * size + 0.5)
    assert count is None or size <= count

    def fits(larger: int) -> bool:
        return int(share * larger + 0.5) <= safety and larger - int(share * larger + 0.5) <= general

    most = count if count is not None else safety + general
    assert not any(fits(larger) for larger in range(size + 1, most + 1))


def test_mix_of_the_paper() -> None:
    safety, general = some_pairs("safety", 50), some_pairs("general", 500)
    mixed = mix(safety, general, 0.3, 100, seed=1)
    assert Counter(pair.source for pair in mixed) == {"safety": 30, "general": 70}
    assert Counter(pair.source for pair in mix(safety, general, 0.3, 1000, seed=1)) == {"safety": 50, "general": 118}
    assert mixed == mix(safety, general, 0.3, 100, seed=1)
    assert mixed != mix(safety, general, 0.3, 100, seed=2)
    assert 0 < sum(pair.source == "safety" for pair in mixed[:30]) < 30, "the two sides must be shuffled together"


def test_mix_leaves_out_repeated_pairs() -> None:
    safety = some_pairs("x", 3)
    general = [Pair(pair.prompt, pair.chosen, pair.rejected, "elsewhere") for pair in some_pairs("x", 6)]
    mixed = mix(safety + safety, general, 0.5, None, seed=0)
    assert len(mixed) == 6
    assert len({pair.prompt[0]["content"] for pair in mixed}) == 6


def test_mix_refuses_what_cannot_be_mixed() -> None:
    pairs = some_pairs("x", 3)
    assert "between 0 and 1, found 30" in message_of(mix, pairs, pairs, 30, None, 0)
    assert "between 0 and 1, found nan" in message_of(mix, pairs, pairs, float("nan"), None, 0)
    assert "count must be at least 1" in message_of(mix, pairs, pairs, 0.3, 0, 0)
    assert "30% of the pairs must be safety pairs, but there are none" in message_of(mix, [], pairs, 0.3, None, 0)
    assert "70% of the pairs must be general pairs" in message_of(mix, pairs, [], 0.3, None, 0)
    assert len(mix(pairs, [], 1.0, None, 0)) == len(mix([], pairs, 0.0, None, 0)) == 3
