"""Tokens of texts and pictures before weights are loaded, and what a picture asks of the vision tower: as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safeneuron.config.toml import read_config
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair, Prompt
from safeneuron.models.vision import run_without_head
from safeneuron.models.vision_tower import towers_of
from safeneuron.planning.duration import Clock, Speed
from safeneuron.planning.lengths import Lengths, VisionShape, available_pairs, available_prompts, some_of
from safeneuron.planning.plan import ModelSpec, device_asked, plan_for, table_of_needs
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny, tiny_vision
from tests.planning.test_plan import row

FAMILIES = sorted(tiny_vision.FAMILIES)
ASKED = ({"role": "user", "content": "What is this?"},)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_picture_are_those_of_the_model(family):
    model = tiny_vision.model(family)
    lengths = Lengths(model.tokenizer, model.processor)
    for size in ((20, 14), (40, 40)):
        prompt = Prompt("What is this?", image=tiny_vision.picture(*size))
        assert lengths.of(ASKED, prompt.image) == len(model.ask(prompt))
    assert lengths.of(ASKED) is not None
    assert Lengths(model.tokenizer).of(ASKED, tiny_vision.picture()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_the_places_that_the_tower_computes_on(family):
    model = tiny_vision.model(family)
    eyes, lengths = VisionShape.of(model.network), Lengths(model.tokenizer, model.processor)
    prompt = Prompt("What is this?", image=tiny_vision.picture(36, 20))
    places: list[int] = []
    first = towers_of(model)[0].output
    handle = first.register_forward_pre_hook(lambda module, given: places.append(given[0].shape[:-1].numel()))
    with torch.inference_mode():
        run_without_head(model.network, model.inputs([model.ask(prompt)], "right"))
    handle.remove()
    found = lengths.patches(eyes, ASKED, prompt.image)
    # A tower may add a place for the whole picture, or fill up to a multiple.
    assert found <= places[0] <= 1.6 * found + 2, (found, places)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_tower_needs_is_at_least_what_a_layer_of_it_has(family):
    """Held against what lives at once in an FFN of the tower: its input and output, both sides of the activation."""
    model = tiny_vision.model(family)
    eyes = VisionShape.of(model.network)
    place = towers_of(model)[0]
    assert eyes.width >= place.width
    assert eyes.need(10, 4) >= 10 * 4 * (2 * place.width + 2 * place.output.out_features)
    with torch.device("meta"):
        empty = type(model.network)(model.network.config)
    assert VisionShape.of(empty) == eyes


def test_a_model_of_text_has_no_eyes():
    assert VisionShape.of(tiny.network()) is None


def test_without_a_tokenizer_tokens_are_guessed():
    bare = Lengths()
    assert bare.of(({"role": "user", "content": "x" * 40},)) == 10 + 24
    assert bare.words("x" * 41) == 11
    assert bare.of(ASKED, tiny_vision.picture()) is None


def test_a_folder_with_a_config_alone_has_no_tokenizer(tmp_path):
    tiny.network().config.save_pretrained(tmp_path)
    assert Lengths.read(str(tmp_path)) == Lengths()


def test_some_are_spread_over_all():
    assert list(some_of(range(5))) == [0, 1, 2, 3, 4]
    assert list(some_of(range(100), 4)) == [0, 25, 50, 75]


def test_a_source_is_looked_at_without_drawing_all_of_it(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(40)))
    found = available_prompts(Source(str(tmp_path / "p.jsonl"), as_image=True))
    assert (len(found.all), len(found.pictured)) == (40, 16)
    assert all(prompt.image is not None for prompt in found.pictured)
    assert available_prompts(Source("hub:someone/something")) is None
    assert available_prompts(Source("strongreject")) is None
    assert available_pairs(Source("spa-vl")) is None
    rows = [{"prompt": f"ask {i}", "chosen": "no", "rejected": "yes"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert [len(part) for part in available_pairs(Source(str(tmp_path / "pairs.jsonl"), as_image=True))] == [3, 3]


# -- in a plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeing(tmp_path: Path) -> list[str]:
    """Changes that make a config one of drawn questions for a tiny vision-language model."""
    model = tiny_vision.model("qwen2-vl")
    model.save(tmp_path / "model")
    drawn = "[{path='twins:unsafe', split='test', as_image=true}]"
    roles = ("data.unsafe", "data.test_unsafe", "pairs.unsafe")
    return [f'model.name="{tmp_path / "model"}"', "align.rounds=1", *(f"{role}={drawn}" for role in roles)]


def test_pictures_are_in_the_plan(seeing):
    config = read_config("default", seeing)
    device = device_asked(config, "80GB", 1, True)
    paper = ModelSpec.of(config, words=True)
    lines = table_of_needs(config, device, paper)
    (told,) = (line for line in lines if line.startswith("pictures:"))
    tokens, patches = (int(one.replace(",", "")) for one in (told.split()[3], told.split()[10]))
    shown = available_prompts(Source("twins:unsafe", split="test", as_image=True)).pictured[0]
    model_tokens = paper.lengths.of(({"role": "user", "content": shown.written},), shown.image)
    assert tokens == model_tokens
    assert patches == paper.lengths.patches(paper.eyes, ASKED, shown.image)
    assert len(row(lines, "vision tower")) == 3
    clock = Clock(paper, device, Speed(1e12, 1e12), Speed(1e12, 1e12))
    amount = clock.prompts(config.data.test_unsafe, 10_000)
    assert (amount.length, amount.patches) == (pytest.approx(model_tokens, rel=0.1), patches)
    assert clock.looking(amount) > 0


def test_without_the_processor_the_caps_are_taken_and_it_is_said(seeing, tmp_path):
    for path in (tmp_path / "model").iterdir():
        if path.name != "config.json":
            path.unlink()
    config = read_config("default", [*seeing, "measure.max_tokens=777"])
    lines = table_of_needs(config, device_asked(config, "80GB", 1, True))
    assert any("the model's processor is not at hand" in line for line in lines)
    assert not any(line.startswith("vision tower") for line in lines)


def test_right_before_a_training_pictures_are_counted(seeing):
    model = tiny_vision.model("qwen2-vl")
    pair = Pair(ASKED, "a", "b", "test", tiny_vision.picture(300, 200))
    made = plan_for(model, [pair], TrainingSettings(micro_batch_size=4, batch_size=4, max_length=2000), None, False)
    assert made.length > len(model.ask(Prompt("What is this?")))
    eyes, lengths = VisionShape.of(model.network), Lengths(model.tokenizer, model.processor)
    assert eyes.need(2 * 4 * lengths.patches(eyes, ASKED, pair.image), 4) > 0
