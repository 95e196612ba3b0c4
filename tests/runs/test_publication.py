"""Publishing a state: what is in the folder, that it is the trained model, and that a stop leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import safeneuron as sn
from safeneuron.cli.app import app
from safeneuron.config.toml import read_config, to_toml
from safeneuron.errors import InputError
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs import publication
from safeneuron.runs.hub import Licence
from safeneuron.runs.model_card import Base
from safeneuron.runs.publication import Publication, base_of, publish
from safeneuron.runs.run import Run
from safeneuron.runs.show import explain
from safeneuron.runtime.files import read_json, sha256_of, write_json, write_text
from safeneuron.training.freezing import Freeze
from tests.helpers import tiny, tiny_run

MODEL = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]  # fmt: skip
OURS = ["README.md", "neurons.json", "reproduce/config.toml", "reproduce/record.json"]


@pytest.fixture(scope="module")
def published(finished_run, tmp_path_factory) -> Publication:
    """T1 of the finished run, for reading only."""
    return publish(Run(finished_run[0]), "T1", tmp_path_factory.mktemp("published") / "T1")


@pytest.fixture
def run(finished_run, tmp_path) -> Run:
    """A copy of the finished run that a test may spoil."""
    shutil.copytree(finished_run[0], tmp_path / "run")
    return Run(tmp_path / "run")


def message_of(run: Run, name: str = "T1", out: Path | None = None, **options) -> str:
    with pytest.raises(InputError) as error:
        publish(run, name, out, **options)
    assert "\n" not in str(error.value)
    assert not list(run.folder.rglob("*.part"))
    return str(error.value)


def with_config(run: Run, *changes: str) -> None:
    """Change the config of a run after it was made, as a user with an editor can."""
    path = run.folder / "config.toml"
    write_text(path, to_toml(read_config(path, changes)))


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_model_and_what_is_told_of_it(published):
    assert published.files == sorted([*MODEL, *OURS, "frozen_neurons.json"])
    assert published.size == sum(path.stat().st_size for path in published.folder.rglob("*") if path.is_file())


def test_plain_transformers_loads_the_trained_model(published, finished_run):
    network = AutoModelForCausalLM.from_pretrained(published.folder)
    trained = load_file(finished_run[0] / "T1" / "align" / "model" / "model.safetensors")
    assert network.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(published.folder)
    messages = [{"role": "user", "content": "hello"}]
    expected = tiny.tokenizer().apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_its_neurons_fit_it_and_no_other_model(published, finished_run):
    model = sn.load(published.folder, dtype="float32")
    neurons = NeuronSet.load(published.folder / "neurons.json")
    assert neurons == NeuronSet.load(finished_run[0] / "T1" / "select" / "neurons.json")
    for file in ("neurons.json", "frozen_neurons.json"):
        with sn.pruned(model, NeuronSet.load(published.folder / file)):
            pass
    other = tiny.model(seed=1)
    with pytest.raises(InputError, match="belongs to another model of the same shape"), sn.pruned(other, neurons):
        pass
    foreign = NeuronSet.of({0: [1]}, other.widths, other.fingerprint)
    with pytest.raises(InputError, match="belongs to another model of the same shape"), sn.pruned(model, foreign):
        pass


@pytest.mark.parametrize(("name", "found_on"), [("T1", ["T0"]), ("T2", ["T0", "T1"])])
def test_the_frozen_set_is_named_and_its_digest_is_that_of_the_proof(finished_run, tmp_path, name, found_on):
    folder = publish(Run(finished_run[0]), name, tmp_path / name).folder
    frozen = NeuronSet.load(folder / "frozen_neurons.json")
    sets = [NeuronSet.load(finished_run[0] / state / "select" / "neurons.json") for state in found_on]
    assert {*frozen.flat.tolist()} == {number for neurons in sets for number in neurons.flat.tolist()}
    assert frozen.label == "frozen"
    proof = read_json(finished_run[0] / name / "align" / "frozen.json")
    for model in (sn.load(folder, dtype="float32"), *([tiny.model()] if name == "T1" else [])):
        assert Freeze(model, frozen).digest() == proof["frozen_sha256"]


def test_a_training_that_froze_nothing_has_no_frozen_set(finished_run, tmp_path):
    assert publish(Run(finished_run[0]), "dpo-T1", tmp_path / "dpo").files == sorted([*MODEL, *OURS])


def test_weights_are_linked_and_the_rest_is_copied(run, monkeypatch):
    trained = run.folder / "T1" / "align" / "model"
    folder = publish(run, "T1").folder
    assert folder == run.folder / "publish" / "T1"
    assert (folder / "model.safetensors").samefile(trained / "model.safetensors")
    assert not (folder / "config.json").samefile(trained / "config.json")

    def no_links(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(publication.os, "link", no_links)
    folder = publish(run, "T1").folder
    assert not (folder / "model.safetensors").samefile(trained / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_shards_stay_shards(run):
    align = run.folder / "T1" / "align"
    whole = AutoModelForCausalLM.from_pretrained(align / "model")
    (align / "model" / "model.safetensors").unlink()
    whole.save_pretrained(align / "model", max_shard_size="60KB")
    done = read_json(align / "done.json")
    files = [path for path in (align / "model").iterdir() if path.is_file()]
    done["outputs"] = {f"model/{path.name}": sha256_of(path) for path in files}
    write_json(align / "done.json", done)
    result = publish(run, "T1")
    assert sum(name.startswith("model-") for name in result.files) > 2
    assert "model.safetensors.index.json" in result.files
    loaded = AutoModelForCausalLM.from_pretrained(result.folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.state_dict().items())


def test_the_licence_of_the_base_goes_with_it(run):
    base = Path(read_config(run.folder / "config.toml").model.name)
    copy = run.folder.parent / "base"
    shutil.copytree(base, copy)
    (copy / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004")
    (copy / "NOTICE").write_text("Made by somebody.")
    with_config(run, f"model.name={copy}")
    result = publish(run, "T1")
    assert {"LICENSE", "NOTICE"} <= set(result.files)
    assert read_json(result.folder / "reproduce" / "record.json")["base"]["license"] == "other"
    assert not any("the licence of" in warning for warning in result.warnings)


# -- the record -------------------------------------------------------------------------------------------------------


def test_the_record_is_that_of_the_run(published, finished_run):
    run = finished_run[0]
    record = read_json(published.folder / "reproduce" / "record.json")
    assert (record["run"], record["state"], record["seed"]) == ("tiny", "T1", 0)
    assert record["fingerprint"] == tiny.model().fingerprint
    assert record["model_sha256"] == {name: sha256_of(published.folder / name) for name in MODEL}
    assert record["training"] == read_json(run / "T1" / "align" / "frozen.json")
    keys = {marker.parent.relative_to(run).as_posix(): read_json(marker)["key"] for marker in run.rglob("done.json")}
    assert record["stage_keys"] == keys
    assert {"data", "T0/pairs", "T1/align", "dpo-T1/judge", "report"} <= keys.keys()
    files = {name: sha256_of(finished_run[1].parent / name) for name in ("unsafe.jsonl", "pairs.jsonl")}
    assert record["source_sha256"]["data"]["unsafe.jsonl"] == files["unsafe.jsonl"]
    assert record["source_sha256"]["T0/pairs"] == {"pairs.jsonl": files["pairs.jsonl"]}
    assert record["versions_when_published"]["torch"] == torch.__version__
    config = published.folder / "reproduce" / "config.toml"
    assert config.read_bytes() == (run / "config.toml").read_bytes()
    assert not any("safeneuron" in str(value) and "/tmp" in str(value) for value in record["commands"])


def test_its_commands_make_the_same_weights_again(published, tmp_path, monkeypatch):
    """The stages that T1 needs, by the published config; all of a run would only take longer."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published.folder, tmp_path / "copy")
    record = read_json(tmp_path / "copy" / "reproduce" / "record.json")
    assert record["commands"] == [
        "safeneuron run reproduce/config.toml --out runs/tiny",
        "safeneuron publish runs/tiny --state T1",
    ]
    for verb in ("measure", "select", "align", "measure", "select"):
        tiny_run.execute(Path("copy/reproduce/config.toml"), Path("runs/tiny"), verb=verb, changes=["align.rounds=1"])
    again = publish(Run(Path("runs/tiny")), "T1")
    repeated = read_json(again.folder / "reproduce" / "record.json")
    assert repeated["model_sha256"] == record["model_sha256"]
    assert repeated["training"] == record["training"]
    assert repeated["stage_keys"].items() <= record["stage_keys"].items()
    assert any("the run has no report that knows T1" in warning for warning in again.warnings)
    assert "**There are none**" in (again.folder / "README.md").read_text()


