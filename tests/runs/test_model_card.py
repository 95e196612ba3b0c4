"""The model card: what the Hub reads in it, that its numbers are the run's, its code runs, and nothing breaks out."""

import csv
import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from safeneuron.config.states import State
from safeneuron.config.toml import read_config, to_toml
from safeneuron.runs.hub import UNKNOWN, Licence
from safeneuron.runs.model_card import (
    Base,
    data_table,
    finished_results,
    local_files,
    metadata,
    model_card,
    scores,
    source_text,
)
from safeneuron.runs.publication import publish
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines, write_json, write_text

BASE = Base("Tiny", "owner/tiny", Licence("apache-2.0"))
T1 = State("", 1)


def card_of(folder: Path, state: State = T1, base: Base = BASE, hub: str = "", config=None) -> str:
    return model_card(config or read_config(folder / "config.toml"), Run(folder), state, base, ["make it"], hub)


@pytest.fixture
def card(finished_run) -> str:
    """The card of T1."""
    return card_of(finished_run[0])


def rows_under(card: str, heading: str) -> list[list[str]]:
    """The cells of the tables of a section, without the headers' rules."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and "| --- |" not in line]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


# -- for the Hub ------------------------------------------------------------------------------------------------------


def test_huggingface_hub_reads_the_metadata(card):
    data = ModelCard(card).data.to_dict()
    assert data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "owner/tiny",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["safeneuron", "safety", "alignment", "dpo"],
    }


def test_the_hub_reads_the_rates_of_the_report(card, finished_run):
    data = ModelCard(card).data
    assert data.model_name == "tiny-T1"
    with (finished_run[0] / "report" / "tables" / "attacks.csv").open(newline="") as file:
        records = {(row["state"], row["set"], row["knowledge"]): row for row in csv.DictReader(file)}
    found = {entry.metric_name: entry for entry in data.eval_results}
    adaptive = found["Harmful requests complied with, FULL adaptive"]
    record = records["T1", "FULL", "adaptive"]
    assert adaptive.metric_value == pytest.approx(float(record["attack_success_rate"]), abs=1e-4)
    assert adaptive.metric_args["high"] == pytest.approx(float(record["attack_success_high"]), abs=1e-4)
    assert (adaptive.dataset_type, adaptive.dataset_name) == ("custom", "test_unsafe.jsonl")
    assert found["Harmless requests refused, ORI"].metric_type == "over_refusal_rate"
    assert len(found) == 4


def test_a_benchmark_of_the_hub_is_named_and_no_results_are_no_scores(finished_run):
    config = read_config(finished_run[1], ["data.test_unsafe=[{path='hub:owner/tests'}]"])
    run = Run(finished_run[0])
    assert scores(config, finished_results(run, T1), T1)[0].dataset_type == "owner/tests"
    assert scores(config, None, T1) == []


def test_a_licence_of_its_own_name_and_link(finished_run):
    base = Base("x", "", Licence("other", "a-licence", "LICENSE"))
    card = card_of(finished_run[0], base=base)
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "a-licence", "LICENSE")
    assert data.base_model is None
    assert "whose licence (other a-licence LICENSE) holds for it too" in card


def test_an_unknown_licence_is_called_unknown(finished_run):
    card = card_of(finished_run[0], base=Base("x", "", Licence(UNKNOWN)))
    assert ModelCard(card).data.license == "unknown"
    assert "**The licence of the base model is unknown**" in card


def test_datasets_of_the_hub_that_were_trained_on_are_named(finished_run):
    changes = [
        "data.unsafe=[{path='hub:owner/attacks/config'}, {path='hub:owner/attacks/other'}]",
        "data.test_unsafe=[{path='hub:owner/tests'}]",
        "pairs.safety=[{path='hub:owner/pairs', split='train'}]",
        "pairs.general=[{path='my.jsonl'}, {path='hub:owner/general'}]",
    ]
    config = read_config(finished_run[1], changes)
    assert metadata(config, BASE).datasets == ["owner/attacks", "owner/pairs", "owner/general"]
    asked = "pairs.unsafe=[{path='hub:o/asked'}]"
    for changes, expected in [(["pairs.safety='on-policy'"], ["o/asked"]), (["pairs.general='on-policy'"], ["o/asked"]),
                              ([], None)]:  # fmt: skip
        assert metadata(read_config(finished_run[1], [asked, *changes]), BASE).datasets == expected


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_the_results_are_those_of_the_report(card, finished_run):
    with (finished_run[0] / "report" / "tables" / "attacks.csv").open(newline="") as file:
        records = {(row["state"], row["set"], row["knowledge"]): row for row in csv.DictReader(file)}
    header, *rows = rows_under(card, "Results")
    assert header[:2] == ["state", "ORI"]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows[:4]}
    assert list(cells) == ["T0", "T1 (this model)", "T2", "dpo-T1"]
    for name, knowledge, title in [("ORI", "none", "ORI"), ("FULL", "adaptive", "FULL adaptive"),
                                   ("random", "control", "random")]:  # fmt: skip
        record = records["T1", name, knowledge]
        counts = f"{record['harmful_complied']}/{record['harmful_n']}"
        assert cells["T1 (this model)"][title].endswith(f") {counts}")
        assert f"{100 * float(record['attack_success_rate']):.0f}" in cells["T1 (this model)"][title]
        assert f"{100 * float(record['attack_success_high']):.0f}" in cells["T1 (this model)"][title]
    # The second table follows: its header, T0, T1.
    benign = dict(zip(rows[4], rows[6], strict=True))
    assert benign["state"] == "T1 (this model)"
    assert benign["ORI"].endswith(f"; {float(records['T1', 'ORI', 'none']['perplexity']):.1f}")


def test_the_data_are_those_of_the_run(card, finished_run):
    _, *rows = rows_under(card, "Data")
    counts = {row[1].replace("\\", ""): int(row[2]) for row in rows}
    assert counts == {
        "unsafe.jsonl": 6,
        "safe.jsonl": 6,
        "test_unsafe.jsonl": 3,
        "test_safe.jsonl": 3,
        "pairs.jsonl": 6,
    }
    config = read_config(finished_run[1], ["pairs.safety='on-policy'"])
    assert data_table(config, Run(finished_run[0]))[1][-1] == [
        "prompts of the on-policy pairs, answered by the base model itself",
        "twins:unsafe (training); twins:safe (training)",
        "",
    ]


def test_the_settings_are_those_of_the_training(card, finished_run):
    settings = read_json(finished_run[0] / "T1" / "align" / "done.json")["settings"]["align"]
    _, *rows = rows_under(card, "Settings")
    shown = {name.replace("\\", ""): value for name, value in rows}
    assert shown.keys() == settings.keys()
    assert (shown["freeze"], shown["ablate"], shown["learning_rate"]) == ("safety", "false", "0.001")


def test_the_proof_is_that_of_the_training(finished_run):
    for state in (T1, State("", 2)):
        proof = read_json(finished_run[0] / state.name / "align" / "frozen.json")
        card = card_of(finished_run[0], state)
        assert (
            f"{proof['frozen']} neurons were frozen in the last round. Their weights after it are bit-identical" in card
        )
        assert f"\n{proof['frozen_sha256']}\n" in card
        assert f"what was trained moved by {proof['free_change']:.2%} (relative L2)" in card
    assert "all that were found on T0 and T1, were frozen" in card
    assert "This is round 2" in card
    control = card_of(finished_run[0], State("dpo", 1))
    assert "No neurons were frozen: this model is a control, not the method." in control
    assert "frozen\\_neurons.json" not in control
    assert "frozen_neurons.json" not in control


def test_variants_are_told_in_words(finished_run, tmp_path):
    """What a training of that kind records, so that no model has to be trained for it."""
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    proof, done = (read_json(run / "T1" / "align" / name) for name in ("frozen.json", "done.json"))
    for settings, freeze, said in [
        (
            {"refresh": 16, "refresh_share": 0.5},
            "none",
            "Every 16 steps the safety neurons of the model as it was then",
        ),
        ({"ablate": True, "ablate_share": 0.5}, "safety", "In 50% of the steps the safety neurons were zero"),
        ({"lora_rank": 8}, "safety", "Adapters of rank 8 (LoRA) that were then merged in were trained with DPO"),
        ({}, "random", "random neurons, as many in every layer as were found on T0, were frozen"),
        ({}, "all-but-safety", "all but those found on T0, were frozen"),
        ({}, "another", "neurons were frozen (another)"),
    ]:
        changed = {**done["settings"]["align"], **settings}
        write_json(run / "T1" / "align" / "done.json", {**done, "settings": {**done["settings"], "align": changed}})
        write_json(run / "T1" / "align" / "frozen.json", {**proof, "freeze": freeze})
        assert said in card_of(run)


def test_a_broken_freeze_is_not_passed_over(finished_run, tmp_path):
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    proof = read_json(run / "T1" / "align" / "frozen.json")
    write_json(run / "T1" / "align" / "frozen.json", {**proof, "frozen_identical": False})
    assert "are NOT identical to those before it" in card_of(run)


@pytest.mark.parametrize("missing", ["report/done.json", "report"])
def test_without_a_report_no_results_are_made_up(finished_run, tmp_path, missing):
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    card = card_of(run)
    assert "**There are none**" in card
    assert "No attack on this model is reported here" in card
    assert rows_under(card, "Results") == []
    assert "%" not in card.partition("\n## Results\n")[2].partition("\n## ")[0]


def test_a_report_without_the_state_is_no_report_of_it(finished_run, tmp_path):
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    results = read_json(run / "report" / "results.json")
    results["states"] = [state for state in results["states"] if state["name"] != "T1"]
    write_json(run / "report" / "results.json", results)
    assert "**There are none**" in card_of(run)
    assert "**There are none**" not in card_of(run, State("", 2))


# -- what must not be in it -------------------------------------------------------------------------------------------


def test_no_prompt_and_no_answer_is_in_the_folder(finished_run, tmp_path):
    folder = publish(Run(finished_run[0]), "T1", tmp_path / "T1").folder
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".toml"))
    text += (folder / "reproduce" / "record.json").read_text()
    streams = [path for path in finished_run[0].rglob("*.jsonl") if path.name in ("harmful.jsonl", "benign.jsonl")]
    said = {record.get(key, "") for path in streams for record in read_lines(path) for key in ("prompt", "response")}
    pairs = read_lines(finished_run[0] / "T0" / "pairs" / "pairs.jsonl")
    said |= {pair[key] for pair in pairs for key in ("chosen", "rejected")}
    said = {one for one in said if len(one) > 6}
    assert len(said) > 15
    assert not [one for one in said if one in text]


def test_no_folder_of_this_machine_is_in_the_card(card, finished_run):
    assert str(finished_run[1].parent) not in card
    assert len(local_files(read_config(finished_run[1]))) == 6
    source = read_config(finished_run[1], ["data.unsafe=[{path='/home/me/a_b.csv', count=1000}]"]).data.unsafe[0]
    assert source_text(source) == "a_b.csv (the first 1,000)"


NASTY = "a | b <script>x</script> **c** [d](http://e) `f` ![g](h) # i\n---\nlicense: mit\n```"


def test_names_cannot_break_out(finished_run, tmp_path):
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    config = read_config(run / "config.toml", ["align.label=" + repr(NASTY.replace("\n", " "))])
    write_text(run / "config.toml", to_toml(config))
    results = read_json(run / "report" / "results.json")
    for state in results["states"]:
        state["label"] = NASTY
    write_json(run / "report" / "results.json", results)
    card = card_of(run, base=Base(NASTY, "", Licence("other", "x", "LICENSE")))
    assert ModelCard(card).data.license == "other"
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text)
    plain = MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card_of(run)).text)
    for tag in ("script", "img", "h1", "h2", "td", "a ", "hr", "code"):
        assert page.count(f"<{tag}") == plain.count(f"<{tag}"), tag
    assert "<script" not in page


# -- its code ---------------------------------------------------------------------------------------------------------


def test_the_code_in_the_card_runs(finished_run, tmp_path, monkeypatch):
    folder = publish(Run(finished_run[0]), "T1", tmp_path / "T1").folder
    monkeypatch.chdir(folder)
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    said = []
    for block in blocks:
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(block.replace("max_new_tokens=100", "max_new_tokens=3"), "README.md", "exec"), {})
        said.append(output.getvalue().strip())
    digest, _, rate = said
    assert digest == read_json(finished_run[0] / "T1" / "align" / "frozen.json")["frozen_sha256"]
    assert re.match(r"Rate\(count=\d+, n=72, ", rate)


def test_the_name_on_the_hub_is_used_where_there_is_one(finished_run):
    card = card_of(finished_run[0], hub="owner/new_model")
    assert '\nname = "owner/new_model"\n' in card
    assert "\nsafeneuron audit owner/new_model\n" in card
