"""Prompts and pairs: what makes two of them the same, and their records."""

from __future__ import annotations

import json
from pathlib import Path

from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import (
    read_prompts,
)
from safeneuron.data.types import Pair, Prompt
from tests.helpers import tiny_vision
from tests.helpers.records import assistant, message_of, user, write


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


def test_prompts_are_the_same_but_for_case_and_spacing():
    assert Prompt("  Why\nso? ").key == Prompt("why SO?", "category", "7").key
    assert Prompt("Why?").key != Prompt("How?").key


def test_what_is_written_beside_an_image_is_what_the_model_reads():
    prompt = Prompt("How?", image=b"pixels", said="What does it say?")
    assert prompt.written == "What does it say?"
    assert Prompt("How?").written == "How?"
    assert prompt.key != Prompt("How?", image=b"others", said="What does it say?").key


def test_an_image_that_is_no_file_needs_a_folder_to_be_kept_in(tmp_path):
    pair = Pair((user("What?"),), "So.", "No.", image=tiny_vision.picture())
    assert "folder" in message_of(pair.to_record)
    record = pair.to_record(tmp_path)
    assert (tmp_path / record["image"]).is_file()
    assert Pair.from_record(record, tmp_path).image == str(tmp_path / record["image"])
    named = Prompt("What?", image="photo.jpg")
    assert Prompt.from_record(named.to_record()) == named


def test_the_lacking_part_of_a_record_is_named():
    for part in ("prompt", "chosen", "rejected"):
        record = Pair((user("Why?"),), "So.", "No.").to_record()
        del record[part]
        assert f"'{part}'" in message_of(Pair.from_record, record)
