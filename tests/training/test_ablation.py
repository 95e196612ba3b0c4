"""Ablation of neurons in some steps of a training: evenly spread, by the step's number alone."""

from __future__ import annotations

import pytest

from safeneuron.errors import InputError
from safeneuron.training.ablation import AblateSteps, Ablation
from tests.helpers import tiny
from tests.helpers.frozen_checks import some_neurons
from tests.training.test_freezing import hooks_on


class State:
    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0])
def test_ablated_steps_are_spread_evenly_and_depend_on_the_step_alone(share):
    network = tiny.network()
    neurons = some_neurons(network)

    def steps_from(start: int) -> list[bool]:
        ablate, pattern = AblateSteps(Ablation(neurons, share)), []
        for step in range(start, 60):
            ablate.on_step_begin(None, State(step), None, model=network)
            pattern.append(hooks_on(network) > 0)
            ablate.on_step_end(None, State(step), None)
            assert hooks_on(network) == 0
        return pattern

    straight = steps_from(0)
    assert steps_from(23) == straight[23:]
    for length in (1, 2, 3, 10, 30):
        for start in range(60 - length):
            assert abs(sum(straight[start : start + length]) - share * length) <= 1 + 1e-9


def test_the_reference_is_ablated_in_every_step_or_not_at_all():
    neurons = some_neurons(tiny.network())
    assert Ablation(neurons, reference=True).share == 1.0
    with pytest.raises(InputError, match="ablate_share"):
        Ablation(neurons, share=0.5, reference=True)


def test_a_step_that_ends_with_an_exception_leaves_no_hook():
    network = tiny.network()
    ablate = AblateSteps(Ablation(some_neurons(network)))
    ablate.on_step_begin(None, State(0), None, model=network)
    assert hooks_on(network) > 0
    ablate.close()
    assert hooks_on(network) == 0
