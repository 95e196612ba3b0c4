"""What guards share: special tokens are taken out, batches change nothing, and they are loaded from folders."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from safeneuron.errors import InputError
from safeneuron.evaluation.guard import Guard, without_special_tokens
from safeneuron.evaluation.guard_models import (
    HarmBench,
    ShieldGemma,
)
from safeneuron.evaluation.judge import VERDICTS
from tests.helpers.bytewise import bytewise_tokenizer, tiny_llama
from tests.helpers.guards import GUARDS, PROMPTS, RESPONSES, WORDS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytewise_tokenizer(WORDS)


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(tokenizer)


def made(
    kind: type[Guard], network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int = 8
) -> Guard:
    return kind(network, tokenizer, batch_size=batch_size)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a<|eot_id|>b", "ab"),
        ("a<|eot<|eot_id|>_id|>b", "ab"),
        ("</s>[/INST] yes <start_of_turn>model<END_OF_TURN>", " yes model"),
        ("<<SYS>>be kind<</SYS>>", "be kind"),
        ("1 < 2 and [x] <b>", "1 < 2 and [x] <b>"),
        ("bell\x07\x00 and \ud83d half", "bell   and \ufffd half"),
    ],
)
def test_special_tokens_are_taken_out(text, left):
    assert without_special_tokens(text) == left


@pytest.mark.parametrize("kind", GUARDS)
def test_the_batch_changes_no_verdict(kind, network, tokenizer):
    alone = made(kind, network, tokenizer, 1)(PROMPTS, RESPONSES)
    assert all(verdict in VERDICTS for verdict in alone)
    for size in (2, 5):
        assert made(kind, network, tokenizer, size)(PROMPTS, RESPONSES) == alone
    assert made(kind, network, tokenizer)([], []) == []


def test_the_next_token_is_the_same_in_any_batch(network, tokenizer):
    texts = [f"{prompt} {response}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    together = made(HarmBench, network, tokenizer).next_token(texts)
    alone = torch.cat([made(HarmBench, network, tokenizer).next_token([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.sum(dim=1), torch.ones(5), atol=1e-4)
    direct = network(torch.tensor([tokenizer(texts[0])["input_ids"]])).logits[0, -1].softmax(dim=-1)
    assert torch.allclose(together[0], direct, atol=1e-5)


def test_a_guard_without_its_tokens_is_explained(network):
    bare = PreTrainedTokenizerFast(tokenizer_object=bytewise_tokenizer().backend_tokenizer, unk_token="!")
    with pytest.raises(InputError, match="shieldgemma has no token 'Yes'"):
        ShieldGemma(network, bare)


@pytest.mark.parametrize("kind", GUARDS[1:])
def test_guards_are_loaded_from_a_folder(kind, network, tokenizer, tmp_path):
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = kind.load(str(tmp_path), device="cpu", batch_size=3)
    assert guard.batch_size == 3
    assert guard(PROMPTS[:2], RESPONSES[:2]) == made(kind, network, tokenizer)(PROMPTS[:2], RESPONSES[:2])
    with pytest.raises(InputError, match="licence"):
        kind.load(str(tmp_path / "none"))
    with pytest.raises(InputError, match="batch_size must be at least 1, found 0"):
        made(kind, network, tokenizer, 0)
