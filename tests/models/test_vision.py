"""Every family with real pictures: batches against one at a time and against the family's own processor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeneuron.attacks.pruning import respond
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models import model as model_module
from safeneuron.models import vision
from safeneuron.models.exchanges import Batch, Exchange, exchanges_of, run_backward
from safeneuron.models.forward import POOLINGS, MeasurementSettings, pooled
from safeneuron.models.loading import load
from safeneuron.models.model import Model, generate
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import feed_forwards
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import Moments
from safeneuron.selection.measurement import measure
from tests.helpers import tiny_vision

PROMPTS = [
    Prompt("what is this?", image=tiny_vision.picture(20, 14, seed=1)),
    Prompt("in words alone"),
    Prompt("and this one, which is much longer?", image=tiny_vision.picture(40, 17, seed=2)),
    Prompt("short"),
]
PICTURED = [PROMPTS[0], PROMPTS[2]]


@pytest.fixture(params=list(tiny_vision.FAMILIES), scope="module")
def eyed(request: pytest.FixtureRequest) -> Model:
    """A model of each family in turn, for reading only."""
    return tiny_vision.model(request.param)


@pytest.fixture
def qwen() -> Model:
    return tiny_vision.model()


def logits(model: Model, rows: list[list[int]], side: str = "right") -> torch.Tensor:
    with torch.inference_mode():
        return model.network(**model.inputs(rows, side)).logits


def vector(model: Model, prompt: Prompt, pooling: str) -> torch.Tensor:
    """The slow way: the family's own processor, one prompt, the whole model, one hook a layer."""
    maker = model.processor
    parts = [{"type": "image"}] * (prompt.image is not None) + [{"type": "text", "text": prompt.text}]
    text = maker.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    given = maker(
        text=[text], images=None if prompt.image is None else [[prompt.image]], return_tensors="pt"
    )  # fmt: skip
    # Mllama leaves out the layer that looks at pictures where there is none.
    seen = [torch.full((1, block.width), torch.nan) for block in feed_forwards(model)]
    hooks = [
        block.output.register_forward_pre_hook(
            lambda _, inputs, layer=block.layer: seen.__setitem__(layer, inputs[0][0])
        )
        for block in feed_forwards(model)
    ]
    with torch.inference_mode():
        model.network(**given)
    for hook in hooks:
        hook.remove()
    pick = {"last": lambda x: x[-1], "mean": lambda x: x.mean(dim=0), "max": lambda x: x.amax(dim=0)}[pooling]
    return torch.cat([pick(one) for one in seen])


def test_a_batch_of_two_sizes_is_each_alone_and_what_the_processor_makes(eyed: Model) -> None:
    rows = [eyed.ask(prompt) for prompt in PICTURED]
    assert len(rows[0]) != len(rows[1])
    alone = [logits(eyed, [row])[0, -1] for row in rows]
    right, left = logits(eyed, rows), logits(eyed, rows, "left")
    native = eyed.processor(
        text=[row.text for row in rows], images=[[prompt.image] for prompt in PICTURED], padding=True,
        padding_side="left", return_tensors="pt",
    )  # fmt: skip
    ours = eyed.inputs(rows, "left")
    assert native.keys() == ours.keys()
    for name, value in native.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
    for place, row in enumerate(rows):
        torch.testing.assert_close(right[place, len(row) - 1], alone[place], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left[place, -1], alone[place], rtol=1e-4, atol=1e-5)


def test_the_picture_is_seen(eyed: Model) -> None:
    first, other = (Prompt("what is this?", image=tiny_vision.picture(20, 14, seed)) for seed in (1, 9))
    assert eyed.ask(first) == eyed.ask(other), "the same tokens"
    gap = logits(eyed, [eyed.ask(first)])[0, -1] - logits(eyed, [eyed.ask(other)])[0, -1]
    assert gap.abs().max() > 0.01


@pytest.mark.parametrize("pooling", POOLINGS)
def test_measuring_with_and_without_pictures_is_one_prompt_at_a_time(eyed: Model, pooling: str) -> None:
    told: list[int] = []
    stats = measure(
        eyed,
        PROMPTS,
        PICTURED,
        MeasurementSettings(pooling=pooling, batch_tokens=200),
        progress=lambda done, _: told.append(done),
    )
    expected = Moments.of(torch.stack([vector(eyed, prompt, pooling) for prompt in PROMPTS]))
    torch.testing.assert_close(stats.unsafe.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.unsafe.variance, expected.variance, rtol=1e-3, atol=1e-4)
    assert told[-1] == 6
    assert told[0] == 2, "the prompts without a picture share a batch"


