"""What a config names is known by its contents: hashes of files, test prompts among the pairs, judges as one."""

from __future__ import annotations

import json

from safeneuron.config.attack import JudgeTable
from safeneuron.config.tables import CapabilityTable
from safeneuron.config.toml import read_config
from safeneuron.data.types import Pair, Prompt
from safeneuron.evaluation.judge import RefusalPhrases
from safeneuron.evaluation.judging import Panel
from safeneuron.runs import inputs
from safeneuron.runs.inputs import (
    file_hashes,
    hashes_of,
    judge_of,
    judges_of,
    leaks,
    measurement_of,
    pairs_of,
    prompts_of,
    question_hashes,
    selection_of,
)
from safeneuron.runtime.files import sha256_of
from tests.helpers.tiny_run import AnswersJudge


def pair(text: str) -> Pair:
    return Pair(({"role": "user", "content": text},), "No.", "Yes.")


def test_a_file_is_known_by_its_contents_and_a_missing_one_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = file_hashes({"a": path, "b": tmp_path / "nowhere"})
    assert before == {"a": sha256_of(path)}
    path.write_text("two")
    assert file_hashes({"a": path}) != before


def test_a_folder_is_known_by_the_names_and_sizes_in_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"12")
    before = file_hashes({"images": tmp_path / "images"})
    (tmp_path / "images" / "a.png").write_bytes(b"34")
    assert file_hashes({"images": tmp_path / "images"}) == before, "contents of pictures are too many to read"
    (tmp_path / "images" / "b.png").write_bytes(b"")
    assert file_hashes({"images": tmp_path / "images"}) != before


def test_sources_of_a_config_are_read_in_order_and_their_files_hashed(finished_run):
    _, path, _ = finished_run
    config = read_config(path)
    tables = [*config.data.unsafe, *config.data.safe]
    texts = [prompt.text for prompt in prompts_of(tables)]
    files = [path.parent / f"{role}.jsonl" for role in ("unsafe", "safe")]
    assert texts == [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()]
    assert hashes_of(tables) == {str(file): sha256_of(file) for file in files}


def test_rows_that_gave_no_pair_are_told(finished_run, tmp_path):
    _, path, _ = finished_run
    warnings: list[str] = []
    (table,) = read_config(path).pairs.safety
    assert len(pairs_of(table, warnings)) == 6
    assert warnings == []
    rows = [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": "no", "rejected": "yes"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = table.model_copy(update={"path": str(tmp_path / "pairs.jsonl")})
    assert len(pairs_of(table, warnings)) == 1
    assert len(warnings) == 1


def test_test_prompts_that_are_trained_on_are_told_once_however_many_pairs_share_them():
    tests = {
        "test_unsafe": [Prompt("how to break it"), Prompt("how to steal")],
        "test_safe": [Prompt("how to bake")],
    }
    assert leaks([pair("something else")], tests) == []
    (warning,) = leaks([pair("how to break it"), pair("how to break it")], tests)
    assert "pairs" in warning
    assert "test_unsafe" in warning


def test_several_judges_are_one_panel(monkeypatch):
    monkeypatch.setattr(inputs, "make_judge", lambda name, endpoint: (name, endpoint.model))
    one, several = (JudgeTable(name=name, model="m") for name in ("wildguard", ["wildguard", "refusal-phrases"]))
    assert [make() for make in judges_of(several)] == [("wildguard", "m"), ("refusal-phrases", "m")]
    assert judge_of(one) == ("wildguard", "m")


def test_a_panel_follows_the_rule_of_the_config(monkeypatch):
    monkeypatch.setattr(inputs, "make_judge", lambda name, _: {"wildguard": AnswersJudge}.get(name, RefusalPhrases)())
    panel = judge_of(JudgeTable(name=["refusal-phrases", "wildguard"], rule="any"))
    assert isinstance(panel, Panel)
    assert panel.rule == "any"


def test_questions_are_hashed_where_they_are_files(tmp_path):
    assert question_hashes(CapabilityTable(tasks=["gsm8k"])) == {}
    table = CapabilityTable(tasks=["gsm8k"], folder=str(tmp_path))
    assert question_hashes(table) == {}, "not there yet"
    name = inputs.TASKS["gsm8k"].file
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}\n")
    assert question_hashes(table) == {name: sha256_of(tmp_path / name)}


def test_settings_are_those_of_the_tables(finished_run):
    config = read_config(finished_run[1], ["measure.batch_tokens=77", "select.density=0.25"])
    assert measurement_of(config).batch_tokens == 77
    assert selection_of(config).density == 0.25
