"""Texts and images before weights are loaded: how many, their tokens, and what an image asks of the vision tower."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from safeneuron.config.tables import PairSourceTable, SourceTable
from safeneuron.config.toml import read_config
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair, Prompt
from safeneuron.models.vision import run_without_head
from safeneuron.models.vision_tower import towers_of
from safeneuron.planning.lengths import (
    ImageLengths,
    VisionShape,
    available_pairs,
    available_prompts,
    number_of,
    some_of,
)
from safeneuron.planning.plan import ModelSpec, device_asked, plan_for, table_of_needs
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny, tiny_vision
from tests.planning.test_plan import row

FAMILIES = sorted(tiny_vision.FAMILIES)
ASKED = ({"role": "user", "content": "What is this?"},)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_an_image_are_those_of_the_model(family):
    model = tiny_vision.model(family)
    lengths = ImageLengths(model.processor)
    for size in ((20, 14), (40, 40)):
        prompt = Prompt("What is this?", image=tiny_vision.picture(*size))
        assert lengths.tokens(ASKED, prompt.image) == len(model.ask(prompt))
    assert ImageLengths().tokens(ASKED, tiny_vision.picture()) is None
    assert ImageLengths().patches(VisionShape.of(model.network), ASKED, tiny_vision.picture()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_the_places_that_the_tower_computes_on(family):
    model = tiny_vision.model(family)
    vision, lengths = VisionShape.of(model.network), ImageLengths(model.processor)
    prompt = Prompt("What is this?", image=tiny_vision.picture(36, 20))
    places: list[int] = []
    first = towers_of(model)[0].output
    handle = first.register_forward_pre_hook(lambda module, given: places.append(given[0].shape[:-1].numel()))
    with torch.inference_mode():
        run_without_head(model.network, model.inputs([model.ask(prompt)], "right"))
    handle.remove()
    found = lengths.patches(vision, ASKED, prompt.image)
    # A tower may add a place for the whole picture, or fill up to a multiple.
    assert found <= places[0] <= 1.6 * found + 2, (found, places)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_tower_needs_is_at_least_what_a_layer_of_it_has(family):
    """Held against what lives at once in an FFN of the tower: its input and output, both sides of the activation."""
    model = tiny_vision.model(family)
    vision = VisionShape.of(model.network)
    place = towers_of(model)[0]
    assert vision.width >= place.width
    assert vision.need(10, 4) >= 10 * 4 * (2 * place.width + 2 * place.output.out_features)
    with torch.device("meta"):
        empty = type(model.network)(model.network.config)
    assert VisionShape.of(empty) == vision


def test_a_model_of_text_has_no_vision_tower():
    assert VisionShape.of(tiny.network()) is None


def test_a_folder_with_a_config_alone_has_no_processor(tmp_path):
    tiny.network().config.save_pretrained(tmp_path)
    assert ImageLengths.read(str(tmp_path)) == ImageLengths()


def test_some_are_spread_over_all():
    assert list(some_of(range(5))) == [0, 1, 2, 3, 4]
    assert list(some_of(range(100), 4)) == [0, 25, 50, 75]


def test_a_source_is_looked_at_without_drawing_all_of_it(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(40)))
    found = available_prompts(Source(str(tmp_path / "p.jsonl"), as_image=True))
    assert (len(found.all), len(found.with_image)) == (40, 16)
    assert all(prompt.image is not None for prompt in found.with_image)
    assert available_prompts(Source("hub:someone/something")) is None
    assert available_prompts(Source("strongreject")) is None
    assert available_pairs(Source("spa-vl")) is None
    rows = [{"prompt": f"ask {i}", "chosen": "no", "rejected": "yes"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert [len(part) for part in available_pairs(Source(str(tmp_path / "pairs.jsonl"), as_image=True))] == [3, 3]
    tables = [SourceTable(path=str(tmp_path / "p.jsonl")), PairSourceTable(path=str(tmp_path / "pairs.jsonl"))]
    assert number_of(tables) == 43
    assert math.isnan(number_of([SourceTable(path="strongreject")]))


# -- in a plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeing(tmp_path: Path) -> list[str]:
    """Changes that make a config one of drawn questions for a tiny vision-language model."""
    model = tiny_vision.model("qwen2-vl")
    model.save(tmp_path / "model")
    drawn = "[{path='twins:unsafe', split='test', as_image=true}]"
    roles = ("data.unsafe", "data.test_unsafe", "pairs.unsafe")
    return [f'model.name="{tmp_path / "model"}"', "align.rounds=1", *(f"{role}={drawn}" for role in roles)]


def test_images_are_in_the_plan(seeing):
    config = read_config("default", seeing)
    device = device_asked(config, "80GB", 1, True)
    spec = ModelSpec.of(config)
    lines = table_of_needs(config, device)
    (told,) = (line for line in lines if line.startswith("images:"))
    tokens, patches = (int(one.replace(",", "")) for one in (told.split()[3], told.split()[10]))
    shown = available_prompts(Source("twins:unsafe", split="test", as_image=True)).with_image[0]
    model_tokens = spec.lengths.tokens(({"role": "user", "content": shown.written},), shown.image)
    assert tokens == model_tokens
    assert patches == spec.lengths.patches(spec.vision, ASKED, shown.image)
    assert len(row(lines, "vision tower")) == 3


def test_without_the_processor_the_caps_are_taken_and_it_is_said(seeing, tmp_path):
    for path in (tmp_path / "model").iterdir():
        if path.name != "config.json":
            path.unlink()
    config = read_config("default", [*seeing, "measure.max_tokens=777"])
    lines = table_of_needs(config, device_asked(config, "80GB", 1, True))
    assert any("the model's processor is not there" in line for line in lines)
    assert not any(line.startswith("vision tower") for line in lines)


def test_right_before_a_training_images_are_counted(seeing):
    model = tiny_vision.model("qwen2-vl")
    pair = Pair(ASKED, "a", "b", "test", tiny_vision.picture(300, 200))
    made = plan_for(model, [pair], TrainingSettings(micro_batch_size=4, batch_size=4, max_length=2000), None, False)
    assert made.length > len(model.ask(Prompt("What is this?")))
    vision, lengths = VisionShape.of(model.network), ImageLengths(model.processor)
    assert vision.need(2 * 4 * lengths.patches(vision, ASKED, pair.image), 4) > 0
