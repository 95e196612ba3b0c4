"""Reading prompts and pairs: every kind of source, every mistake in one, and the mix of safety and general pairs."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.data import prompts
from safeneuron.data.pairs import mix, read_pairs
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
from safeneuron.data.rows import Source, read_jsonl
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError, did_you_mean
from tests import ROOT

BUNDLED = Path(prompts.__file__).parent / "bundled"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def message_of(call: Any, *arguments: Any, **keywords: Any) -> str:
    """Return the message of the InputError that the call must raise; it must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_blank_lines_byte_order_mark_and_unusual_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"text": "één\u2028zwei"}\r\n\r\n  \n{"text": "b"}'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["één\u2028zwei", "b"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('\ufeffid,prompt,category\n1,"Why,\nand how?",a\n\n2,When?,\n', "utf-8")
    assert read_prompts(path) == [Prompt("Why,\nand how?", "a", "1"), Prompt("When?", "", "2")]


def test_records_go_round(tmp_path: Path) -> None:
    prompt = Prompt("Why?", "a", "1")
    pair = Pair((user("Why?"), assistant("So."), user("How?")), "Thus.", "Not thus.", "here")
    assert Prompt.from_record(json.loads(json.dumps(prompt.to_record()))) == prompt
    assert Pair.from_record(json.loads(json.dumps(pair.to_record()))) == pair
    assert read_prompts(write(tmp_path / "prompts.jsonl", prompt.to_record())) == [prompt]
    (again,) = read_pairs(write(tmp_path / "pairs.jsonl", pair.to_record()))
    assert (again.prompt, again.chosen, again.rejected) == (pair.prompt, pair.chosen, pair.rejected)
    assert "'text', found only: prompt" in message_of(Prompt.from_record, {"prompt": "x"})
    assert "'chosen', found only: prompt" in message_of(Pair.from_record, {"prompt": []})


# Mistakes in files.