def test_what_show_says_of_it(published):
    said = "\n".join(explain(published.folder))
    assert "Published as the state T1 of the run 'tiny'" in said
    assert "  safeneuron publish runs/tiny --state T1" in said
    assert "A neuron set: frozen: " in "\n".join(explain(published.folder / "frozen_neurons.json"))
    assert "(licence: unknown)" in "\n".join(explain(published.folder / "reproduce" / "record.json"))


# -- the base model ---------------------------------------------------------------------------------------------------


def test_the_base_is_named_as_the_hub_knows_it(finished_run):
    table = read_config(finished_run[1]).model
    assert base_of(table).label == "model"
    assert base_of(table).hub == ""
    assert base_of(table, base="owner/model", licence="MIT") == Base("owner/model", "owner/model", Licence("mit"))
    embedded = base_of(table.model_copy(update={"name": "embedded"}))
    assert (embedded.hub, embedded.licence.id) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    hub = base_of(table.model_copy(update={"name": "owner/unreachable"}))
    assert (hub.label, hub.hub, hub.licence.known) == ("owner/unreachable", "owner/unreachable", False)
    with pytest.raises(InputError, match="--base expects the base model's name on the Hub"):
        base_of(table, base="a folder")


def test_what_the_user_should_know_is_told(published, finished_run):
    licence, places = published.warnings
    assert "the licence of model is unknown" in licence
    assert "give it with --license" in licence
    assert f"names 6 places of this machine (first: {finished_run[1].parent}/model)" in places


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_states_that_cannot_be_published(run):
    assert "T0 is the base model as it was given" in message_of(run, "T0")
    assert message_of(run, "T3").endswith("has no state 'T3'; it has T1, T2, dpo-T1")
    assert "(did you mean 'dpo-T1'?)" in message_of(run, "dpo-t1")
    with_config(run, "align.rounds=0", "variants={}")
    assert "trains nothing (an audit)" in message_of(run, "T1")