def test_pruning_under_pictures_is_zeroing_columns_and_leaves_the_weights(eyed: Model) -> None:
    row = [eyed.ask(PROMPTS[0])]
    neurons = NeuronSet.of({0: [1, 5], 2: [7]}, eyed.widths, eyed.fingerprint)
    intact = logits(eyed, row)
    with pruned(eyed, neurons):
        hooked = logits(eyed, row)
    assert torch.equal(logits(eyed, row), intact)
    saved = {}
    for block in feed_forwards(eyed):
        weight = block.output.weight
        saved[block.layer] = weight.detach().clone()
        with torch.no_grad():
            weight[:, neurons.layer(block.layer)] = 0
    by_hand = logits(eyed, row)
    for block in feed_forwards(eyed):
        with torch.no_grad():
            block.output.weight.copy_(saved[block.layer])
    torch.testing.assert_close(hooked, by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hooked, intact)


def test_a_mixed_batch_answers_like_each_prompt_alone(eyed: Model) -> None:
    rows = [eyed.ask(prompt) for prompt in PROMPTS]
    together = dict(one for batch in generate(eyed, rows, 4, batch_size=4) for one in batch)
    alone = {place: next(generate(eyed, [row], 4, batch_size=1))[0][1] for place, row in enumerate(rows)}
    assert together == alone
    assert len(set(together.values())) > 1
    rest = dict(one for batch in generate(eyed, rows, 4, batch_size=2, skip=2) for one in batch)
    assert len(rest) == 2
    assert rest.items() <= together.items()


def test_gradients_reach_every_layer_through_pictures(eyed: Model) -> None:
    exchanges = exchanges_of(eyed, PICTURED, ["yes", "no, never"])
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def hook(_, inputs):
            inputs[0].register_hook(lambda gradient: seen.__setitem__(layer, gradient.clone()))

        return hook

    hooks = [b.output.register_forward_pre_hook(keep(b.layer)) for b in feed_forwards(eyed)]
    try:
        run_backward(eyed, Batch.of(eyed, exchanges))
        both = dict(seen)
        parts = []
        for exchange in exchanges:
            seen.clear()
            run_backward(eyed, Batch.of(eyed, [exchange]))
            parts.append(dict(seen))
    finally:
        for hook in hooks:
            hook.remove()
    assert both.keys() == {0, 1, 2}
    for layer, gradient in both.items():
        for place, part in enumerate(parts):
            width = part[layer].shape[1]
            torch.testing.assert_close(gradient[place, :width], part[layer][0], rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in eyed.network.parameters())


def test_saved_and_loaded_it_sees_the_same(eyed: Model, tmp_path: Path) -> None:
    eyed.save(tmp_path / "model")
    again = load(tmp_path / "model", dtype="float32", device="cpu")
    assert again.without_images == ""
    assert again.fingerprint == eyed.fingerprint
    assert type(again.processor).__name__ == type(eyed.processor).__name__
    rows = [eyed.ask(prompt) for prompt in PICTURED]
    assert [again.ask(prompt) for prompt in PICTURED] == rows
    torch.testing.assert_close(logits(again, rows), logits(eyed, rows), rtol=0, atol=1e-5)


# -- one family is enough for the rest ---------------------------------------------------------------------------------


def test_an_answer_after_a_picture_is_read_like_a_prompt(qwen: Model) -> None:
    """The opening of an attempt and the answers of exchanges follow the picture's tokens."""
    row = qwen.ask(PROMPTS[0]) + [90, 91]  # noqa: RUF005
    assert isinstance(row, vision.ImageTokens)
    given = qwen.inputs([row, qwen.ask(PROMPTS[2])], "right")
    assert given["mm_token_type_ids"].shape == given["input_ids"].shape
    assert given["mm_token_type_ids"].sum() == (given["input_ids"] == tiny_vision.number("<|image_pad|>")).sum()
    assert pooled(qwen, [row], "last").shape == (1, 3 * tiny_vision.WIDTH)
    assert Exchange(row, len(row) - 2).ids == [*row]


