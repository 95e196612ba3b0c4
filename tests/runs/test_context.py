"""What stages share: one model at a time in memory, and warnings that are told and kept."""

from __future__ import annotations

import pytest

from safeneuron.config.states import BASE, State
from safeneuron.config.toml import read_config
from safeneuron.runs import context
from safeneuron.runs.context import RunContext, StateModels, weights_stage
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json
from tests.helpers.tiny_run import Watch


@pytest.fixture
def loads(monkeypatch):
    """What would be loaded, in order; no model is."""
    loads = []

    def load(table, dtype, quantise, trained):
        loads.append((dtype, quantise, trained))
        return object()

    monkeypatch.setattr(context, "model_of", load)
    return loads


def test_the_last_model_is_kept_and_only_that_one(finished_run, loads):
    folder, config, _ = finished_run
    models = StateModels(read_config(config), Run(folder))
    first = models.of(BASE)
    assert models.of(BASE) is first
    assert models.of(BASE, "float32") is first, "that is the precision of the config"
    trained = models.of(State("dpo", 1))
    assert models.of(BASE) is not first, "it was let go"
    models.release()
    assert models.of(BASE, quantise="4bit") is not trained
    state = folder / "dpo-T1" / "align" / "model"
    assert loads == [("", "none", None), ("", "none", state), ("", "none", None), ("", "4bit", None)]


def test_a_model_beside_the_kept_one_is_loaded_anew(finished_run, loads):
    folder, config, _ = finished_run
    models = StateModels(read_config(config), Run(folder))
    first = models.of(BASE)
    assert models.load(BASE, "bfloat16") is not first
    assert models.of(BASE) is first


def test_warnings_are_told_and_kept(finished_run, tmp_path):
    _, config, _ = finished_run
    watch = Watch()
    RunContext(read_config(config), Run(tmp_path), watch).warn(tmp_path, ["one", "two"])
    assert watch.of("warned") == ["one", "two"]
    assert read_json(tmp_path / "warnings.json") == {"warnings": ["one", "two"]}


def test_the_given_model_was_made_by_no_stage():
    assert weights_stage(BASE) == []
    assert weights_stage(State("dpo", 1)) == ["dpo-T1/align"]
