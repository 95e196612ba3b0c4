"""`refresh`: only the drawn rows are ablated, the KL term is that of the formula, and resumed training is the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training.ablation import Refresh
from safeneuron.training.alignment import Alignment, align
from safeneuron.training.freezing import Freeze
from safeneuron.training.settings import TrainingSettings
from tests import rarely
from tests.helpers import tiny
from tests.training.test_alignment import (
    LN2,
    PAIRS,
    assert_same_result,
    chosen_neurons,
    dpo_loss,
    interrupt_at,
    log_probability,
    many_neurons,
    state_of,
)

SETTINGS = {"learning_rate": 1e-2, "epochs": 1.0, "batch_size": 8, "micro_batch_size": 8, "warmup_share": 0.0,
            "max_length": 64, "precision": "float32"}  # fmt: skip


def run(model: Model, refresh: Refresh, frozen: NeuronSet | None = None, folder: Path | None = None, progress=None,
        **changes: object) -> Alignment:  # fmt: skip
    training = TrainingSettings(**{**SETTINGS, **changes})
    return align(model, PAIRS, frozen, training, refresh=refresh, checkpoints=folder, progress=progress)


def always(neurons: NeuronSet, **settings: float) -> Refresh:
    return Refresh(lambda running: [neurons], **settings)


# -- the seam ---------------------------------------------------------------------------------------------------


def test_only_the_named_rows_are_pruned():
    model = tiny.model()
    ids = torch.randint(4, 260, (3, 7), generator=torch.Generator().manual_seed(0))
    neurons, rows = many_neurons(model), torch.tensor([True, False, True])
    with torch.no_grad():
        intact = model.network(ids).logits
        with pruned(model, neurons):
            whole = model.network(ids).logits
        with pruned(model, neurons, rows), recorded(model) as recording:
            mixed = model.network(ids).logits
    assert torch.allclose(mixed[rows], whole[rows], atol=1e-5)
    assert torch.allclose(mixed[~rows], intact[~rows], atol=1e-5)
    assert not torch.allclose(whole, intact, atol=1e-2)
    channels = neurons.layer(1)
    assert recording.layers[1][rows][..., channels].abs().max() == 0
    assert recording.layers[1][~rows][..., channels].abs().min() > 0


# -- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_rows_ablated_without_kl_is_algorithm_1(checkpointing):
    model = tiny.model()
    neurons = many_neurons(model)
    result = run(model, always(neurons, share=1.0, kl_weight=0.0), epochs=2.0, gradient_checkpointing=checkpointing)
    assert result.log[0]["loss"] == pytest.approx(dpo_loss(model, model, neurons), rel=1e-4)
    once = run(model, always(neurons, share=1.0, kl_weight=0.0))
    assert result.log[1]["loss"] == pytest.approx(dpo_loss(once.model, model, neurons), rel=1e-4)


def test_half_of_the_pairs_is_ablated():
    """The loss is a mean over pairs: some subset of half of them gives it, and neither none nor all do."""
    model = tiny.model()
    neurons = many_neurons(model)
    found = run(model, always(neurons, share=0.5, kl_weight=0.0)).log[0]["loss"]
    ablated = [dpo_loss_of(model, pair, neurons) for pair in range(8)]
    sums = {LN2 * 4 / 8 + sum(ablated[i] for i in range(8) if mask >> i & 1) / 8
            for mask in range(256) if mask.bit_count() == 4}  # fmt: skip
    assert min(abs(found - value) for value in sums) < 1e-5
    assert abs(found - LN2) > 1e-3
    assert abs(found - sum(ablated) / 8) > 1e-3


def dpo_loss_of(model: Model, number: int, neurons: NeuronSet) -> float:
    pair = PAIRS[number]
    with pruned(model, neurons):
        ours = log_probability(model, pair, pair.chosen) - log_probability(model, pair, pair.rejected)
    theirs = log_probability(model, pair, pair.chosen) - log_probability(model, pair, pair.rejected)
    return float(-functional.logsigmoid(0.1 * (ours - theirs)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_kl_is_that_of_the_formula(family):
    model = tiny.model(family)
    neurons = many_neurons(model)
    with_kl = run(model, always(neurons, share=1.0, kl_weight=0.7)).log[0]["loss"]
    without = run(model, always(neurons, share=1.0, kl_weight=0.0)).log[0]["loss"]
    total, count = 0.0, 0
    for pair in PAIRS:
        prompt = model.encode(pair.prompt)
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*prompt, *model.tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]]])
            with torch.no_grad():
                intact = model.network(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                with pruned(model, neurons):
                    ablated = model.network(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total += float((intact.exp() * (intact - ablated)).sum())
            count += len(intact)
    assert total > 0.01
    assert with_kl - without == pytest.approx(0.7 * total / count, rel=1e-3)


def test_kl_alone_draws_the_ablated_policy_to_the_intact_one():
    model = tiny.model()
    neurons = many_neurons(model)

    def distance(tuned: Model) -> float:
        ids = torch.tensor([model.encode(PAIRS[0].prompt)])
        with torch.no_grad():
            intact = tuned.network(ids).logits.log_softmax(-1)
            with pruned(tuned, neurons):
                ablated = tuned.network(ids).logits.log_softmax(-1)
        return float((intact.exp() * (intact - ablated)).sum(-1).mean())

    settings = {"epochs": 8.0, "learning_rate": 3e-3}
    tied = run(model, always(neurons, share=1.0, kl_weight=5.0), **settings)
    loose = run(model, always(neurons, share=1.0, kl_weight=0.0), **settings)
    assert distance(tied.model) < 0.7 * distance(loose.model)


# -- what is found, and when ------------------------------------------------------------------------------------


def test_neurons_are_found_again_on_the_running_model_and_drawn_from_all_searches():
    model, seen = tiny.model(), []
    small, large = chosen_neurons(model), chosen_neurons(model) | many_neurons(model)

    def find(running: Model) -> Sequence[NeuronSet]:
        assert not running.network.training
        assert running.fingerprint == model.fingerprint
        seen.append(copy.deepcopy(running.network.lm_head.weight.detach()))
        return [small, large]

    run(model, Refresh(find, every=2), epochs=5.0)
    assert len(seen) == 3  # Before steps 0, 2 and 4 of five.
    assert torch.equal(seen[0], model.network.lm_head.weight)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_given_model_and_the_new_one_are_left_clean():
    model = tiny.model()
    before = state_of(model.network)
    result = run(model, always(many_neurons(model)), gradient_checkpointing=True)
    after = state_of(result.model.network)
    for kind in ("hooks", "training", "trainable", "checkpointing", "attributes"):
        assert after[kind] == before[kind], kind


def test_frozen_neurons_stay_as_they_are():
    model = tiny.model()
    frozen = chosen_neurons(model)
    result = run(model, always(many_neurons(model)), frozen=frozen, epochs=3.0)
    assert result.frozen_sha256 == Freeze(result.model, frozen).digest() == Freeze(model, frozen).digest()


@pytest.mark.parametrize("stop", [rarely(1), 3, rarely(4)])
def test_interrupted_training_ends_as_if_it_had_not_been(stop, tmp_path):
    model = tiny.model()

    def find(running: Model) -> Sequence[NeuronSet]:
        """Depends on the weights, as a real search does."""
        strongest = running.network.model.layers[1].mlp.down_proj.weight.norm(dim=0).topk(9).indices.tolist()
        return [NeuronSet.of({1: strongest}, model.widths, model.fingerprint), many_neurons(model)]

    settings = {"epochs": 3.0, "batch_size": 4, "micro_batch_size": 2, "save_every": 1}
    straight = run(model, Refresh(find, every=4), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(model, Refresh(find, every=4), folder=tmp_path, progress=interrupt_at(stop), **settings)
    assert_same_result(run(model, Refresh(find, every=4), folder=tmp_path, **settings), straight)
