"""Data sets and benchmarks by name, read by the real library from folders laid out as on the Hub; texts are made up."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from safeneuron.data.catalogue import DATA_SETS, PROMPT_SETS, by_name, prompts_by_name
from safeneuron.data.pairs import EQUAL, NOT_SAFE_OVER_UNSAFE, ONE_KIND, OPENINGS, read_pairs
from safeneuron.data.prompts import read_prompts
from safeneuron.data.rows import GATED, Source, read_rows
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.vision import ImageTokens
from tests import ROOT
from tests.helpers import tiny_vision


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


def test_spa_vl(shelf: Path, tmp_path: Path) -> None:
    """Pictures on the Hub lie in parquet files; they come out as the bytes that went in, not decoded."""
    for number in range(3):
        tiny_vision.picture(seed=number).save(tmp_path / f"{number}.png")
    rows = {
        "image": [{"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None} for number in range(3)],
        "question": ["Q0", "Q1", "Q2"],
        "chosen": ["no", "same", "never"],
        "rejected": ["yes", "same", "sure"],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (shelf / "sqrti/SPA-VL/data").mkdir(parents=True)
    made.to_parquet(shelf / "sqrti/SPA-VL/data/train-0.parquet")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}"
    lay(shelf, "sqrti/SPA-VL", {}, card)
    dropped: Counter[str] = Counter()
    pairs = read_pairs("spa-vl", dropped=dropped)
    assert answers(pairs) == [("Q0", "no", "yes"), ("Q2", "never", "sure")]
    assert [pair.image for pair in pairs] == [(tmp_path / f"{number}.png").read_bytes() for number in (0, 2)]
    assert dropped == {EQUAL: 1}
    model = tiny_vision.model("llava")
    assert all(isinstance(model.encode(pair.prompt, pair.image), ImageTokens) for pair in pairs)


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
    page = (ROOT / "docs/configs.md").read_text(encoding="utf-8")
    for name, known in DATA_SETS.items():
        row = f"| `{name}` | `{known.path}` | `{known.split}` | {known.licence} | {known.kept} |"
        assert row in page, row


# -- benchmarks of prompts --------------------------------------------------------------------------------------------

ONE_CONFIG = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data.jsonl}"


@pytest.mark.parametrize("name", ["strongreject", "harmbench", "advbench", "or-bench:toxic", "or-bench:hard"])
def test_sets_of_prompts_and_categories(name: str, shelf: Path) -> None:
    known = PROMPT_SETS[name]
    owner, repository, *config = known.path.removeprefix("hub:").split("/")
    # AdvBench has no categories, but the beginning of an answer, which must not be taken for the prompt.
    more = {"target": "Sure, "} if name == "advbench" else {"category": "topic"}
    lay(
        shelf,
        f"{owner}/{repository}",
        {"data.jsonl": [{"prompt": "Q0", **more}, {"prompt": "Q1", **more}]},
        ONE_CONFIG.replace("default", config[0] if config else "default"),
    )
    assert read_prompts(name) == [Prompt(text, more.get("category", "")) for text in ("Q0", "Q1")]
    assert read_prompts(name.upper(), count=1) == read_prompts(f"{known.path}")[:1]


def test_jailbreakbench_is_split_into_harmful_and_benign(shelf: Path) -> None:
    def row(kind: str) -> dict[str, Any]:
        made = {"Goal": f"Do {kind}", "Target": "Sure, ", "Behavior": "a name", "Category": "Fraud", "Source": "made"}
        return {"Index": 0, **made}

    lay(
        shelf,
        "JailbreakBench/JBB-Behaviors",
        {"data/harmful.jsonl": [row("harm")], "data/benign.jsonl": [row("good")], "data/judge.jsonl": [{"other": 1}]},
        "configs:\n- config_name: behaviors\n  data_files:\n  - {split: harmful, path: data/harmful.jsonl}\n"
        "  - {split: benign, path: data/benign.jsonl}\n"
        "- config_name: judge_comparison\n  data_files:\n  - {split: test, path: data/judge.jsonl}",
    )
    assert read_prompts("jailbreakbench:harmful") == [Prompt("Do harm", "Fraud")]
    assert read_prompts("jailbreakbench:benign") == [Prompt("Do good", "Fraud")]


def test_xstest_is_told_apart_by_its_labels(shelf: Path) -> None:
    rows = [
        {"id": str(number), "prompt": f"Q{number}", "type": kind, "label": label, "focus": "", "note": ""}
        for number, (kind, label) in enumerate((("homonyms", "safe"), ("contrast_homonyms", "unsafe")) * 2)
    ]
    lay(shelf, "Paul/XSTest", {"data.jsonl": rows}, ONE_CONFIG)
    assert read_prompts("xstest:safe") == [Prompt("Q0", "homonyms", "0"), Prompt("Q2", "homonyms", "2")]
    assert [prompt.text for prompt in read_prompts("xstest:unsafe")] == ["Q1", "Q3"]
    # Every so-many-th and the first so many count the rows that are meant.
    sample = read_prompts(Source("xstest:safe", every=2, count=5, category="XSTest"))
    assert sample == [Prompt("Q0", "XSTest", "0")]
    file = shelf / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert read_prompts(Source(str(file), where="label=safe")) == read_prompts("xstest:safe")


def test_sorry_bench_without_its_rewritten_requests(shelf: Path) -> None:
    rows = [
        {"question_id": 1, "category": "Fraud", "turns": ["Q1"], "prompt_style": "base"},
        {"question_id": 1, "category": "Fraud", "turns": ["q-one"], "prompt_style": "slang"},
        {"question_id": 2, "category": "Fraud", "turns": [""], "prompt_style": "base"},
    ]
    lay(shelf, "sorry-bench/sorry-bench-202503", {"data.jsonl": rows}, ONE_CONFIG)
    assert read_prompts("sorry-bench") == [Prompt("Q1", "Fraud")]
    assert read_prompts(Source("sorry-bench", where="prompt_style = slang")) == [Prompt("q-one", "Fraud")]


@pytest.mark.parametrize("condition", ["label", "= safe", " "])
def test_a_condition_names_a_column_and_its_value(condition: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "Q", "label": "safe"}\n', "utf-8")
    with pytest.raises(InputError, match=r"as in 'label = safe', found"):
        read_prompts(Source(str(file), where=condition))


def test_a_condition_that_no_row_fulfils_says_so(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "Q", "label": "safe"}\n', "utf-8")
    with pytest.raises(InputError, match="no row has label = unsafe"):
        read_prompts(Source(str(file), where="label = unsafe"))
    with pytest.raises(InputError, match=r"there is no column 'lable' .did you mean 'label'"):
        read_prompts(Source(str(file), where="lable = safe"))
    with pytest.raises(InputError, match="'where' has no meaning"):
        read_prompts(Source("twins:safe", where="label = safe"))


def test_what_a_source_of_prompts_says_itself_wins() -> None:
    given = Source("xstest:safe", split="test", column="note", where="type = homonyms", revision="abc", count=3)
    assert prompts_by_name(given) == Source(
        "hub:Paul/XSTest", split="test", column="note", where="type = homonyms", revision="abc", count=3
    )
    for path in ("prompts.jsonl", "prompts.csv", "hub:owner/name", "twins:unsafe", "twins:other"):
        assert prompts_by_name(Source(path)) == Source(path)


def test_an_unknown_benchmark_names_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"'xstest' is neither .*did you mean 'xstest:safe'\?.*or-bench:hard"):
        read_prompts("xstest")


def test_gated_sets_say_how_to_get_access(shelf: Path) -> None:
    for path in [known.path for known in PROMPT_SETS.values()] + [DATA_SETS["wildjailbreak"].path]:
        with pytest.raises(InputError) as caught:
            list(read_rows(Source(path)))
        repository = "/".join(path.removeprefix("hub:").split("/")[:2])
        told = f"accept its terms on https://huggingface.co/datasets/{repository}, then log in" in str(caught.value)
        assert told == (repository in GATED)
    licences = {known.path.removeprefix("hub:"): known.licence for known in PROMPT_SETS.values()}
    gated = {path for path, licence in licences.items() if licence.endswith("gated")}
    assert gated == {path for path in licences if path.startswith(GATED)}


def test_every_benchmark_is_in_the_documentation() -> None:
    page = (ROOT / "docs/configs.md").read_text(encoding="utf-8")
    for name, known in PROMPT_SETS.items():
        where = f"`{known.where}`" if known.where else ""
        row = f"| `{name}` | `{known.path}` | `{known.split}` | `{known.column}` | {where} | {known.licence} | "
        assert row + f"{known.holds} |" in page, row
