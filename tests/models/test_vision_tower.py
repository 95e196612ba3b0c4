"""The neurons of the eyes: found in every family, measured against hooks by hand, pruned like zeroed columns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision_tower import fingerprint_of_towers, measure_towers, towers_of, towers_pruned
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.scores import select
from tests.helpers import tiny, tiny_vision

FOUND = {
    "qwen2-vl": (["visual.blocks.0.mlp", "visual.blocks.1.mlp", "visual.merger.mlp"], [64, 64, 64]),
    "qwen2.5-vl": (["visual.blocks.0.mlp", "visual.blocks.1.mlp", "visual.merger.mlp"], [24, 24, 64]),
    "gemma3": (["vision_tower.encoder.layers.0.mlp", "vision_tower.encoder.layers.1.mlp"], [24, 24]),
}


def prompts(seed: int) -> list[Prompt]:
    return [Prompt("what?", image=tiny_vision.picture(14 + n, 20, seed + n)) for n in range(3)]


def last(model: Model, prompt: Prompt) -> torch.Tensor:
    with torch.inference_mode():
        return model.network(**model.inputs([model.ask(prompt)], "right")).logits[0, -1]


@pytest.mark.parametrize("family", list(tiny_vision.FAMILIES))
def test_every_ffn_of_the_eyes_is_found_and_none_of_the_text(family: str) -> None:
    model = tiny_vision.model(family)
    places = towers_of(model)
    names = [place.name.removeprefix("model.") for place in places]
    assert not any("language_model" in name or "text_model" in name or "attn" in name for name in names)
    if family in FOUND:
        assert (names, [place.width for place in places]) == FOUND[family]
    # Every linear layer of an FFN named so by its family is in a place that was found.
    named = [name.removeprefix("model.") for name, module in model.network.named_modules() if name.endswith(".mlp")]
    named = [name for name in named if "language_model" not in name and "text_model" not in name]
    assert set(named) <= set(names)


@pytest.mark.parametrize("family", list(tiny_vision.FAMILIES))
def test_measured_pruned_and_left_as_it_was(family: str) -> None:
    model = tiny_vision.model(family)
    places, unsafe, safe = towers_of(model), prompts(1), prompts(9)
    rows = []
    for prompt in unsafe:
        # Qwen3-VL runs its FFNs in another order than it names them.
        here: dict[str, torch.Tensor] = {}

        def keep(_, inputs, name, here=here):
            here[name] = inputs[0].flatten(0, -2).mean(dim=0)

        hooks = [place.output.register_forward_pre_hook(partial(keep, name=place.name)) for place in places]
        last(model, prompt)
        for hook in hooks:
            hook.remove()
        rows.append(torch.cat([here[place.name] for place in places]))
    told: list[int] = []
    stats = measure_towers(model, unsafe, safe, progress=lambda done, total: told.append(done))
    by_hand = torch.stack(rows).double()
    torch.testing.assert_close(stats.unsafe.mean, by_hand.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert told == [1, 2, 3, 4, 5, 6]
    neurons = select(stats, density=0.2)
    assert neurons.fingerprint == fingerprint_of_towers(model) != model.fingerprint
    intact = last(model, unsafe[0])
    with towers_pruned(model, neurons):
        hooked = last(model, unsafe[0])
    assert torch.equal(last(model, unsafe[0]), intact)
    assert not torch.allclose(hooked, intact)
    with torch.no_grad():
        for number, channels in neurons.layers().items():
            places[number].output.weight[:, channels] = 0
    torch.testing.assert_close(last(model, unsafe[0]), hooked, rtol=1e-4, atol=1e-5)


def test_neither_kind_of_neuron_is_taken_for_the_other(tmp_path: Path) -> None:
    model = tiny_vision.model()
    eyes = select(measure_towers(model, prompts(1), prompts(9), "max"), density=0.1)
    text = NeuronSet.of({0: [1]}, model.widths, model.fingerprint)
    with pytest.raises(InputError), pruned(model, eyes):
        pass
    with pytest.raises(InputError), towers_pruned(model, text):
        pass
    eyes.save(tmp_path / "eyes.json")
    assert NeuronSet.load(tmp_path / "eyes.json") == eyes


def test_what_cannot_be_measured() -> None:
    model = tiny_vision.model()
    with pytest.raises(InputError, match="'hm' has no image"):
        measure_towers(model, [Prompt("hm"), Prompt("hm")], prompts(1))
    with pytest.raises(InputError, match="pooling 'last' has no meaning for images"):
        measure_towers(model, prompts(1), prompts(2), "last")
    with pytest.raises(InputError, match="tiny-llama has no FFN in a vision tower or projector"):
        towers_of(tiny.model())
