"""The verbs ``prune``, ``config``, ``plan`` and ``doctor``: what they print and write, and mistakes in a sentence."""

from __future__ import annotations

import json
import tomllib

import jsonschema
import pytest
import torch

from safeneuron.config.toml import parse_config, presets, read_config
from safeneuron.models import loading
from safeneuron.models.loading import load
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import planted
from tests.helpers.command_line import invoke, refusal


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a planted model, its neurons, a sibling's and another shape's."""
    folder = tmp_path_factory.mktemp("attacks")
    model = planted.model()
    model.save(folder / "model")
    neurons = planted.neurons(model)
    neurons.save(folder / "planted.json")
    (neurons.random_like(0, avoid=neurons) | NeuronSet.of({1: [5]}, model.widths, model.fingerprint)).save(
        folder / "other.json"
    )
    neurons.transferred("0123456789abcdef").save(folder / "sibling.json")
    NeuronSet.of({0: [1]}, (8,), "0123456789abcdef").save(folder / "shape.json")
    return folder


def logits(model) -> torch.Tensor:
    ids = torch.tensor([model.encode([{"role": "user", "content": "what a l!!!oud r!equ!est"}])])
    with torch.no_grad():
        return model.network(input_ids=ids).logits


@pytest.mark.parametrize(("options", "operator"), [([], "zero"), (["--factor", "0.5"], "scale 0.5")])
def test_prune_writes_the_attacked_model(world, tmp_path, options, operator):
    done = invoke("prune", world / "model", world / "planted.json", "--out", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert f"with {operator} at planted: 5 of 144" in done.output
    model, written = (load(folder, dtype="stored") for folder in (world / "model", tmp_path / "out"))
    assert not torch.allclose(logits(written), logits(model), atol=1e-3)
    neurons = NeuronSet.load(world / "planted.json")
    with pruned(model, Edit.scale(neurons, 0.5) if options else neurons):
        torch.testing.assert_close(logits(written), logits(model))


def test_prune_by_transfer_must_be_meant(world, tmp_path):
    arguments = ["prune", world / "model", world / "sibling.json", "--out", tmp_path / "out"]
    assert "another model of the same shape" in refusal(invoke(*arguments))
    assert not (tmp_path / "out").exists()
    assert invoke(*arguments, "--transfer").exit_code == 0
    own = NeuronSet.load(tmp_path / "out" / "neurons.json")
    assert own == NeuronSet.load(world / "planted.json")
    arguments[2] = world / "shape.json"
    assert "only be transferred to a model of the same shape" in refusal(invoke(*arguments, "--transfer"))


@pytest.mark.parametrize(
    ("options", "said"), [(["--value", "1"], "expected zero or scale"), (["--device", "moon"], "device 'moon'")]
)
def test_prune_refuses(world, tmp_path, options, said):
    done = invoke("prune", world / "model", world / "planted.json", "--out", tmp_path / "out", *options)
    assert said in refusal(done)


def test_prune_leaves_the_folders_of_others_alone(world):
    assert "not written by safeneuron prune" in refusal(
        invoke("prune", world / "model", world / "planted.json", "--out", world / "model")
    )


def test_a_verb_that_loads_a_model_keeps_the_libraries_quiet(world, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(loading, "quiet", lambda: calls.append("quiet"))
    assert invoke("doctor", world / "model", "--config-only").exit_code == 0
    assert invoke("prune", world / "model", world / "planted.json", "--out", tmp_path / "pruned").exit_code == 0
    assert calls == ["quiet", "quiet"]


def schema_of(name: str) -> dict:
    done = invoke("config", "--schema", name)
    assert done.exit_code == 0, done.output
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize("name", ["default", "demo", "paper-llama"])
def test_a_printed_config_is_what_its_schema_says(name):
    schema, values = schema_of("config"), tomllib.loads(invoke("config", name).stdout)
    jsonschema.validate(values, schema)
    values["align"]["freeze"] = "all"
    with pytest.raises(jsonschema.ValidationError, match="all-but-safety"):
        jsonschema.validate(values, schema)


def test_a_saved_neuron_set_is_what_its_schema_says(world):
    schema, record = schema_of("neurons"), json.loads((world / "planted.json").read_text())
    jsonschema.validate(record, schema)
    with pytest.raises(jsonschema.ValidationError, match="widths"):
        jsonschema.validate({name: value for name, value in record.items() if name != "widths"}, schema)


def test_the_results_of_a_run_are_what_their_schema_says(finished_run):
    schema, record = schema_of("results"), json.loads((finished_run[0] / "report" / "results.json").read_text())
    jsonschema.validate(record, schema)
    del record["states"][0]["attacks"][0]["harmful"]["rate"]
    with pytest.raises(jsonschema.ValidationError, match="rate"):
        jsonschema.validate(record, schema)


def test_a_schema_of_nothing_is_refused():
    done = invoke("config", "--schema", "nothing")
    assert done.exit_code == 2
    assert "neurons" in done.output


@pytest.mark.parametrize("name", presets())
def test_config_prints_the_preset(name):
    done = invoke("config", name)
    assert done.exit_code == 0
    assert parse_config(done.stdout, "printed") == read_config(name)
    assert "# " in done.stdout


def test_config_without_a_name_prints_the_default():
    assert tomllib.loads(invoke("config").stdout) == tomllib.loads(invoke("config", "default").stdout)


def test_plan_prints_a_table_without_the_weights(finished_run, tmp_path):
    """Of a model whose folder has nothing but its config."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((finished_run[1].parent / "model" / "config.json").read_text())
    changes = ("--set", f'model.name="{tmp_path / "model"}"', "--set", "variants={}")
    done = invoke("plan", finished_run[1], *changes, "--device-memory", "24GB", "--devices", 2, "--replicated")
    lines = done.stdout.splitlines()
    assert lines[1] == "on each of 2 devices with 24.0 GB, each of which holds everything (DDP); figures in GB"
    assert lines[3].split() == ["measure", "attack", "align"]
    assert ["fits", "yes", "yes", "yes"] in [line.split() for line in lines]
    assert lines[-3].startswith("align: fits with 1 pair at a time, up to ")
    assert lines[-1].startswith("time: unknown")
    timed = invoke("plan", finished_run[1], *changes, "--like", finished_run[0]).stdout.splitlines()
    assert [line.split()[0] for line in timed[-10:-3]][-4:] == ["attack", "judge", "pairs", "align"]
    assert "expects a size such as 80GB" in refusal(invoke("plan", "demo", "--device-memory", "huge"))
