"""The fine-tuning attack with harmless stand-ins: it learns, the seed decides, and the base is bit-identical after."""

from __future__ import annotations

import json

import pytest
import torch

from safeneuron.attacks.finetuning import Demonstration, finetuned, read_demonstrations
from safeneuron.attacks.pruning import respond
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import has_adapters
from tests.helpers import tiny

ROWS = [Demonstration(f"question {number}", "the tide comes in twice a day") for number in range(6)]
PROMPTS = [Prompt("question 1"), Prompt("b")]
OPTIONS = {"steps": 5, "rank": 4, "learning_rate": 1e-2, "batch_size": 3}


def answers(model):
    return [one.response for batch in respond(model, PROMPTS, max_new_tokens=12) for one in batch]


def test_it_learns_and_leaves_nothing_behind():
    model = tiny.model()
    model.network.lm_head.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.network.state_dict().items()}
    attributes, config, flags = (
        set(vars(model.network)),
        model.network.config.to_dict(),
        [parameter.requires_grad for parameter in model.network.parameters()],
    )
    modules, before, known_as = list(map(id, model.network.modules())), answers(model), model.fingerprint
    told = []
    with finetuned(model, ROWS, progress=lambda done, total: told.append((done, total)), **OPTIONS) as losses:
        assert len(losses) == 5
        assert losses[-1] < 0.8 * losses[0]
        assert told == [(step, 5) for step in range(1, 6)]
        assert answers(model) != before
        assert model.fingerprint == known_as
        assert not model.network.training
    assert answers(model) == before
    after = model.network.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in after.items())
    assert (set(vars(model.network)), model.network.config.to_dict()) == (attributes, config)
    assert [parameter.requires_grad for parameter in model.network.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert list(map(id, model.network.modules())) == modules


def test_the_seed_decides():
    def outcome(seed):
        model = tiny.model()
        with finetuned(model, ROWS, seed=seed, **OPTIONS) as losses:
            return losses, answers(model)

    assert outcome(1) == outcome(1)
    assert outcome(1)[0] != outcome(2)[0]


def test_only_the_answers_tokens_are_learnt():
    """The first loss is the mean surprise at the answer's tokens and the end of the turn, given what is before them."""
    model = tiny.model()
    row = ROWS[0]
    prompt = model.encode([{"role": "user", "content": row.request}])
    answer = model.tokenizer(f"{row.answer}<|end|>")["input_ids"]
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    with finetuned(model, [row], steps=1, batch_size=1) as losses:
        assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_base_is_whole_after_an_exception_inside_and_in_training():
    model = tiny.model()
    weights = {name: value.clone() for name, value in model.network.state_dict().items()}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), finetuned(model, ROWS, progress=stop, **OPTIONS):
        pass
    with pytest.raises(RuntimeError, match="enough"), finetuned(model, ROWS, **OPTIONS):
        raise RuntimeError("enough")
    assert not has_adapters(model.network)
    after = model.network.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in after.items())


def test_neurons_are_pruned_inside_the_block():
    model = tiny.model()
    neurons = NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)
    with finetuned(model, ROWS, **OPTIONS):
        tuned = answers(model)
        with pruned(model, neurons):
            assert answers(model) != tuned
        assert answers(model) == tuned


def test_mistakes_are_told(tiny_model):
    with pytest.raises(InputError, match="no answers"), finetuned(tiny_model, []):
        pass
    with pytest.raises(InputError, match="at least 1, found 0 and 8"), finetuned(tiny_model, ROWS, steps=0):
        pass
    with (
        finetuned(tiny_model, ROWS, **OPTIONS),
        pytest.raises(InputError, match="adapters already"),
        finetuned(tiny_model, ROWS, **OPTIONS),
    ):
        pass
    tiny_model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"), finetuned(tiny_model, ROWS):
        pass


# -- where the answers come from ------------------------------------------------------------------------------


def test_demonstrations_from_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) + "\n" for n in range(4)))
    assert read_demonstrations(path) == [Demonstration(f"p{n}", f"r{n}") for n in range(4)]
    assert read_demonstrations(path, count=2) == [Demonstration("p0", "r0"), Demonstration("p1", "r1")]
    path.write_text(json.dumps({"prompt": "p", "said": "r"}) + "\n")
    with pytest.raises(InputError, match=r"line 1: none of the columns prompt, said .* answer, response"):
        read_demonstrations(path)
