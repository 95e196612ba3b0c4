"""Reading prompts: bundled twins, files, conversations; the checks of classes and splits; refusals that fit."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeneuron.data import prompts
from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import (
    Refusal,
    benign_text,
    check_classes,
    check_splits,
    fitting_refusal,
    read_prompts,
    read_twins,
    refusals,
)
from safeneuron.data.rows import Source
from safeneuron.data.types import Prompt
from safeneuron.errors import did_you_mean
from tests import ROOT
from tests.helpers.records import assistant, message_of, user, write

BUNDLED = Path(prompts.__file__).parent / "bundled"


@pytest.fixture
def small_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the bundled files by small ones."""
    twins = [
        {
            "id": f"{split}-1",
            "category": "garden",
            "split": split,
            "harmful": f"bad {split}",
            "harmless": f"good {split}",
        }
        for split in ("discovery", "training", "test")
    ]
    write(tmp_path / "twins.jsonl", *twins)
    write(
        tmp_path / "refusals.jsonl",
        *({"text": f"No gardening, {number}.", "category": "garden"} for number in range(3)),
        *({"text": f"No, {number}.", "category": ""} for number in range(4)),
        {"text": "No cooking.", "category": "kitchen"},
    )
    monkeypatch.setattr(prompts, "_bundled", lambda name: tmp_path / name)
    prompts._bundled_refusals.cache_clear()
    yield
    prompts._bundled_refusals.cache_clear()


# Bundled prompts.


@pytest.mark.usefixtures("small_bundle")
def test_twins_by_class_and_split() -> None:
    assert read_prompts("twins:unsafe", split="test") == [Prompt("bad test", "garden", "test-1")]
    assert read_prompts("twins:safe", split="test") == [Prompt("good test", "garden", "test-1")]
    assert [prompt.text for prompt in read_prompts("twins:safe")] == ["good discovery", "good training", "good test"]
    assert len(read_prompts("twins:safe", count=2)) == 2
    assert read_prompts(Source("twins:safe", every=3, count=4)) == read_prompts("twins:safe")[:12:3]


@pytest.mark.usefixtures("small_bundle")
def test_twins_that_do_not_exist() -> None:
    assert "did you mean 'twins:unsafe'?" in message_of(read_prompts, "twins:unsave")
    assert "did you mean 'twins:safe-de'?" in message_of(read_prompts, "twins:safe-dd")
    assert "twins:safe-de for the bundled prompts, found 'twins:safe-'" in message_of(read_prompts, "twins:safe-")
    assert "did you mean 'training'?" in message_of(read_prompts, "twins:safe", split="train")
    assert "'column' has no meaning" in message_of(read_prompts, "twins:safe", column="text")
    assert "not preference pairs" in message_of(read_pairs, "twins:safe")


def test_german_twins_are_requests_of_the_english_ones() -> None:
    english = {prompt.id: prompt.category for prompt in read_prompts("twins:unsafe", split="discovery")}
    unsafe, safe = read_prompts("twins:unsafe-de"), read_prompts("twins:safe-de", split="discovery")
    assert [prompt.id for prompt in unsafe] == [prompt.id for prompt in safe]
    assert {prompt.id: prompt.category for prompt in unsafe}.items() <= english.items()
    assert unsafe[0].text.startswith("Ich möchte jemanden anheuern")
    assert read_twins("de") == (unsafe, safe)


def test_a_file_of_twins_has_both_columns(tmp_path: Path) -> None:
    rows = [{"id": "1", "harmful": "Bad?", "harmless": "Good?"}, {"id": "2", "harmful": "Worse?", "harmless": "Fine?"}]
    path = write(tmp_path / "own.jsonl", *rows)
    unsafe, safe = read_twins(str(path))
    assert [(prompt.text, prompt.id) for prompt in unsafe] == [("Bad?", "1"), ("Worse?", "2")]
    assert [prompt.text for prompt in safe] == ["Good?", "Fine?"]
    assert "harmless" in message_of(
        read_twins, str(write(tmp_path / "half.jsonl", {"harmful": "Bad?", "text": "Good?"}))
    )


def test_real_twins_are_complete_and_aligned() -> None:
    unsafe, safe = read_prompts("twins:unsafe"), read_prompts("twins:safe")
    assert [(prompt.id, prompt.category) for prompt in unsafe] == [(prompt.id, prompt.category) for prompt in safe]
    assert len({prompt.id for prompt in unsafe}) == len(unsafe)
    splits = {name: read_prompts("twins:unsafe", split=name) for name in prompts.TWIN_SPLITS}
    assert sum(len(prompts) for prompts in splits.values()) == len(unsafe)
    assert check_splits(**splits, safe=safe) == []
    assert check_classes(splits["discovery"], read_prompts("twins:safe", split="discovery")) == []


# Files of prompts.


def test_jsonl_column_category_and_id_are_found(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"text": "no", "topic": "b", "Question": " Why? ", "Category": "a", "id": 7},
        {"Question": "How?"},
    )
    assert read_prompts(path) == [Prompt(" Why? ", "a", "7"), Prompt("How?")]
    assert read_prompts(str(path), column="Question", count=1) == [Prompt(" Why? ", "a", "7")]
    assert read_prompts(Source(str(path), count=1)) == [Prompt(" Why? ", "a", "7")]
    assert len(read_prompts(Source(str(path), count=1), count=2)) == 2


