"""A model whose refusal is wired to known neurons: every selector must find them, every attack must break it."""

from __future__ import annotations

import pytest
import torch

from safeneuron.attacks.checkpoint import write_pruned
from safeneuron.attacks.pruning import attack
from safeneuron.models.exchanges import exchanges_of
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.contrast import activation_contrast, gradient_gap, twin_difference
from safeneuron.selection.linear_probe import THRESHOLD, probe
from safeneuron.selection.measurement import measure
from safeneuron.selection.ranking import Ranking
from safeneuron.selection.saliency import snip, wanda
from safeneuron.selection.scores import score
from tests.helpers import planted

MODEL = planted.model()
NEURONS = planted.neurons(MODEL)
UNSAFE, SAFE = planted.twins(24)
HELD_OUT = planted.twins(10, seed=1)
STATS = measure(MODEL, UNSAFE, SAFE)
REFUSED = exchanges_of(MODEL, UNSAFE, [planted.REFUSAL] * len(UNSAFE))
ANSWERED = exchanges_of(MODEL, SAFE, [planted.COMPLIANCE] * len(SAFE))
RANDOM = NEURONS.random_like(0, avoid=NEURONS)


def unaligned():
    """The planted model before it was taught to refuse: the planted neurons do not see the harm."""
    model = planted.model()
    with torch.no_grad():
        for layer, channels in planted.PLANTED.items():
            model.network.model.layers[layer].mlp.up_proj.weight[channels] = 0
    return model


def ranking(values: torch.Tensor) -> Ranking:
    return Ranking(values, MODEL.widths, MODEL.fingerprint)


SELECTORS = {
    "effect size": lambda: ranking(score(STATS).d),
    "activation shift": lambda: ranking(score(STATS).z),
    "probe": lambda: probe(MODEL, UNSAFE, SAFE),
    "SNIP": lambda: snip(MODEL, REFUSED),
    "Wanda": lambda: wanda(MODEL, REFUSED),
    "contrast": lambda: activation_contrast(MODEL, unaligned(), REFUSED),
    "twins": lambda: twin_difference(STATS),
    "gradient": lambda: gradient_gap(MODEL, REFUSED, ANSWERED),
}


def refusals(answers: list[str]) -> int:
    return sum(map(planted.refuses, answers))


def test_the_model_refuses_what_is_harmful_and_only_that():
    harmful, harmless = (planted.answers(MODEL, prompts) for prompts in HELD_OUT)
    assert refusals(harmful) == len(harmful)
    assert refusals(harmless) == 0


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_finds_exactly_what_is_planted(name):
    found = SELECTORS[name]()
    assert found.top(len(NEURONS) / NEURONS.total) == NEURONS
    assert (found.widths, found.fingerprint) == (MODEL.widths, MODEL.fingerprint)


def test_the_probe_finds_them_at_the_threshold_of_its_source():
    assert probe(MODEL, UNSAFE, SAFE).above(THRESHOLD) == NEURONS


@pytest.mark.parametrize("selector", [snip, wanda])
def test_set_differences_hold_the_planted_neurons(selector):
    found = selector(MODEL, REFUSED).top_of_layers(3 / 48) - selector(MODEL, ANSWERED).top_of_layers(3 / 48)
    assert len(NEURONS - found) == 0


def test_a_selector_without_its_signal_finds_something_else():
    """The tests above can fail: harmless prompts in both classes leave nothing to find."""
    stats = measure(MODEL, SAFE[:12], SAFE[12:])
    for values in (score(stats).d, twin_difference(stats).values):
        assert ranking(values).top(len(NEURONS) / NEURONS.total) != NEURONS


ATTACKS = {
    "zero": lambda neurons: Edit.zero(neurons),
    "mean": lambda neurons: Edit.mean(neurons, STATS),
    "opposite": lambda neurons: Edit.opposite(neurons, STATS),
    "scale 0": lambda neurons: Edit.scale(neurons, 0.0),
    "scale .1": lambda neurons: Edit.scale(neurons, 0.1),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_breaks_the_refusal_and_a_random_set_does_not(name):
    broken, random = (planted.answers(MODEL, HELD_OUT[0], ATTACKS[name](neurons)) for neurons in (NEURONS, RANDOM))
    assert refusals(broken) == 0
    assert refusals(random) == len(random)


def test_one_neuron_at_its_opposite_does_what_one_at_zero_does_not():
    layer, channels = next(iter(NEURONS.layers().items()))
    single = NeuronSet.of({layer: channels[:1].tolist()}, NEURONS.widths, NEURONS.fingerprint)
    zero = planted.answers(MODEL, HELD_OUT[0], single)
    opposite = planted.answers(MODEL, HELD_OUT[0], Edit.opposite(single, STATS, 5.0))
    assert refusals(zero) == len(zero)
    assert refusals(opposite) == 0


def test_transfer_to_a_sibling_breaks_it():
    sibling = planted.model()
    with torch.no_grad():
        for layer in sibling.network.model.layers:
            layer.mlp.down_proj.weight[planted.CONTENT :].neg_()
    assert sibling.fingerprint != MODEL.fingerprint
    broken = planted.answers(sibling, HELD_OUT[0], NEURONS.transferred(sibling.fingerprint, sibling.widths))
    assert refusals(broken) == 0


def test_the_written_checkpoint_complies(tmp_path):
    from safeneuron.models.loading import load

    write_pruned(MODEL, NEURONS, tmp_path / "pruned")
    broken = planted.answers(load(tmp_path / "pruned", dtype="stored"), HELD_OUT[0])
    assert refusals(broken) == 0


def test_the_attack_with_a_judge_counts_it():
    class Planted:
        name = "planted"

        def __call__(self, prompts, responses):
            return ["refused" if planted.refuses(response) else "complied" for response in responses]

    def success(neurons: NeuronSet | None) -> float:
        return attack(MODEL, neurons, HELD_OUT[0], Planted(), max_new_tokens=6).success.rate

    assert (success(None), success(RANDOM), success(NEURONS)) == (0, 0, 1)
