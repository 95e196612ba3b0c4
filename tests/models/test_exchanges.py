"""Streaming passes: sums over batches, ranks and halves, answers as tokens, and the loss that gradients come from."""

from __future__ import annotations

import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import (
    Batch,
    Exchange,
    common_ending,
    exchanges_of,
    log_probabilities,
    prompts_alone,
    run_backward,
    total_over_batches,
)
from safeneuron.neurons.layout import feed_forwards
from safeneuron.runtime import distributed
from safeneuron.selection.saliency import snip
from tests.helpers import tiny

PROMPTS = [Prompt(text) for text in ("how do I?", "a", "tell me all of it, and then some", "why?")]
ANSWERS = ["no", "I would rather not say.", "yes", "because"]


def lengths(part: list[Exchange]) -> torch.Tensor:
    return torch.tensor([len(part), sum(len(one.ids) for one in part)], dtype=torch.float64)


# -- sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_every_exchange_counts_once(tiny_model, batch_tokens):
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    assert torch.equal(total_over_batches(exchanges, lengths, batch_tokens), lengths(exchanges))


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches(tiny_model, monkeypatch, world, batch_tokens):
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    monkeypatch.setattr(distributed, "world", lambda: world)
    monkeypatch.setattr(distributed, "each_tensor", lambda own: [own])
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(total_over_batches(exchanges, lengths, batch_tokens))
    assert torch.equal(sum(shares), lengths(exchanges))
    assert all(share[0] < 4 for share in shares) or batch_tokens > 1


def test_a_batch_that_is_too_much_is_run_in_halves(tiny_model, monkeypatch):
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    expected = snip(tiny_model, exchanges)
    forward = tiny_model.network.model.forward

    def small(**given):
        if len(given["inputs_embeds"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(**given)

    monkeypatch.setattr(tiny_model.network.model, "forward", small)
    with pytest.warns(UserWarning, match="ran out of memory"):
        found = snip(tiny_model, exchanges)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-7)


def test_sums_that_are_not_finite():
    with pytest.raises(InputError, match="not finite"):
        total_over_batches([Exchange([1], 1)], lambda part: torch.tensor([torch.nan]), 10)


# -- answers as tokens ----------------------------------------------------------------------------------------


def test_exchanges_are_the_prompt_through_the_template_and_the_answer(tiny_model):
    found = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    for one, alone, prompt, answer in zip(found, prompts_alone(tiny_model, PROMPTS), PROMPTS, ANSWERS, strict=True):
        text = tiny_model.tokenizer.decode(one.ids)
        assert text == f"<|user|>{prompt.text}<|end|><|assistant|>{answer}"
        assert (alone.ids, alone.prompt) == (one.ids[: one.prompt], one.prompt)
    (short,) = exchanges_of(tiny_model, PROMPTS[2:3], ["a long answer"], max_tokens=5)
    assert tiny_model.tokenizer.decode(short.ids) == "ome<|end|><|assistant|>a lon"


def test_a_batch_knows_which_tokens_are_answers(tiny_model):
    exchanges = exchanges_of(tiny_model, PROMPTS, ANSWERS)
    batch = Batch.of(tiny_model, exchanges)
    for row, one in enumerate(exchanges):
        assert batch.ids[row][batch.mask[row].bool()].tolist() == one.ids
        assert batch.ids[row][batch.answer[row]].tolist() == one.ids[one.prompt :]


def test_the_common_ending_is_what_the_template_adds(tiny_model):
    assert common_ending(tiny_model) == 2
    tiny_model.tokenizer.chat_template = "{{ messages[0]['content'] }}<|end|><|user|>?<|assistant|>"
    assert common_ending(tiny_model) == 4


# -- the loss -------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model(family):
    model = tiny.model(family)
    ids = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        hidden = model.network.get_decoder()(input_ids=ids).last_hidden_state[0]
        expected = model.network(input_ids=ids).logits[0].log_softmax(-1)
        torch.testing.assert_close(log_probabilities(model.network, hidden), expected)


def test_each_row_has_its_own_gradients(family):
    model = tiny.model(family)
    exchanges = exchanges_of(model, PROMPTS, ANSWERS)
    output = feed_forwards(model)[1].output

    def slopes(part: list[Exchange]) -> torch.Tensor:
        seen = []
        handle = output.register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(seen.append) and None)
        run_backward(model, Batch.of(model, part))
        handle.remove()
        return seen[0]

    together = slopes(exchanges)
    for row, one in enumerate(exchanges):
        alone = slopes([one])[0]
        torch.testing.assert_close(together[row, : len(one.ids)], alone, rtol=1e-3, atol=1e-6)
        assert alone.any()
        assert not together[row, len(one.ids) :].any()