@pytest.mark.parametrize(
    "column", ["prompt", "Question", "instruction", "text", "Goal", "Behavior", "forbidden_prompt"]
)
def test_usual_columns_are_found(tmp_path: Path, column: str) -> None:
    assert read_prompts(write(tmp_path / "p.jsonl", {"source": "x", column: "Why?"})) == [Prompt("Why?")]


def test_the_request_wins_over_its_label(tmp_path: Path) -> None:
    """JailbreakBench has both: Goal is the request, Behavior a label of it."""
    assert read_prompts(write(tmp_path / "p.jsonl", {"Behavior": "Tidying", "Goal": "Tidy up."}))[0].text == "Tidy up."


def test_conversation_gives_its_first_user_turn(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, user("Why?"), assistant("So."), user("Really?")]
    assert read_prompts(write(tmp_path / "p.jsonl", {"messages": messages})) == [Prompt("Why?")]


def test_paths_that_are_no_source(tmp_path: Path) -> None:
    path = write(tmp_path / "unsafe.jsonl", {"prompt": "Why?"})
    (tmp_path / "p.txt").write_text("Why?", "utf-8")
    missing = message_of(read_prompts, tmp_path / "unsave.jsonl")
    assert "unsave.jsonl does not exist (did you mean 'unsafe.jsonl'?)" in missing
    assert "hub:owner/name" in missing
    assert "does not exist; a source is" in message_of(read_prompts, tmp_path / "nowhere" / "p.jsonl")
    assert "'owner/name' is neither a file nor a benchmark known by name" in message_of(read_prompts, "owner/name")
    assert "is a directory" in message_of(read_prompts, tmp_path)
    assert "p.txt is neither a .jsonl nor a .csv file" in message_of(read_prompts, tmp_path / "p.txt")
    assert "'split' has no meaning, found 'test'" in message_of(read_prompts, path, split="test")
    assert "'revision' has no meaning" in message_of(read_prompts, path, revision="v1")
    assert "no column 'promt' (did you mean 'prompt'?)" in message_of(read_prompts, path, column="promt")
    assert "count must be at least 1" in message_of(read_prompts, path, count=0)


# Checks and bundled texts.


def test_check_classes() -> None:
    many, few = [Prompt(str(number)) for number in range(32)], [Prompt("a"), Prompt("b")]
    assert check_classes(many, many) == []
    (warning,) = check_classes(many, few)
    assert "only 2 safe prompts" in warning
    assert len(check_classes(many[:31], few)) == 2
    assert "at least 2 unsafe prompts, found 1" in message_of(check_classes, few[:1], many)
    assert "at least 2 safe prompts, found 0" in message_of(check_classes, many, [])
    assert "at least 3 safe prompts, found 2" in message_of(check_classes, many, few, least=3)


def test_check_splits() -> None:
    first, second = [Prompt("Why so?"), Prompt("How?")], [Prompt("  why\nSO? "), Prompt("When?")]
    assert check_splits(unsafe=first, safe=[Prompt("When?")]) == []
    assert check_splits(unsafe=first, safe=second, test=second[1:]) == [
        "'unsafe' and 'safe' share 1 prompts, for example 'Why so?'",
        "'safe' and 'test' share 1 prompts, for example 'When?'",
    ]
    assert check_splits(test=[*first, Prompt("how?")]) == ["1 of the 3 prompts in 'test' repeat an earlier one"]
    (warning,) = check_splits(a=[Prompt("long " * 50)], b=[Prompt("long " * 50)])
    assert len(warning) < 120


@pytest.mark.usefixtures("small_bundle")
def test_fitting_refusal_is_of_the_category_or_general_and_stable() -> None:
    prompts = [Prompt(f"Plant {number}.", "Garden") for number in range(200)]
    given_out = Counter(fitting_refusal(prompt, seed=0) for prompt in prompts)
    assert set(given_out) == {f"No gardening, {n}." for n in range(3)} | {f"No, {n}." for n in range(4)}
    assert 70 < sum(count for text, count in given_out.items() if "gardening" in text) < 130
    assert fitting_refusal(prompts[0], 0) == fitting_refusal(Prompt("Plant 0.", "garden", "other id"), 0)
    assert any(fitting_refusal(prompt, 0) != fitting_refusal(prompt, 1) for prompt in prompts)
    assert {fitting_refusal(Prompt(str(n), "sea"), 0) for n in range(100)} == {f"No, {n}." for n in range(4)}
    assert {fitting_refusal(Prompt(str(n)), 0) for n in range(100)} == {f"No, {n}." for n in range(4)}
    assert refusals()[-1] == Refusal("No cooking.", "kitchen")


def test_real_refusals_and_prose() -> None:
    categories = {refusal.category for refusal in refusals()}
    assert "" in categories, "some refusals must fit every request"
    assert categories - {""} <= {prompt.category for prompt in read_prompts("twins:unsafe")}
    assert all(refusal.text.strip() for refusal in refusals())
    for prompt in read_prompts("twins:unsafe", split="training"):
        assert fitting_refusal(prompt, 0) in {r.text for r in refusals() if r.category in ("", prompt.category)}
    assert len(benign_text().split()) > 100


def test_nearest() -> None:
    assert did_you_mean("trainning", ["test", "training"]) == " (did you mean 'training'?)"
    assert did_you_mean("xyz", ["test", "training"]) == did_you_mean("xyz", []) == ""


def test_importing_data_needs_neither_torch_nor_datasets() -> None:
    script = (
        "import sys, safeneuron.data.pairs; sys.exit(len({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