GOOD = b'{"prompt": "Why?"}\n'


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (GOOD + b"{oops\n", "p.jsonl line 2", "is not JSON"),
        (GOOD + b"\n" + b'["a"]\n', "p.jsonl line 3", "expected a JSON object with named columns, found ['a']"),
        (GOOD + b'{"promt": "How?"}\n', "p.jsonl line 2", "no column 'prompt' (did you mean 'promt'?), found: promt"),
        (GOOD + b'{"prompt": 5}\n', "p.jsonl line 2", "'prompt' must be text, found 5"),
        (GOOD + b'{"prompt": " "}\n', "p.jsonl line 2", "'prompt' is empty"),
        (GOOD + b'{"prompt": null}\n', "p.jsonl line 2", "'prompt' is empty"),
        (GOOD + b'{"prompt": []}\n', "p.jsonl line 2", "'prompt' is empty"),
        (GOOD + b'{"prompt": [{"role": "user"}]}\n', "p.jsonl line 2", "needs the texts role and content"),
        (GOOD + b'{"prompt": ["a", 1]}\n', "p.jsonl line 2", "needs the texts role and content, found 'a'"),
        (GOOD + GOOD + b'{"prompt": "\xe9"}\n', "p.jsonl line 3", "not UTF-8"),
        (b'{"name": "x", "age": 3}\n', "p.jsonl line 1", "none of the columns name, age is known to hold prompts"),
        (b"[" * 100_000, "p.jsonl line 1", "is not JSON"),
        (b"", "p.jsonl", "is empty"),
        (b"\n  \n", "p.jsonl", "is empty"),
    ],
)
def test_mistakes_in_jsonl(tmp_path: Path, content: bytes, place: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    message = message_of(read_prompts, path)
    assert message.startswith(str(tmp_path / place))
    assert reason in message


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b"prompt,id\nWhy?,1\nWell, why?,2\n", "p.csv line 3", "more cells than the 2 columns"),
        (b'prompt,id\n"Why,\nso?",1\n,2\n', "p.csv line 4", "'prompt' is empty"),
        (b"id,prompt\n1,Why?\n2\n", "p.csv line 3", "'prompt' is empty"),
        (b'prompt\n"Why"?\n', "p.csv after line 1", "is not CSV"),
        (b'prompt\nHow?\n"Why?\nWhen?\n', "p.csv after line 2", "is not CSV"),
        (b"prompt\nHow?\nCaf\xe9?\n", "p.csv line 3", "not UTF-8"),
        (b"prompt\n", "p.csv", "is empty"),
        (b"", "p.csv", "is empty"),
    ],
)
def test_mistakes_in_csv(tmp_path: Path, content: bytes, place: str, reason: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    message = message_of(read_prompts, path)
    assert message.startswith(str(tmp_path / place))
    assert reason in message


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


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert message_of(read_jsonl, tmp_path / "p.jsonl").endswith("p.jsonl cannot be read: Permission denied")


def test_read_jsonl(tmp_path: Path) -> None:
    records = [{"a": 1}, {"b": [2, None]}]
    assert read_jsonl(write(tmp_path / "r.jsonl", *records)) == records
    assert "r.jsonl line 2" in message_of(read_jsonl, write(tmp_path / "r.jsonl", {"a": 1}, 3))


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for the Hub: ``rows`` is what it returns or raises, ``asked`` what it was asked for."""
    state: dict[str, Any] = {}

    def load_dataset(*names: Any, **options: Any) -> Any:
        state["asked"] = (*names, options)
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return datasets.Dataset.from_list(state["rows"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def test_hub_is_asked_for_what_was_named(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"question": "Why?", "topic": "a"}, {"question": "How?", "topic": "b"}]
    assert read_prompts("hub:owner/name", count=1) == [Prompt("Why?", "a")]
    assert hub["asked"] == ("owner/name", {"name": None, "split": "train", "revision": None})
    read_prompts("hub:owner/name/main-config", split="test", revision="abc")
    assert hub["asked"] == ("owner/name", {"name": "main-config", "split": "test", "revision": "abc"})
    read_prompts(Source("hub:owner/name", split="test", revision="abc"), split="other")
    assert hub["asked"] == ("owner/name", {"name": None, "split": "other", "revision": "abc"})


def test_empty_rows_of_the_hub_are_skipped(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"prompt": text} for text in ("", "Why?", None, " ", "How?", "When?")]
    assert [prompt.text for prompt in read_prompts("hub:owner/name", count=2)] == ["Why?", "How?"]
    hub["rows"] = [{"prompt": ""}]
    assert "hub:owner/name holds no prompts" in message_of(read_prompts, "hub:owner/name")
    hub["rows"] = []
    assert "hub:owner/name is empty" in message_of(read_prompts, "hub:owner/name")


def test_rows_of_the_hub_are_placed(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"prompt": [user("Why?")]}, {"prompt": [{"role": "user", "content": None}]}]
    assert message_of(read_prompts, "hub:owner/name").startswith("hub:owner/name row 1: a message in 'prompt'")


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"),
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'owner/name' doesn't exist on the Hub\nor cannot be accessed."
        ),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
        ValueError("Unknown split \"train\". Should be one of ['train_prefs']."),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        FileNotFoundError("Couldn't find any data file at owner/name."),
    ],
)
def test_failures_of_the_hub(hub: dict[str, Any], failure: Exception) -> None:
    hub["rows"] = failure
    message = message_of(read_prompts, "hub:owner/name")
    assert message.startswith("hub:owner/name cannot be loaded: ")
    assert " ".join(str(failure).split()).rstrip(".") in message


@pytest.mark.parametrize("path", ["hub:", "hub:name", "hub:owner/", "hub:a/b/c/d"])
def test_malformed_hub_names(path: str) -> None:
    assert f"expected hub:owner/name or hub:owner/name/config, found {path}" in message_of(read_prompts, path)


def test_a_real_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library reads a folder of that name, which needs no network and takes its usual path through it."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", *({"prompt": f"Why {number}?", "category": "a"} for number in range(5)))
    rows = [
        {"prompt": "Why?", "chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]}
    ]
    write(folder / "test.jsonl", *rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: prompts\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "- config_name: pairs\n  data_files:\n  - {split: test, path: test.jsonl}\n---\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert read_prompts("hub:owner/name/prompts", count=2) == [Prompt("Why 0?", "a"), Prompt("Why 1?", "a")]
    assert read_pairs("hub:owner/name/pairs", split="test")[0].chosen == "So."
    assert 'Unknown split "train"' in message_of(read_pairs, "hub:owner/name/pairs")
    assert "BuilderConfig 'other' not found" in message_of(read_prompts, "hub:owner/name/other")


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
