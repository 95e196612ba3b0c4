"""Refusal-direction ablation: the projection by hand, nothing written along it, a planted direction found."""

from __future__ import annotations

import pytest
import torch

from safeneuron.attacks import refusal_direction
from safeneuron.attacks.pruning import respond
from safeneuron.attacks.refusal_direction import Direction, candidate_directions, find_direction, without_direction
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.anatomy import decoder_of
from tests.helpers import tiny, tiny_vision

UNSAFE = [Prompt(f"{word} Z") for word in ("how", "what is this", "tell me", "a", "please do it now")]
SAFE = [Prompt(f"{word} y") for word in ("why", "who is that", "ask him", "b", "please go there now")]
IDS = torch.tensor([[65, 70, 80, 90, 100, 110]])


def random_direction(seed: int = 0) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(tiny.HIDDEN, generator=generator)
    return Direction(vector / vector.norm(), 1, 1.0)


def streams(model: Model) -> list[torch.Tensor]:
    """The residual stream before every layer and before the last norm, as it is read."""
    seen = []
    decoder = decoder_of(model.network)
    readers = [*decoder.layers, decoder.norm]
    if hasattr(decoder.layers[0], "pre_feedforward_layernorm"):
        readers += [layer.pre_feedforward_layernorm for layer in decoder.layers]
    else:
        readers += [layer.post_attention_layernorm for layer in decoder.layers]
    handles = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for part in readers]
    with torch.no_grad():
        model.network(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen


def test_nothing_is_written_along_the_direction_in_any_family(family):
    model, direction = tiny.model(family), random_direction()
    along = [(stream @ direction.vector).abs().max() for stream in streams(model)]
    assert min(along) > 1e-3
    with without_direction(model, direction):
        written = streams(model)
    assert len(written) == 2 * tiny.LAYERS + 1
    for stream in written:
        assert (stream @ direction.vector).abs().max() < 1e-5 * stream.abs().max()


def test_equals_weights_orthogonalised_by_hand():
    """W' = W - r r^T W for every matrix that writes into the stream (section 4.1 of the paper)."""
    model, by_hand, direction = tiny.model(), tiny.model(), random_direction()
    unit = direction.vector
    with torch.no_grad():
        embedding = by_hand.network.get_input_embeddings().weight
        embedding -= (embedding @ unit).unsqueeze(-1) * unit
        for layer in decoder_of(by_hand.network).layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix -= torch.outer(unit, unit @ matrix)
        expected = by_hand.network(input_ids=IDS).logits
        with without_direction(model, direction):
            found = model.network(input_ids=IDS).logits
        plain = model.network(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_the_model_is_bit_identical_afterwards_also_after_an_exception(tiny_model):
    weights = {name: value.clone() for name, value in tiny_model.network.state_dict().items()}
    before = list(respond(tiny_model, UNSAFE, max_new_tokens=8))
    with without_direction(tiny_model, random_direction()):
        assert list(respond(tiny_model, UNSAFE, max_new_tokens=8)) != before
    with pytest.raises(RuntimeError, match="enough"), without_direction(tiny_model, random_direction()):
        raise RuntimeError("enough")
    assert list(respond(tiny_model, UNSAFE, max_new_tokens=8)) == before
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model.network.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in tiny_model.network.modules())


def test_candidates_are_differences_of_means(tiny_model):
    """Against one prompt at a time, from the hidden states that transformers returns."""

    def states(prompts):
        rows = []
        for prompt in prompts:
            ids = torch.tensor([tiny_model.encode([{"role": "user", "content": prompt.text}])])
            with torch.no_grad():
                hidden = tiny_model.network(input_ids=ids, output_hidden_states=True).hidden_states
            rows.append(torch.stack([layer[0, -1] for layer in hidden[: tiny.LAYERS]]).double())
        return torch.stack(rows)

    harmful, harmless = states(UNSAFE), states(SAFE)
    found = candidate_directions(tiny_model, UNSAFE, SAFE, batch_size=2)
    # The last token is always the same, so before the first layer there is nothing to tell; 0.8 of 3 layers are 2.
    assert [one.layer for one in found] == [1]
    gap = harmful.mean(0)[1] - harmless.mean(0)[1]
    torch.testing.assert_close(found[0].vector.double(), gap / gap.norm(), rtol=1e-4, atol=1e-4)
    distances = [((part - part.mean(0))[:, 1] ** 2).sum() for part in (harmful, harmless)]
    spread = sum(distances) / (len(UNSAFE) + len(SAFE) - 2)
    assert found[0].separation == pytest.approx(float(gap.norm() / spread.sqrt()), rel=1e-4)


def planted(layer: int, strength: float, layers: int = 10) -> tuple[Model, torch.Tensor]:
    """A model whose stream gets ``strength`` r at the last token after ``layer``, if the prompt holds a Z."""
    model = Model(tiny.network(layers=layers), tiny.tokenizer(), "planted", "planted")
    unit = random_direction(7).vector
    token = model.tokenizer("Z")["input_ids"][0]
    seen = {}
    decoder = decoder_of(model.network)
    decoder.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.update(ids=inputs[0]))

    def plant(module, inputs, output):
        harmful = (seen["ids"] == token).any(dim=1, keepdim=True).unsqueeze(-1)
        return output + strength * harmful * unit

    decoder.layers[layer].register_forward_hook(plant)
    return model, unit


