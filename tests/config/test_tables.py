"""The tables of what is read and measured: old names are understood, and stages of older runs still count."""

import warnings

import pytest

from safeneuron.config.tables import MeasureTable, ModelTable
from safeneuron.config.toml import parse_config, to_toml
from safeneuron.errors import RenamedSetting

VISION = '[measure]\npart = "{}"\npooling = "mean"\n[align]\nrounds = 0\n'


def test_the_old_name_of_the_vision_tower_is_read_with_a_warning_and_written_anew():
    with pytest.warns(RenamedSetting, match="vision"):
        old = parse_config(VISION.format("eyes"), "old.toml")
    assert old == parse_config(VISION.format("vision"), "new.toml")
    text = to_toml(old)
    assert 'part = "vision"' in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_config(text, "printed") == old


def test_what_decides_the_statistics_is_spelt_as_in_older_runs():
    rest = {"pooling": "mean", "batch_tokens": 2048, "max_tokens": 1024}
    vision = MeasureTable(part="vision", pooling="mean")
    assert list(vision.settings().items()) == [("part", "eyes"), *rest.items()]
    assert vision.stored_part == "eyes"
    assert MeasureTable(pooling="mean").settings() == rest
    assert MeasureTable().stored_part == "text"


def test_where_layers_wait_decides_no_result():
    spread = ModelTable(device_map="auto", max_memory={"0": "70GB"}, offload_folder="x")
    assert spread.settings() == ModelTable().settings()
