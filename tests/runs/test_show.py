"""``safeneuron show``: every artefact of a run in words, and a sentence for everything else."""

import json
import shutil
from pathlib import Path

import pytest

from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.show import explain
from safeneuron.runtime.files import read_json, read_lines, write_json, write_lines


def told(path: Path) -> str:
    return "\n".join(explain(path))


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as error:
        told(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_artefact_of_a_run_is_explained(finished_run):
    folder, _, _ = finished_run
    artefacts = [path for path in folder.rglob("*") if "model" not in path.parts and path.name != ".lock"]
    assert len(artefacts) > 100
    for path in artefacts:
        assert len(told(path)) > 20, path


def test_a_run_tells_its_stages_and_its_results(finished_run):
    folder, _, _ = finished_run
    text = told(folder)
    assert "A run: 26 finished stages, 0 unfinished." in text
    assert all(f"  {state}/attack: " in text for state in ("T0", "T1", "T2", "dpo-T1"))
    assert all(label in text for label in ("base model", "freeze, round 2", "plain DPO"))


def test_an_unfinished_stage_says_so(finished_run, tmp_path):
    shutil.copytree(finished_run[0] / "T0" / "select", tmp_path / "T0" / "select")
    (tmp_path / "T0" / "select" / "done.json").rename(tmp_path / "T0" / "select" / "started.json")
    write_json(tmp_path / "run.json", {})
    assert "An unfinished stage, T0/select" in told(tmp_path / "T0" / "select")
    assert "0 finished stages, 1 unfinished" in told(tmp_path)
    assert "T0/select: unfinished" in told(tmp_path)


def test_numbers_are_those_of_the_files(finished_run):
    folder = finished_run[0]
    neurons = NeuronSet.load(folder / "T1" / "select" / "neurons.json")
    assert f"{len(neurons)} of 144 neurons" in told(folder / "T1" / "select" / "neurons.json")
    assert neurons.fingerprint in told(folder / "T1" / "select" / "neurons.json")
    stats = told(folder / "T0" / "measure" / "stats.safetensors")
    assert "144 neurons in 3 layers, over 6 unsafe and 6 safe prompts (pooling: last)" in stats
    assert "Scores of 144 neurons" in told(folder / "T0" / "select" / "scores.safetensors")
    frozen = read_json(folder / "T2" / "align" / "frozen.json")
    assert f"{frozen['frozen']} frozen neurons, bit-identical" in told(folder / "T2" / "align" / "frozen.json")
    assert "a training of 4 steps with freeze = 'safety'" in told(folder / "T2" / "align" / "frozen.json")
    planned = told(folder / "T2" / "align" / "memory.json")
    assert "GB of memory; available: " in planned
    assert "All pairs of a micro-batch at once, up to " in planned
    log = read_lines(folder / "T1" / "align" / "train.jsonl")
    assert f"4 training steps: loss {log[0]['loss']:.4f}" in told(folder / "T1" / "align" / "train.jsonl")
    assert "6 preference pairs: 6 " in told(folder / "T0" / "pairs" / "pairs.jsonl")
    counts = read_json(folder / "T0" / "judge" / "ORI" / "harmful.json")
    assert f"ASR {counts['rate']:.1%}" in told(folder / "T0" / "judge" / "ORI" / "harmful.json")
    assert "over-refusal" in told(folder / "T0" / "judge" / "ORI" / "benign.json")
    assert "3 answers" in told(folder / "T0" / "attack" / "ORI" / "harmful.jsonl")
    assert f"{counts['complied']} complied" in told(folder / "T0" / "judge" / "ORI" / "harmful.json")
    assert "6 records with the fields text, category, id" in told(folder / "data" / "unsafe.jsonl")
    assert "only 6 unsafe prompts" in told(folder / "data" / "warnings.json")
    assert "Trainings: main, dpo; judge: refusal-phrases" in told(folder / "config.toml")
    assert "LlamaForCausalLM" in told(folder / "T1" / "align" / "model")
    assert neurons.fingerprint in told(folder / "T1" / "align" / "model")


def test_what_is_not_ours_is_refused_in_one_sentence(tmp_path):
    assert "does not exist" in message_of(tmp_path / "nothing")
    assert "neither a run" in message_of(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not an artefact" in message_of(tmp_path / "notes.txt")
    (tmp_path / "x.safetensors").write_text("hello")
    assert "safetensors" in message_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name",
    ["T0/select/neurons.json", "T1/align/frozen.json", "T1/align/memory.json", "T0/select/thresholds.json",
     "T0/judge/ORI/harmful.json",
     "T1/align/train.jsonl", "T0/pairs/pairs.jsonl", "report/results.json", "data/warnings.json", "data/done.json",
     "T0/attack/ORI/pruned.json", "config.toml", "T0/measure/stats.safetensors", "report/tables/attacks.csv"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "other form", "empty"])
def test_damaged_artefacts_are_one_sentence(finished_run, tmp_path, name, damage):
    path = tmp_path / Path(name).name
    content = (finished_run[0] / name).read_bytes()
    if damage == "cut" and path.suffix != ".csv":
        path.write_bytes(b"[" + content[1 : len(content) // 2] + b"\n")
    elif damage == "other form" and path.suffix in (".json", ".jsonl"):
        path.write_text('{"other": 1}\n')
    elif damage == "empty" and path.name not in ("config.toml", "pairs.jsonl"):
        path.write_text("")
    else:
        pytest.skip("not damage for this kind of file")
    assert str(path) in message_of(path)


def test_a_file_of_json_lines_of_other_things_is_counted(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"a": 1, "b": 2}] * 3)
    assert told(tmp_path / "x.jsonl") == "3 records with the fields a, b."
    (tmp_path / "x.jsonl").write_text(json.dumps([1]) + "\n")
    assert "not its form" in message_of(tmp_path / "x.jsonl")
