"""Preference data by name, read by the real library from folders laid out as on the Hub; all texts are made up."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from safeneuron.catalogue import DATA_SETS, by_name
from safeneuron.errors import InputError
from safeneuron.forms import EQUAL, NOT_SAFE_OVER_UNSAFE, ONE_KIND, OPENINGS
from safeneuron.pairs import read_pairs
from safeneuron.rows import Source


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which a folder owner/name stands for the data set of that name on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def lay(shelf: Path, name: str, files: dict[str, list[dict[str, Any]]], card: str) -> None:
    """Write a data set: its files, JSONL or TSV, and the part of its card that says how they are loaded."""
    for path, rows in files.items():
        target = shelf / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", encoding="utf-8", newline="") as out:
            if target.suffix == ".tsv":
                writer = csv.DictWriter(out, rows[0].keys(), delimiter="\t")
                writer.writeheader()
                writer.writerows(rows)
            else:
                out.writelines(json.dumps(row) + "\n" for row in rows)
    (shelf / name / "README.md").write_text(f"---\n{card}\n---\n", "utf-8")


def answers(pairs: list[Any]) -> list[tuple[str, str, str]]:
    return [(pair.prompt[-1]["content"], pair.chosen, pair.rejected) for pair in pairs]


def test_pku_saferlhf(shelf: Path) -> None:
    def row(number: int, safer: int, *safe: bool) -> dict[str, Any]:
        return {
            "prompt": f"Q{number}",
            "response_0": "zero",
            "response_1": "one",
            "prompt_source": "made",
            "is_response_0_safe": safe[0],
            "is_response_1_safe": safe[1],
            "response_0_harm_category": {"Privacy Violation": False},
            "better_response_id": 0,
            "safer_response_id": safer,
        }

    rows = [row(0, 1, False, True), row(1, 0, True, True), row(2, 0, True, False), row(3, 1, False, False)]
    lay(
        shelf,
        "PKU-Alignment/PKU-SafeRLHF",
        {"data/Alpaca-7B/train.jsonl": rows[:2], "data/Alpaca2-7B/train.jsonl": rows[2:]},
        "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: 'data/*/train.jsonl'}",
    )
    dropped: Counter[str] = Counter()
    pairs = read_pairs("pku-saferlhf", dropped=dropped)
    assert answers(pairs) == [("Q0", "one", "zero"), ("Q2", "zero", "one")]
    assert pairs[0].source == "hub:PKU-Alignment/PKU-SafeRLHF"
    assert dropped == {NOT_SAFE_OVER_UNSAFE: 2}
    assert read_pairs("PKU-SafeRLHF", count=1) == pairs[:1] == read_pairs("hub:PKU-Alignment/PKU-SafeRLHF", count=1)


def test_beavertails(shelf: Path) -> None:
    def rows(*marks: tuple[str, str, bool]) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt, "response": answer, "category": {"animal_abuse": not safe}, "is_safe": safe}
            for prompt, answer, safe in marks
        ]

    small = rows(("Q0", "bad", False), ("Q1", "good", True), ("Q0", "good", True), ("Q0", "other", True))
    large = rows(("Q9", "yes", True), ("Q9", "no", False))
    lay(
        shelf,
        "PKU-Alignment/BeaverTails",
        {"round0/30k/train.jsonl": small, "round0/330k/train.jsonl": large},
        "configs:\n- config_name: default\n  data_files:\n  - {split: 30k_train, path: round0/30k/train.jsonl}\n"
        "  - {split: 330k_train, path: round0/330k/train.jsonl}",
    )
    dropped: Counter[str] = Counter()
    assert answers(read_pairs("beavertails", dropped=dropped)) == [("Q0", "good", "bad")]
    assert dropped == {ONE_KIND: 2}
    assert answers(read_pairs("beavertails", split="330k_train")) == [("Q9", "yes", "no")]


def test_hh_rlhf(shelf: Path) -> None:
    def row(kind: str) -> dict[str, str]:
        talk = f"\n\nHuman: {kind}?\n\nAssistant: Go on.\n\nHuman: More\n\non that?\n\nAssistant:"
        return {"chosen": f"{talk} Gladly.", "rejected": f"{talk} Never."}

    # Earlier commits of this data set, and folders like it, have no card: parts are found by their folder.
    lay(
        shelf,
        "Anthropic/hh-rlhf",
        {"harmless-base/train.jsonl": [row("harmless")], "helpful-base/train.jsonl": [row("helpful")]},
        "license: mit",
    )
    (pair,) = read_pairs("hh-rlhf-harmless")
    assert [message["role"] for message in pair.prompt] == ["user", "assistant", "user"]
    assert [message["content"] for message in pair.prompt] == ["harmless?", "Go on.", "More\n\non that?"]
    assert (pair.chosen, pair.rejected) == ("Gladly.", "Never.")
    assert {pair.prompt[0]["content"] for pair in read_pairs("hh-rlhf")} == {"harmless?", "helpful?"}


def test_ultrafeedback_binarized(shelf: Path) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(texts)]

    rows = [
        {
            "prompt": f"Q{number}",
            "prompt_id": str(number),
            "chosen": said(f"Q{number}", "fine"),
            "rejected": said(f"Q{number}", worse),
            "messages": said(f"Q{number}", "fine"),
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        }
        for number, worse in enumerate(("poor", "fine", "poor"))
    ]
    lay(
        shelf,
        "HuggingFaceH4/ultrafeedback_binarized",
        {"data/train_prefs.jsonl": rows},
        "configs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: data/train_prefs.jsonl}",
    )
    dropped: Counter[str] = Counter()
    pairs = read_pairs("ultrafeedback-binarized", dropped=dropped)
    assert answers(pairs) == [("Q0", "fine", "poor"), ("Q2", "fine", "poor")]
    assert dropped == {EQUAL: 1}


def test_wildjailbreak(shelf: Path) -> None:
    def row(kind: str, completion: str) -> dict[str, str]:
        adversarial = f"told {kind}" if kind.startswith("adversarial") else ""
        return {"vanilla": f"plain {kind}", "adversarial": adversarial, "completion": completion, "data_type": kind}

    rows = [
        row("vanilla_harmful", "I will not."),
        row("vanilla_benign", "Here is\nthe answer."),
        row("adversarial_harmful", "NA"),
        row("adversarial_benign", "With\tpleasure."),
    ]
    lay(
        shelf,
        "allenai/wildjailbreak",
        {"train/train.tsv": rows, "eval/eval.tsv": rows[:1]},
        'configs:\n- config_name: train\n  sep: "\\t"\n  data_files: train/train.tsv\n'
        '- config_name: eval\n  sep: "\\t"\n  data_files: eval/eval.tsv',
    )
    pairs = read_pairs("wildjailbreak")
    assert [pair.prompt[0]["content"] for pair in pairs] == [
        "plain vanilla_harmful",
        "plain vanilla_benign",
        "told adversarial_harmful",
        "told adversarial_benign",
    ]
    # "NA" is a text here, as the data set's page says, not an empty cell.
    assert [pair.chosen for pair in pairs] == [row["completion"] for row in rows]
    assert {pairs[0].rejected, pairs[2].rejected} <= set(OPENINGS)
    assert not {pairs[1].rejected, pairs[3].rejected} & set(OPENINGS)
    assert read_pairs("hub:allenai/wildjailbreak/train") == pairs


@pytest.mark.parametrize("path", ["spa-vl", "hub:sqrti/SPA-VL", "hub:sqrti/SPA-VL/validation"])
def test_images_are_refused_before_anything_is_loaded(path: str, shelf: Path) -> None:
    with pytest.raises(InputError, match="about images, for which a vision-language model is needed"):
        read_pairs(path)


def test_what_a_source_says_itself_wins() -> None:
    assert by_name(Source("beavertails")) == Source("hub:PKU-Alignment/BeaverTails", split="30k_train")
    given = Source("beavertails", split="330k_train", count=3, revision="abc")
    assert by_name(given) == Source("hub:PKU-Alignment/BeaverTails", split="330k_train", count=3, revision="abc")
    for path in ("pairs.jsonl", "pairs.csv", "hub:owner/name", "twins:unsafe"):
        assert by_name(Source(path)) == Source(path)


def test_an_unknown_name_is_told_from_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'beaver-tails' is neither a file nor .*did you mean 'beavertails'\?.*wildjailbreak"
    ):
        read_pairs("beaver-tails")
    with pytest.raises(InputError, match="does not exist"):
        read_pairs(tmp_path / "none.jsonl")


def test_every_name_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs/configs.md").read_text(encoding="utf-8")
    for name, known in DATA_SETS.items():
        row = f"| `{name}` | `{known.path}` | `{known.split}` | {known.licence} | {known.kept} |"
        assert row in page, row
