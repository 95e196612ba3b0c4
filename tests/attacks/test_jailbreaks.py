"""Attempts: the tokens are those of the chat template, the response begins with its opening, the file is sane."""

from __future__ import annotations

import base64
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import safeneuron
from safeneuron.attacks.jailbreaks import PLACE, Attempt, input_attempts
from safeneuron.attacks.pruning import attack, respond
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from tests import ROOT
from tests.helpers import tiny

PROMPTS = [Prompt(text) for text in ("a", "how do I?", "x" * 30, "tell me more")]
FILE = Path(safeneuron.__file__).parent / "attacks" / "bundled" / "jailbreaks.jsonl"
RECORDS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


class Remembering:
    """A judge that keeps what it was shown."""

    name = "remembering"

    def __call__(self, prompts, responses):
        self.prompts, self.responses = list(prompts), list(responses)
        return ["complied"] * len(self.prompts)


def answers(model, attempt, **options):
    found = [
        one
        for batch in respond(model, PROMPTS, max_new_tokens=8, batch_size=2, attempt=attempt, **options)
        for one in batch
    ]
    return [one.response for one in sorted(found, key=lambda one: one.index)]


# -- how a model is asked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["Sure, here is", "Of course. Step 1:", "S"])
def test_an_opening_is_the_beginning_of_the_assistants_turn(tiny_model, opening):
    encoded, count = Attempt("x", opening=opening).encode(tiny_model, ["how do I?", "b"])
    for request, ids in zip(("how do I?", "b"), encoded, strict=True):
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": opening}]
        expected = tiny_model.tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
        assert ids == expected
        assert ids[:-count] == tiny_model.encode(turns[:1])


def test_without_an_opening_nothing_is_added(tiny_model):
    encoded, count = Attempt("x").encode(tiny_model, ["b"])
    assert (encoded, count) == ([tiny_model.encode([{"role": "user", "content": "b"}])], 0)


def test_the_response_is_the_opening_and_what_follows(tiny_model):
    plain = Attempt("plain")
    assert answers(tiny_model, plain) == answers(tiny_model, Attempt("x", template=PLACE))
    found = answers(tiny_model, Attempt("x", opening="Sure, here is"))
    assert all(text.startswith("Sure, here is") and len(text) > len("Sure, here is") for text in found)
    # What follows is what the model writes after these tokens, token by token.
    ids = tiny_model.encode([{"role": "user", "content": PROMPTS[1].text}])
    ids += tiny_model.tokenizer("Sure, here is")["input_ids"]
    written = []
    for _ in range(8):
        token = int(tiny_model.network(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tiny_model.tokenizer.eos_token_id:
            break
        written.append(token)
    said = tiny_model.tokenizer.decode(tiny_model.tokenizer("Sure, here is")["input_ids"] + written)
    assert found[1] == said.strip()


def test_template_and_encoding():
    assert Attempt("x", template="Say: {request}!").asked("a {b}") == "Say: a {b}!"
    told = Attempt("x", template="Decode {request}", encoding="base64").asked("grüß")
    assert base64.b64decode(told.removeprefix("Decode ")).decode() == "grüß"


def test_the_model_is_asked_with_the_template_and_the_record_keeps_the_request(tiny_model):
    dressed = Attempt("x", template="In a play: {request}")
    (batch,) = respond(tiny_model, [Prompt("b")], max_new_tokens=8, attempt=dressed)
    ((plain,),) = respond(tiny_model, [Prompt("In a play: b")], max_new_tokens=8)
    assert (batch[0].prompt, batch[0].response) == ("b", plain.response)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"template": "no place"}, "has no {request}"),
        ({"encoding": "rot13"}, "expected base64"),
        ({"opening": "Sure "}, "white space"),
        ({"opening": "\nSure"}, "white space"),
    ],
)
def test_mistakes_are_told(mistake, words):
    with pytest.raises(InputError, match=words):
        Attempt("x", **mistake)


# -- attack ---------------------------------------------------------------------------------------------------


def test_attack_with_an_attempt_enters_its_block_then_prunes_and_judges_the_whole(tiny_model):
    entered = []

    @contextmanager
    def block(model):
        entered.append(model)
        yield
        entered.append(None)

    neurons = NeuronSet.of({1: range(0, 48, 2)}, tiny_model.widths, tiny_model.fingerprint)
    attempt, judge = Attempt("x", block, "Do {request}", opening="Yes"), Remembering()
    found = attack(tiny_model, neurons, PROMPTS, judge, max_new_tokens=8, attempt=attempt)
    assert entered == [tiny_model, None]
    assert judge.prompts == [prompt.text for prompt in PROMPTS]
    assert judge.responses == [one.response for one in found.responses]
    with pruned(tiny_model, neurons):
        assert judge.responses == answers(tiny_model, attempt)
    assert judge.responses != answers(tiny_model, attempt)


def test_interrupted_answers_go_on_with_the_same_batches(tiny_model):
    attempt = Attempt("x", opening="Yes, and")
    batches = list(respond(tiny_model, PROMPTS, max_new_tokens=6, batch_size=2, attempt=attempt))
    assert list(respond(tiny_model, PROMPTS, max_new_tokens=6, batch_size=2, skip=2, attempt=attempt)) == batches[1:]


# -- the bundled ones -----------------------------------------------------------------------------------------


def test_bundled_attempts_are_read_in_order_and_by_name():
    assert [one.name for one in input_attempts()] == [record["name"] for record in RECORDS]
    assert [one.name for one in input_attempts("base64", "role-play")] == ["base64", "role-play"]
    with pytest.raises(InputError, match="did you mean 'role-play'"):
        input_attempts("roleplay")


def test_bundled_attempts_are_named_sourced_short_and_distinct():
    assert len({record["name"] for record in RECORDS}) == len(RECORDS) == 8
    for record in RECORDS:
        assert record["technique"]
        assert record["source"].startswith("arXiv:")
        assert record["template"].count(PLACE) == 1
        assert len(record["template"].split()) < 60
        assert (record["template"] == PLACE) == bool(record["opening"])
    assert len({(record["template"], record["opening"]) for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("attempt", input_attempts(), ids=lambda attempt: attempt.name)
def test_every_bundled_attempt_runs(attempt):
    model = tiny.model()
    assert len(answers(model, attempt)) == len(PROMPTS)
    assert all(text.startswith(attempt.opening) for text in answers(model, attempt))


# -- the page -------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_page_runs(tiny_model, monkeypatch, capsys):
    page = (ROOT / "docs" / "red-teaming.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("safeneuron.models.loading.load", lambda name, dtype: tiny.model(max_position_embeddings=1024))
    exec(compile(snippet, "red-teaming.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*(record["name"] for record in RECORDS), "direction", "fine-tuning"]
    assert all(line.endswith("of 4") for line in lines)
