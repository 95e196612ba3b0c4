"""Rows of files and of the Hub: what is read, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import pytest

from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import (
    read_prompts,
)
from safeneuron.data.rows import Source, read_jsonl
from safeneuron.data.types import Prompt
from tests.helpers.records import assistant, message_of, user, write


def test_blank_lines_byte_order_mark_and_unusual_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"text": "één\u2028zwei"}\r\n\r\n  \n{"text": "b"}'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["één\u2028zwei", "b"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('\ufeffid,prompt,category\n1,"Why,\nand how?",a\n\n2,When?,\n', "utf-8")
    assert read_prompts(path) == [Prompt("Why,\nand how?", "a", "1"), Prompt("When?", "", "2")]


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


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert message_of(read_jsonl, tmp_path / "p.jsonl").endswith("p.jsonl cannot be read: Permission denied")


def test_read_jsonl(tmp_path: Path) -> None:
    records = [{"a": 1}, {"b": [2, None]}]
    assert read_jsonl(write(tmp_path / "r.jsonl", *records)) == records
    assert "r.jsonl line 2" in message_of(read_jsonl, write(tmp_path / "r.jsonl", {"a": 1}, 3))


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
