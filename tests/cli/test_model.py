"""The verbs ``compare``, ``prune`` and ``config``: what they print and write, and one sentence for every mistake."""

from __future__ import annotations

import json
import tomllib

import jsonschema
import pytest
import torch

from safeneuron.models import loading
from safeneuron.models.loading import load
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.ranking import Ranking
from tests.cli.test_app import invoke, refusal
from tests.helpers import planted


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a planted model, its neurons, others, a sibling's, another shape's, and two rankings."""
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
    for seed in (0, 1):
        values = torch.randn(144, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Ranking(values, model.widths, model.fingerprint, f"r{seed}").save(folder / f"r{seed}.safetensors")
    return folder


def logits(model) -> torch.Tensor:
    ids = torch.tensor([model.encode([{"role": "user", "content": "what a l!!!oud r!equ!est"}])])
    with torch.no_grad():
        return model.network(input_ids=ids).logits


def test_compare_prints_the_overlap(world):
    done = invoke("compare", world / "planted.json", world / "other.json")
    assert done.exit_code == 0, done.output
    assert "first   planted: 5 of 144 neurons (3.47%)" in done.output
    assert "in both 1; by chance 0.3; Jaccard 0.100" in done.output
    assert "correlation" not in done.output


def test_compare_with_rankings(world):
    scores = ["--scores", world / "r0.safetensors", world / "r1.safetensors"]
    done = invoke("compare", world / "planted.json", world / "planted.json", *scores)
    assert done.exit_code == 0, done.output
    assert "Jaccard 1.000" in done.output
    assert "rank correlation of the scores" in done.output


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("sibling.json", "different models of one shape"),
        ("shape.json", "the second of one with 1 layers and 8 neurons"),
        ("nothing.json", "nothing.json"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(world, second, said):
    assert said in refusal(invoke("compare", world / "planted.json", world / second))


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


def test_a_schema_of_nothing_is_refused():
    done = invoke("config", "--schema", "nothing")
    assert done.exit_code == 2
    assert "neurons" in done.output
