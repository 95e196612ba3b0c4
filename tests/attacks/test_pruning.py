"""The attack: rates against closed formulas, answers under pruning, perplexity against a token-by-token version."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.attacks.pruning import Response, attack, perplexity, respond
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import VERDICTS
from safeneuron.evaluation.rates import Rate, share_of, verdict_rates, wilson
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import tiny

PROMPTS = [Prompt(text, "topic", str(number)) for number, text in enumerate(("a", "how do I?", "x" * 30, "tell", "b"))]


class Stub:
    """A judge that gives the verdicts it was made with, and remembers what it was shown."""

    name = "stub"

    def __init__(self, verdicts: Sequence[str]) -> None:
        self.verdicts = list(verdicts)
        self.shown: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        self.shown.append((list(prompts), list(responses)))
        return self.verdicts


def some_neurons(model: Model) -> NeuronSet:
    return NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)


# -- rates ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_wilson_is_the_closed_formula(n, data):
    count = data.draw(st.integers(0, n))
    found = wilson(count, n)
    z, p = 1.959963984540054, count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.count, found.n, found.rate) == (count, n, p)
    assert found.low == pytest.approx(middle - half, abs=1e-12)
    assert found.high == pytest.approx(middle + half, abs=1e-12)
    assert 0 <= found.low <= p <= found.high <= 1


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == Rate(0, 0, 0.0, 0.0, 1.0)


def test_wilson_of_the_paper():
    # Half of 313: the paper's tables are good to about 5.5 points.
    found = wilson(157, 313)
    assert (found.high - found.low) / 2 == pytest.approx(0.055, abs=0.001)


def test_cannot_say_is_left_out_of_both():
    verdicts = ["complied", "refused", "cannot say", "harmless", "incoherent", "complied", "cannot say"]
    assert (share_of("complied", verdicts).count, share_of("complied", verdicts).n) == (2, 5)
    assert share_of("refused", verdicts).rate == pytest.approx(1 / 5)
    assert share_of("complied", ["cannot say"] * 3) == wilson(0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(VERDICTS), max_size=30))
def test_outcome_counts_every_verdict(verdicts):
    found = verdict_rates(verdicts, "refused")
    assert found["n"] == len(verdicts) == sum(found[verdict] for verdict in VERDICTS)
    judged = len(verdicts) - found["cannot say"]
    assert found["rate"] == pytest.approx(found["refused"] / judged if judged else 0.0)
    assert found["low"] <= found["rate"] <= found["high"]


# -- answers --------------------------------------------------------------------------------------------------


def test_respond_answers_every_prompt_with_its_index(tiny_model):
    batches = list(respond(tiny_model, PROMPTS, max_new_tokens=4, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    found = [response for batch in batches for response in batch]
    assert sorted(response.index for response in found) == list(range(len(PROMPTS)))
    assert all(response.prompt == PROMPTS[response.index].text for response in found)
    assert list(respond(tiny_model, PROMPTS, max_new_tokens=4, batch_size=2, skip=2)) == batches[1:]


def test_response_as_a_record():
    assert Response(3, "p", "r").to_record() == {"index": 3, "prompt": "p", "response": "r"}


def test_attack_judges_the_answers_of_the_pruned_model(tiny_model):
    neurons = some_neurons(tiny_model)
    judge = Stub(["complied", "refused", "cannot say", "complied", "incoherent"])
    found = attack(tiny_model, neurons, PROMPTS, judge, max_new_tokens=6, batch_size=2)
    with pruned(tiny_model, neurons):
        expected = [one for batch in respond(tiny_model, PROMPTS, max_new_tokens=6, batch_size=2) for one in batch]
    assert found.responses == sorted(expected, key=lambda response: response.index)
    assert judge.shown == [([p.text for p in PROMPTS], [response.response for response in found.responses])]
    assert found.verdicts == judge.verdicts
    assert found.success == wilson(2, 4)


def test_attack_with_nothing_pruned_is_the_model_itself(tiny_model):
    verdicts = ["refused"] * 5
    plain = attack(tiny_model, None, PROMPTS, Stub(verdicts), max_new_tokens=6)
    under = attack(tiny_model, some_neurons(tiny_model), PROMPTS, Stub(verdicts), max_new_tokens=6)
    again = attack(tiny_model, None, PROMPTS, Stub(verdicts), max_new_tokens=6)
    assert plain.responses == again.responses
    assert [one.response for one in plain.responses] != [one.response for one in under.responses]
    assert plain.success == wilson(0, 5)


def test_attack_leaves_the_model_whole_when_the_judge_fails(tiny_model):
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        raise RuntimeError("no judge today")

    broken.name = "broken"
    with pytest.raises(RuntimeError, match="no judge"):
        attack(tiny_model, some_neurons(tiny_model), PROMPTS, broken, max_new_tokens=2)
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())


def test_attack_with_neurons_of_another_model(tiny_model):
    with pytest.raises(InputError, match="another model of the same shape"):
        attack(tiny_model, some_neurons(tiny.model(seed=1)), PROMPTS, Stub([]))


# -- perplexity -----------------------------------------------------------------------------------------------

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


def slow_perplexity(model: Model, text: str, window: int) -> float:
    """Each token's probability from a pass of its own over what the window has before it."""
    ids = model.tokenizer(text)["input_ids"]
    surprises = []
    for position in range(1, len(ids)):
        start = (position - 1) // window * window
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([ids[start:position]])).logits[0, -1].double()
        surprises.append(-torch.log_softmax(logits, dim=0)[ids[position]].item())
    return math.exp(math.fsum(surprises) / len(surprises))


@pytest.mark.parametrize("window", [1, 7, 24, 36, 72, 512])
def test_perplexity_is_that_of_one_token_at_a_time(tiny_model, window):
    assert perplexity(tiny_model, TEXT, window=window) == pytest.approx(
        slow_perplexity(tiny_model, TEXT, window), rel=1e-4
    )


def test_perplexity_of_a_model_that_knows_nothing(tiny_model):
    with torch.no_grad():
        tiny_model.network.lm_head.weight.zero_()
    assert perplexity(tiny_model, TEXT) == pytest.approx(260)


def test_perplexity_sees_the_pruning(tiny_model):
    plain = perplexity(tiny_model, TEXT)
    with pruned(tiny_model, some_neurons(tiny_model)):
        assert perplexity(tiny_model, TEXT) != pytest.approx(plain, rel=1e-3)
    assert perplexity(tiny_model, TEXT) == plain


@pytest.mark.parametrize("value", [1e30, torch.nan])
def test_perplexity_of_a_broken_model_is_large_but_finite(tiny_model, value):
    with torch.no_grad():
        tiny_model.network.lm_head.weight[5] = value
        tiny_model.network.lm_head.weight[6] = -value
    assert perplexity(tiny_model, TEXT) == math.exp(700)


@pytest.mark.parametrize("text", ["", "a"])
def test_perplexity_needs_two_tokens(tiny_model, text):
    with pytest.raises(InputError, match="at least two tokens"):
        perplexity(tiny_model, text)
    assert perplexity(tiny_model, "ab") > 0