def test_a_planted_direction_is_found():
    model, unit = planted(layer=2, strength=50.0)
    found = find_direction(model, UNSAFE, SAFE)
    assert found.layer >= 3
    assert abs(float(found.vector @ unit)) > 0.95
    before, after = (one for one in candidate_directions(model, UNSAFE, SAFE) if one.layer in (2, 3))
    assert after.separation > 5 * before.separation


def test_a_judge_chooses_the_direction_that_leaves_the_fewest_refusals(tiny_model, monkeypatch):
    candidates = [Direction(random_direction(layer).vector, layer, 9.0 - layer) for layer in range(6)]
    monkeypatch.setattr(refusal_direction, "candidate_directions", lambda *_, **options: candidates)
    refusals = {0: 3, 2: 1, 4: 1}
    tried = []

    class Judge:
        name = "counting"

        def __call__(self, prompts, responses):
            assert list(prompts) == ["v", "w", "x"]
            tried.append(len(tried))
            count = list(refusals.values())[tried[-1]]
            return ["refused"] * count + ["complied"] * (3 - count)

    validation = [Prompt(text) for text in "vwx"]
    found = find_direction(tiny_model, UNSAFE, SAFE, judge=Judge(), validation=validation, tries=3, max_new_tokens=2)
    assert (found.layer, len(tried)) == (2, 3)


@pytest.mark.parametrize("name", list(tiny_vision.FAMILIES))
def test_pictures_have_a_direction_too(name):
    model = tiny_vision.model(name)
    unsafe, safe = (
        [Prompt(f"{n} {kind}", image=tiny_vision.picture(seed=n)) for n in range(3)] for kind in ("harms", "helps")
    )
    found = candidate_directions(model, unsafe, safe, batch_size=2)
    assert found[-1].vector.shape == (tiny_vision.HIDDEN,)
    inputs = model.inputs([model.ask(prompt) for prompt in unsafe], "right")
    with torch.no_grad():
        before = model.network(**inputs).logits
        with without_direction(model, found[-1]):
            after = model.network(**inputs).logits
        assert torch.equal(model.network(**inputs).logits, before)
    assert (after - before).abs().max() > 1e-3


def test_layers_that_some_prompts_leave_out():
    model = tiny_vision.model("mllama")
    with pytest.raises(InputError, match=r"2 of the 3 layers of tiny-mllama ran on a prompt"):
        candidate_directions(model, UNSAFE, SAFE)


def test_the_same_prompts_in_both_classes_have_no_direction(tiny_model):
    with pytest.raises(InputError, match="tell the unsafe prompts from the safe"):
        find_direction(tiny_model, SAFE, SAFE)


def test_a_direction_of_another_width(tiny_model):
    with (
        pytest.raises(InputError, match="has 32 values"),
        without_direction(tiny_model, Direction(torch.ones(5), 0, 1.0)),
    ):
        pass


def test_values_that_are_not_finite(tiny_model):
    with torch.no_grad():
        tiny_model.network.get_input_embeddings().weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        candidate_directions(tiny_model, [Prompt("<|system|>"), Prompt("b")], SAFE)
