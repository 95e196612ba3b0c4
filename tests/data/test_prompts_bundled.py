"""The bundled prompts keep what their card promises: balanced twins, clean splits, nothing forbidden."""

import json
import re
from collections import Counter
from itertools import combinations

import pytest

from tests import ROOT

FOLDER = ROOT / "safeneuron" / "data" / "bundled"
SPLIT_SIZES = {"discovery": 9, "training": 7, "test": 6}
CLASSES = ("harmful", "harmless")
FORBIDDEN = re.compile(
    r"\b(sex\w*|porn\w*|nud(e|es|ity)|naked|erotic\w*|rap(e|ed|es|ing|ist)|child\w*|kid|kids|teen\w*|minor|minors|bab(y|ies)"
    r"|infants?|toddlers?|boys?|girls?|underage\w*|school\w*|pupils?|sons?|daughters?)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(can't|cannot|won't|will not|not able to|unable to|must decline|to decline|declining|must refuse|refuse to"
    r"|to refuse|must say no|to say no|has to be no|turn this down|not willing to|not something|don't help"
    r"|no help from me)\b",
    re.IGNORECASE,
)


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


TWINS = read("twins.jsonl")
GERMAN = read("twins-de.jsonl")
REFUSALS = read("refusals.jsonl")
CATEGORIES = {twin["category"] for twin in TWINS}


def test_there_are_enough_twins_and_each_has_every_field_filled() -> None:
    assert len(TWINS) >= 200
    assert len(CATEGORIES) >= 10
    for twin in TWINS:
        assert list(twin) == ["id", "category", "split", "harmful", "harmless"]
        assert all(value and value == " ".join(value.split()) for value in twin.values())
        assert re.fullmatch(re.escape(twin["category"]) + r"-\d\d", twin["id"])
    assert len({twin["id"] for twin in TWINS}) == len(TWINS)


def test_every_category_has_the_same_number_of_twins_in_a_split() -> None:
    counts = Counter((twin["category"], twin["split"]) for twin in TWINS)
    assert counts == {(category, split): size for category in CATEGORIES for split, size in SPLIT_SIZES.items()}


def test_no_text_occurs_twice() -> None:
    texts = Counter(" ".join(words(twin[name])) for twin in TWINS for name in CLASSES)
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("name", CLASSES)
def test_no_near_duplicate_stands_in_another_split(name: str) -> None:
    """Word overlap (Jaccard) stays below 0.6, the usual line for a near-duplicate; ours stay below 0.5."""
    bags = [(twin["split"], set(words(twin[name])), twin[name]) for twin in TWINS]
    close = [
        (first_text, second_text)
        for (first_split, first, first_text), (second_split, second, second_text) in combinations(bags, 2)
        if first_split != second_split and len(first & second) >= 0.5 * len(first | second)
    ]
    assert close == []


def test_twins_are_of_similar_length() -> None:
    for twin in TWINS:
        lengths = [len(twin[name].split()) for name in CLASSES]
        assert min(lengths) >= 6, twin
        assert max(lengths) <= 25, twin
        assert max(lengths) - min(lengths) <= 0.25 * max(lengths), twin


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_length_does_not_tell_the_class(split: str) -> None:
    chosen = [twin for twin in TWINS if twin["split"] == split]
    harmful, harmless = (sum(len(twin[name].split()) for twin in chosen) / len(chosen) for name in CLASSES)
    assert abs(harmful - harmless) < 0.5


def test_the_first_word_and_the_last_mark_do_not_tell_the_class() -> None:
    assert all(words(twin["harmful"])[0] == words(twin["harmless"])[0] for twin in TWINS)
    assert all(twin["harmful"][-1] == twin["harmless"][-1] and twin["harmful"][-1] in ".?" for twin in TWINS)


def test_openers_are_varied() -> None:
    openers = Counter(words(twin["harmful"])[0] for twin in TWINS)
    assert len(openers) >= 20
    assert max(openers.values()) <= 0.12 * len(TWINS)


def test_no_common_word_tells_the_class() -> None:
    """A neuron that follows one frequent word must not look like a neuron that follows harm."""
    counts = {name: Counter(word for twin in TWINS for word in set(words(twin[name]))) for name in CLASSES}
    for word in counts["harmful"] | counts["harmless"]:
        gap = abs(counts["harmful"][word] - counts["harmless"][word])
        assert gap <= 0.06 * len(TWINS), word


def test_nothing_forbidden_is_asked() -> None:
    assert [twin["id"] for twin in TWINS for name in CLASSES if FORBIDDEN.search(twin[name])] == []


def test_the_forbidden_words_are_found_when_they_occur() -> None:
    assert FORBIDDEN.search("A story about a Teenager")
    assert not FORBIDDEN.search("A story about scraping reasons")


def test_the_german_twins_keep_the_same_promises() -> None:
    english = {twin["id"]: twin for twin in TWINS}
    assert len(GERMAN) == 20
    assert set(Counter(twin["category"] for twin in GERMAN).values()) == {2}
    for twin in GERMAN:
        assert list(twin) == list(TWINS[0])
        assert [twin[name] for name in ("category", "split")] == [
            english[twin["id"]][name] for name in ("category", "split")
        ]
        assert words(twin["harmful"])[0] == words(twin["harmless"])[0]
        assert twin["harmful"][-1] == twin["harmless"][-1] == english[twin["id"]]["harmful"][-1]
        lengths = [len(twin[name].split()) for name in CLASSES]
        assert max(lengths) - min(lengths) <= 0.25 * max(lengths), twin
    means = [sum(len(twin[name].split()) for twin in GERMAN) / len(GERMAN) for name in CLASSES]
    assert abs(means[0] - means[1]) < 0.5


def test_there_are_enough_refusals_for_every_category() -> None:
    counts = Counter(refusal["category"] for refusal in REFUSALS)
    assert len(REFUSALS) >= 60
    assert set(counts) == CATEGORIES | {""}
    assert counts[""] >= 24
    assert min(counts[category] for category in CATEGORIES) >= 3
    assert len({refusal["text"] for refusal in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: str(refusal["text"])[:30])
def test_a_refusal_is_short_and_its_first_sentence_refuses(refusal: dict[str, str]) -> None:
    sentences = re.split(r"(?<=[.?!]) ", refusal["text"])
    assert 12 <= len(refusal["text"].split()) <= 40
    assert len(sentences) <= 2
    assert REFUSAL.search(sentences[0])


def test_refusals_open_in_many_ways() -> None:
    openings = Counter(" ".join(refusal["text"].split()[:4]) for refusal in REFUSALS)
    assert max(openings.values()) <= 4
    assert len(openings) >= 0.8 * len(REFUSALS)


def test_the_benign_text_has_the_promised_length_and_holds_no_prompt() -> None:
    text = (FOLDER / "benign_text.txt").read_text(encoding="utf-8")
    assert 500 <= len(text.split()) <= 600
    assert not FORBIDDEN.search(text)
    assert not any(twin[name] in text for twin in TWINS for name in CLASSES)


def test_the_card_states_the_counts() -> None:
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    assert f"{len(TWINS)} twins" in card
    assert f"{len(GERMAN)} of the twins in German" in card
    assert f"{len(REFUSALS)} refusals" in card
    for category in CATEGORIES:
        count = sum(refusal["category"] == category for refusal in REFUSALS)
        assert re.search(rf"^\| {category}\b.*\| 9 \| 7 \| 6 \| {count} \|$", card, re.MULTILINE), category