def test_responses_name_the_picture_and_judges_see_the_question(qwen: Model, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    tiny_vision.picture().save(path)
    prompts = [Prompt("Is it a cat?", image=str(path), said="Answer."), Prompt("And a dog?")]
    found = sorted(
        (one for batch in respond(qwen, prompts, max_new_tokens=2) for one in batch), key=lambda one: one.index
    )
    assert [one.prompt for one in found] == ["Is it a cat?", "And a dog?"]
    assert [one.to_record().get("image") for one in found] == ["cat.png", None]


def test_a_long_prompt_with_a_picture_is_not_cut(qwen: Model) -> None:
    with pytest.raises(InputError, match=r"'short' with its image is \d+ tokens long, and an image cannot be cut"):
        qwen.ask(Prompt("short", image=tiny_vision.picture()), max_tokens=5)
    assert len(qwen.ask(Prompt("short"), max_tokens=5)) == 5


def test_a_text_with_the_mark_of_pictures_is_refused(qwen: Model) -> None:
    with pytest.raises(InputError, match=r"a text holds '<\|image_pad\|>', which is this model's mark for an image"):
        qwen.ask(Prompt("look: <|image_pad|>"))


def test_a_picture_without_room_is_one_sentence(qwen: Model) -> None:
    with pytest.raises(InputError, match="the model cannot take an image"):
        qwen.ask(Prompt("a line", image=tiny_vision.picture(1000, 1)))


def test_a_model_of_text_cannot_be_shown_pictures(tiny_model: Model) -> None:
    with pytest.raises(InputError, match="tiny-llama cannot be shown images: it is no vision-language model"):
        tiny_model.ask(PROMPTS[0])


def test_without_its_processor_a_model_is_asked_in_text(qwen: Model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    qwen.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    qwen.save(folder)
    (folder / "processor_config.json").unlink()
    wordy = load(folder, dtype="float32", device="cpu")
    assert wordy.processor is None
    assert len(next(generate(wordy, [wordy.ask(Prompt("hello"))], 2, 1))) == 1
    with pytest.raises(InputError, match=r"cannot be shown images: the processor of .* cannot be loaded"):
        wordy.ask(PROMPTS[0])


def test_settings_for_videos_are_kept_where_there_is_no_torchvision(qwen: Model, tmp_path: Path) -> None:
    qwen.save(tmp_path / "one")
    path = tmp_path / "one" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] = {"patch_size": 4, "video_processor_type": "Qwen2VLVideoProcessor"}
    path.write_text(json.dumps(settings))
    load(tmp_path / "one", dtype="float32", device="cpu").save(tmp_path / "two")
    assert json.loads((tmp_path / "two" / path.name).read_text())["video_processor"] == settings["video_processor"]


def test_missing_weights_of_the_tower_are_told(qwen: Model, tmp_path: Path) -> None:
    qwen.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "visual" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of its weights"):
        load(tmp_path / "model", dtype="float32", device="cpu")


def test_without_pillow_it_is_one_sentence(qwen: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"prompts with images need Pillow.*safeneuron\[vision\]"):
        qwen.ask(PROMPTS[0])
    assert qwen.ask(PROMPTS[1])


def test_only_tower_and_projector_are_of_sight(eyed: Model) -> None:
    names = {id(parameter): name for name, parameter in eyed.network.named_parameters()}
    sight = {names[id(parameter)] for parameter in vision.vision_parameters(eyed.network)}
    assert sight
    assert not any("language_model" in name or "text_model" in name or "lm_head" in name for name in sight)
    assert {name for name in names.values() if "visi" in name or "visual" in name} <= sight


def test_few_conversations_with_pictures_are_remembered(qwen: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "MOST_IMAGE_CHATS", 2)
    model = qwen
    asked = [Prompt("what is it?", image=tiny_vision.picture(seed=seed)) for seed in range(3)]
    first = [model.ask(prompt) for prompt in asked]
    assert len(model._image_chats) == 2
    assert model.ask(asked[2]) is first[2]
    assert model.ask(asked[0]) == first[0]
    assert len(model._image_chats) == 2