def test_a_state_that_is_not_trained_says_which_command_does_it(run):
    run.remove("T2/align")
    assert message_of(run, "T2").endswith(f"do it first with: safeneuron align {run.folder}")
    run.remove("T1/select")
    assert message_of(run, "T2").endswith(f"safeneuron run {run.folder}/config.toml --out {run.folder}")


def test_a_state_without_neurons_says_which_commands_find_them(run):
    run.remove("T1/select")
    assert message_of(run).endswith(f"do it first with: safeneuron select {run.folder}")
    run.remove("T1/measure")
    assert message_of(run).endswith(f"safeneuron measure {run.folder} && safeneuron select {run.folder}")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_model_that_is_not_what_the_training_wrote(run, file):
    path = run.folder / "T1" / "align" / "model" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = message_of(run)
    assert f"{path} has changed since it was written by the training" in message
    assert message.endswith(f"safeneuron align {run.folder} --redo T1/align")
    path.unlink()
    assert f"{path} is missing" in message_of(run)
    assert not (run.folder / "publish").exists()


def test_files_beside_the_model_are_not_published(run):
    (run.folder / "T1" / "align" / "model" / "notes.txt").write_text("mine")
    assert "notes.txt" not in publish(run, "T1").files


def test_neurons_of_another_training_are_refused(run):
    neurons = NeuronSet.load(run.folder / "T0" / "select" / "neurons.json")
    NeuronSet(neurons.flat[1:], neurons.widths, neurons.fingerprint).save(run.folder / "T0" / "select" / "neurons.json")
    message = message_of(run)
    assert f"{len(neurons)} frozen, found" in message
    assert f"and {len(neurons) - 1}; train again" in message


def test_only_new_empty_or_published_folders_are_written_into(run, tmp_path):
    (tmp_path / "mine").mkdir()
    assert publish(run, "T1", tmp_path / "mine").folder == tmp_path / "mine"
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    publish(run, "T2", tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert "holds files that were not published by safeneuron" in message_of(run, out=tmp_path / "other")
    assert "holds files that were not published" in message_of(run, out=run.folder)
    assert "is a file" in message_of(run, out=tmp_path / "other" / "thesis.txt")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publication.shutil, "copyfile", full)
    assert "cannot be written (the disk is full); free some space" in message_of(run, out=tmp_path / "new" / "T1")
    assert list((tmp_path / "new").iterdir()) == []


def test_ctrl_c_leaves_what_was_there_before(run, monkeypatch):
    folder = publish(run, "T1").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(publication, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(run, "T1")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["T1"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_beside_the_states_and_the_run_goes_on(run):
    done = CliRunner().invoke(app, ["publish", str(run.folder), "--state", "T1", "--license", "apache-2.0"])
    assert done.exit_code == 0, done.output
    said = re.search(r"^wrote (.*): 11 files, \d+\.\d MB$", done.stdout, re.MULTILINE)
    assert said
    assert Path(said[1]) == run.folder / "publish" / "T1"
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: reproduce/config.toml names 6 places")
    record = json.loads((run.folder / "publish" / "T1" / "reproduce" / "record.json").read_text())
    assert record["commands"][1] == "safeneuron publish runs/tiny --state T1 --license apache-2.0"
    watch = tiny_run.execute(run.folder / "config.toml", run.folder)
    assert watch.of("began") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--state", "T0"], "error: T0 is the base model"),
        (["--state", "T1", "--license", "Apache 2"], "error: --license expects the Hub's id"),
        (["--state", "T1", "--base", "model"], "error: --base expects"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, options, said):
    done = CliRunner().invoke(app, ["publish", str(run.folder), *options])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)
    assert not (run.folder / "publish").exists()


def test_a_folder_that_is_no_run(tmp_path):
    done = CliRunner().invoke(app, ["publish", str(tmp_path), "--state", "T1"])
    assert done.exit_code == 2
    assert "is not the folder of a run" in done.stderr
