"""Pairs from the model's own answers: cut at sentences, judged, and dropped where they teach nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.attacks.pruning import respond
from safeneuron.data.prompts import fitting_refusal
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import sounds_like_refusal
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training.on_policy import LEADS, on_policy_pairs, refusal, whole_sentences

UNSAFE = [Prompt(text) for text in ("steal", "burn it all", "how to harm?", "x" * 20)]
SAFE = [Prompt(text) for text in ("good day", "cook")]


class Stub:
    """A judge that decides by the prompt alone, and remembers what it was shown each time."""

    name = "stub"

    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict = verdict
        self.shown: list[dict[str, str]] = []

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        self.shown.append(dict(zip(prompts, responses, strict=True)))
        return [self.verdict(prompt) for prompt in prompts]


def some_neurons(model: Model) -> NeuronSet:
    return NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)


def own_answers(model: Model, prompts: list[Prompt], neurons: NeuronSet | None) -> dict[str, str]:
    with pruned(model, neurons):
        found = [one for batch in respond(model, prompts, max_new_tokens=12, batch_size=2) for one in batch]
    return {one.prompt: whole_sentences(one.response) for one in found}


def pairs_of(model: Model, judge: Stub, **options: int) -> list[Pair]:
    return on_policy_pairs(model, UNSAFE, SAFE, some_neurons(model), judge, max_new_tokens=12, batch_size=2, **options)


def said(prompt: Prompt) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt.text},)


def test_pairs_are_built_from_both_models(tiny_model):
    judge = Stub(lambda prompt: "harmless" if prompt == "cook" else "complied")
    found = pairs_of(tiny_model, judge)
    attacked = own_answers(tiny_model, UNSAFE, some_neurons(tiny_model))
    intact = own_answers(tiny_model, UNSAFE + SAFE, None)
    assert all(attacked[prompt.text] != intact[prompt.text] for prompt in UNSAFE)
    unsafe = [Pair(said(p), refusal(p, 0), attacked[p.text], "on-policy:unsafe") for p in UNSAFE]
    safe = [Pair(said(p), intact[p.text], refusal(p, 1), "on-policy:safe") for p in SAFE]
    assert [pair for pair in found if pair.source == "on-policy:unsafe"] == unsafe
    assert [pair for pair in found if pair.source == "on-policy:safe"] == safe
    assert len(found) == len(unsafe + safe)
    # The judge is shown the answers as they will stand in the pairs.
    assert judge.shown == [attacked, intact]


@pytest.mark.parametrize("verdict", ["refused", "incoherent", "cannot say"])
def test_intact_answer_stands_in_where_the_attack_gave_none(tiny_model, verdict):
    judge = Stub(lambda prompt: verdict if prompt == "steal" and len(judge.shown) == 1 else "complied")
    rejected = {pair.prompt[0]["content"]: pair.rejected for pair in pairs_of(tiny_model, judge)}
    attacked, intact = judge.shown
    assert rejected["steal"] == intact["steal"] != attacked["steal"]
    assert rejected["burn it all"] == attacked["burn it all"] != intact["burn it all"]


def test_empty_answer_is_never_used(tiny_model, monkeypatch):
    monkeypatch.setattr("safeneuron.training.on_policy.whole_sentences", lambda text: "")
    with pytest.raises(InputError, match="no answer that could be used"):
        pairs_of(tiny_model, Stub(lambda prompt: "complied"))


def test_unsafe_and_safe_take_turns(tiny_model):
    found = pairs_of(tiny_model, Stub(lambda prompt: "complied"))
    assert [pair.prompt[0]["content"] for pair in found] == [
        "steal",
        "good day",
        "burn it all",
        "cook",
        "how to harm?",
        "x" * 20,
    ]
    for pair in found:
        unsafe = pair.source == "on-policy:unsafe"
        assert pair.chosen.startswith(LEADS) == unsafe
        assert pair.rejected.startswith(LEADS) == (not unsafe)


def test_refusal_is_a_short_opening_and_then_reasons():
    prompts = [Prompt(f"request {number}") for number in range(60)]
    found = [refusal(prompt, 0) for prompt in prompts]
    assert found == [refusal(prompt, 0) for prompt in prompts]
    assert found != [refusal(prompt, 1) for prompt in prompts]
    openings = [next(lead for lead in LEADS if text.startswith(lead)) for text in found]
    assert set(openings) == set(LEADS)
    for prompt, text, opening in zip(prompts, found, openings, strict=True):
        assert text == f"{opening} {fitting_refusal(prompt, 0)}"
        assert sounds_like_refusal(text)


@pytest.mark.parametrize("verdict", ["refused", "incoherent", "cannot say"])
def test_answers_that_teach_nothing_are_dropped(tiny_model, verdict):
    found = pairs_of(tiny_model, Stub(lambda prompt: verdict if prompt in ("steal", "cook") else "complied"))
    assert {pair.prompt[0]["content"] for pair in found} == {"burn it all", "how to harm?", "x" * 20, "good day"}


def test_one_class_may_be_empty(tiny_model):
    found = pairs_of(tiny_model, Stub(lambda prompt: "refused" if prompt in ("good day", "cook") else "complied"))
    assert {pair.source for pair in found} == {"on-policy:unsafe"}
    judge = Stub(lambda prompt: "complied")
    alone = on_policy_pairs(tiny_model, [], SAFE, some_neurons(tiny_model), judge, max_new_tokens=4)
    assert {pair.source for pair in alone} == {"on-policy:safe"}


def test_no_pair_at_all_is_an_error(tiny_model):
    with pytest.raises(InputError, match=r"no answer that could be used.*\[pairs\]"):
        pairs_of(tiny_model, Stub(lambda prompt: "refused"))


def test_seed_decides_the_refusals_and_nothing_else(tiny_model):
    judge = Stub(lambda prompt: "complied")
    first, again, other = (pairs_of(tiny_model, judge, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert [pair.rejected for pair in first if "unsafe" in pair.source] == [
        pair.rejected for pair in other if "unsafe" in pair.source
    ]
    assert first != other


def test_progress_reaches_the_total(tiny_model):
    calls: list[tuple[int, int]] = []
    on_policy_pairs(
        tiny_model,
        UNSAFE,
        SAFE,
        some_neurons(tiny_model),
        Stub(lambda prompt: "complied"),
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(3, 10), (4, 10), (7, 10), (10, 10)]


def test_model_is_left_without_hooks(tiny_model):
    def broken(prompt: str) -> str:
        raise RuntimeError("no judge today")

    with pytest.raises(RuntimeError, match="no judge"):
        pairs_of(tiny_model, Stub(broken))
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two. Thr", "One. Two."),
        ("One. Two.", "One. Two."),
        ("Really? Yes! And th", "Really? Yes!"),
        ('He said "no." Then he', 'He said "no."'),
        ("(It is so.) Then he", "(It is so.)"),
        # A point inside a number or an address ends nothing.
        ("It costs 3.50 at shop.example.org and more", "It costs 3.50 at shop.example.org and more"),
        # Lines end, too.
        ("First line\nsecond li", "First line"),
        # A list is cut before the item that broke off, not after its number.
        ("Do this:\n1. Cut it.\n2. Mix it.\n3. Br", "Do this:\n1. Cut it.\n2. Mix it."),
        ("Do this:\n1. Cut it.\n2.", "Do this:\n1. Cut it."),
        # Cutting would leave less than a third, so nothing is cut.
        ("Yes. And now a very long sentence that never ends and goes on", None),
        ("no end at all", None),
        ("  spaces  ", "spaces"),
        ("", ""),
    ],
)
def test_whole_sentences(text, expected):
    assert whole_sentences(text) == (text if expected is None else expected)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet='ab1.!?\n ")', max_size=30))
def test_whole_sentences_is_a_beginning_that_stays(text):
    found = whole_sentences(text)
    assert text.strip().startswith(found)
    assert found == found.strip()
    assert bool(found) == bool(text.strip()) or len(text) > 0
    assert len(found) >= len(text.strip()) / 3 - 1 or not text[: len(text) // 2].strip()
