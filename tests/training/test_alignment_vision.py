"""DPO on pairs with images: frozen neurons, an untouched vision tower, and batches that mix images and text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from safeneuron.attacks.finetuning import Demonstration, finetuned
from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import vision_parameters
from safeneuron.neurons.layout import feed_forwards
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.planning.memory import longest_pair
from safeneuron.training.ablation import Ablation, Refresh
from safeneuron.training.alignment import align
from safeneuron.training.dpo import PICTURES, data_of
from safeneuron.training.settings import TrainingSettings
from tests import rarely
from tests.helpers import tiny, tiny_vision

TRAINING = TrainingSettings(
    learning_rate=1e-2, epochs=2, batch_size=4, micro_batch_size=4, precision="float32", max_length=200, seed=1
)


def pair(number: int, pictured: bool) -> Pair:
    image = tiny_vision.picture(14 + 6 * number, 20, seed=number) if pictured else None
    asked = ({"role": "user", "content": "what " * number + "is it?"},)
    return Pair(asked, f"No, not {number}.", "Yes, " * (number + 1), "test", image)


PAIRS = [pair(0, True), pair(1, False), pair(2, True), pair(3, False)]


def some_neurons(model: Model) -> NeuronSet:
    return NeuronSet.of({0: [1, 5], 1: [3], 2: [7, 11]}, model.widths, model.fingerprint)


def preference(model: Model, one: Pair) -> float:
    """How much more probable the chosen answer is than the rejected one, by the family's own processor, slowly."""
    found = []
    for answer in (one.chosen, one.rejected):
        parts = [{"type": "image"}] * (one.image is not None) + [{"type": "text", "text": one.prompt[0]["content"]}]
        asked = [{"role": "user", "content": parts}]
        whole = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        maker = model.processor
        texts = [maker.apply_chat_template(asked, add_generation_prompt=True), maker.apply_chat_template(whole)]
        images = None if one.image is None else [[one.image]]
        start, given = (maker(text=[text], images=images, return_tensors="pt") for text in texts)
        with torch.inference_mode():
            said = model.network(**given).logits[0, :-1].log_softmax(-1)
        ids = given["input_ids"][0, 1:]
        found.append(said.gather(1, ids[:, None])[start["input_ids"].shape[1] - 1 :].sum())
    return float(found[0] - found[1])


@pytest.mark.parametrize("family", list(tiny_vision.FAMILIES))
def test_every_family_learns_from_mixed_pairs_with_neurons_and_eyes_untouched(family: str) -> None:
    model = tiny_vision.model(family)
    neurons = some_neurons(model)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    result = align(model, PAIRS, neurons, TRAINING)
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "the reference is the given model"
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert result.frozen_identical
    for old, new in zip(
        owned_slices(model, neurons), owned_slices(result.model, neurons), strict=True
    ):  # fmt: skip
        rows = [piece.parameter.index_select(piece.dim, piece.index) for piece in (old, new)]
        assert torch.equal(*rows)
    for old, new in zip(
        vision_parameters(model.network), vision_parameters(result.model.network), strict=True
    ):  # fmt: skip
        assert torch.equal(old, new)
    changed = [
        not torch.equal(a.output.weight, b.output.weight)
        for a, b in zip(feed_forwards(model), feed_forwards(result.model), strict=True)
    ]
    assert all(changed)
    gained = [preference(result.model, one) - preference(model, one) for one in PAIRS]
    assert all(gain > 0 for gain in gained), gained


FAMILIES = [name if name in ("qwen2-vl", "mllama") else rarely(name) for name in tiny_vision.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_margin_in_training_is_that_of_the_processors_own_tensors(family: str) -> None:
    """Pictures, their order, and the answers after them reach policy and reference as the family means them."""
    model = tiny_vision.model(family)
    training = replace(TRAINING, warmup_share=0.0, learning_rate=3e-3)
    after_one_step = align(model, PAIRS, None, replace(training, epochs=1)).model
    seen_at_the_second = align(model, PAIRS, None, training).log[1]["margin"]
    gains = [preference(after_one_step, one) - preference(model, one) for one in PAIRS]
    assert seen_at_the_second == pytest.approx(training.beta * sum(gains) / len(gains), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("changes", [{"at_once": 1}, {"micro_batch_size": 1, "bucketing": False}])
def test_what_shares_a_pass_changes_nothing(changes: dict[str, object]) -> None:
    model = tiny_vision.model("idefics3")
    whole = align(model, PAIRS, None, replace(TRAINING, epochs=1, sft_weight=0.1))
    other = align(model, PAIRS, None, replace(TRAINING, epochs=1, sft_weight=0.1, **changes))
    if "at_once" in changes:
        for one, two in zip(whole.model.network.parameters(), other.model.network.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-4)
    assert whole.log[0]["loss"] == pytest.approx(other.log[0]["loss"], rel=0.05)


def test_pairs_are_cut_at_their_end_and_pictures_stay_whole() -> None:
    model = tiny_vision.model()
    dataset, collator = data_of(model, PAIRS, max_length=36)
    batch = collator(list(dataset))
    assert batch["input_ids"].shape[1] == 36
    assert [features is not None for features in batch[PICTURES]] == [True, False, True, False]
    assert longest_pair(model, PAIRS, 500) > 36
    with pytest.raises(InputError, match="none of the 4 prompts leaves room"):
        align(model, PAIRS, None, replace(TRAINING, max_length=10))


def test_text_alone_trains_too() -> None:
    model = tiny_vision.model("gemma3")
    result = align(
        model, [PAIRS[1], PAIRS[3]], some_neurons(model), replace(TRAINING, batch_size=2, micro_batch_size=2)
    )
    assert result.frozen_identical


def test_ablation_refresh_and_adapters_see_pictures() -> None:
    model = tiny_vision.model()
    neurons = some_neurons(model)
    ablated = align(model, PAIRS, neurons, TRAINING, ablation=Ablation(neurons))
    assert ablated.frozen_identical
    found: list[bool] = []

    def find(policy: Model) -> list[NeuronSet]:
        found.append(policy.processor is model.processor)
        return [neurons]

    refreshed = align(model, PAIRS, None, TRAINING, refresh=Refresh(find, every=1, share=0.5, kl_weight=0.1))
    assert found == [True, True]
    assert refreshed.free_change > 0
    pytest.importorskip("peft")
    adapted = align(model, PAIRS, neurons, replace(TRAINING, lora_rank=2))
    assert adapted.frozen_identical
    for old, new in zip(
        vision_parameters(model.network), vision_parameters(adapted.model.network), strict=True
    ):  # fmt: skip
        assert torch.equal(old, new)


def test_the_fine_tuning_attack_runs_and_is_undone() -> None:
    pytest.importorskip("peft")
    model = tiny_vision.model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with finetuned(model, [Demonstration("what?", "this"), Demonstration("how?", "so")], steps=2, rank=2):
        changed = [
            n for n, value in model.network.state_dict().items() if n in before and not torch.equal(value, before[n])
        ]
        assert not changed, "adapters are beside the weights"
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_a_model_of_text_cannot_learn_from_pictures() -> None:
    with pytest.raises(InputError, match="tiny-llama cannot be shown images"):
        align(tiny.model(), PAIRS, None, TRAINING)
