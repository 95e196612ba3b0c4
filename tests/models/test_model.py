"""Loading, encoding, padding and generating with tiny models of every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.models.model import Model, Sampling, generate, pad
from tests.helpers import tiny

TEXTS = ("a", "how do I do it?", "tell me more", "x" * 40, "what then", "b", "good morning to you")
CPU = torch.device("cpu")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# -- encode ---------------------------------------------------------------------------------------------------


def test_encode_uses_the_template_with_the_generation_prompt(tiny_model):
    ids = tiny_model.encode([*said("hi there"), {"role": "assistant", "content": "yo"}, *said("é")])
    expected = "<|user|>hi there<|end|><|assistant|>yo<|end|><|user|>é<|end|><|assistant|>"
    assert tiny_model.tokenizer.decode(ids) == expected
    # Special tokens of the template are single tokens, not spelt out.
    assert ids[0] == 1
    assert ids[-1] == 2
    assert all(isinstance(token, int) for token in ids)


def test_encode_adds_no_second_beginning(tiny_model):
    """Most templates write the beginning token themselves; the tokenizer must not add another one."""
    plain = tiny_model.encode(said("hi"))
    tiny_model.tokenizer.bos_token = "<|system|>"
    tiny_model.tokenizer.add_bos_token = True
    tiny_model.tokenizer.update_post_processor()
    assert tiny_model.tokenizer("hi")["input_ids"][0] == 3
    assert tiny_model.encode(said("hi")) == plain


def test_encode_without_a_template_is_the_bare_text(tiny_model):
    tiny_model.tokenizer.chat_template = None
    assert tiny_model.encode(said("hi")) == tiny_model.tokenizer("hi")["input_ids"]
    two = [*said("hi"), {"role": "assistant", "content": "yo"}]
    assert tiny_model.tokenizer.decode(tiny_model.encode(two)) == "hi\nyo"


# -- pad ------------------------------------------------------------------------------------------------------


def test_pad_by_example():
    ids, mask = pad([[5, 6, 7], [8]], 9, "left", CPU)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[5, 6, 7], [8]], 9, "right", CPU)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(0, 9),
    st.sampled_from(["left", "right"]),
)
def test_pad_keeps_every_row_under_its_mask(rows, value, side):
    ids, mask = pad(rows, value, side, CPU)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, found, kept in zip(rows, ids, mask, strict=True):
        assert found[kept == 1].tolist() == row
        assert (found[kept == 0] == value).all()
        steps = kept.diff()
        assert (steps >= 0).all() if side == "left" else (steps <= 0).all()


# -- generate -------------------------------------------------------------------------------------------------


def slow_tokens(model: Model, ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding written out: no batch, no padding, no cache."""
    rows = list(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model.network(input_ids=torch.tensor([rows])).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        rows.append(token)
    return rows[len(ids) :]


def slow_answer(model: Model, ids: list[int], max_new_tokens: int) -> str:
    return model.tokenizer.decode(slow_tokens(model, ids, max_new_tokens), skip_special_tokens=True).strip()


def answers(model: Model, prompts: list[list[int]], **options: int) -> dict[int, str]:
    settings = {"max_new_tokens": 8, "batch_size": 4, **options}
    found = [pair for batch in generate(model, prompts, **settings) for pair in batch]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_left_padding_gives_the_same_tokens_as_one_by_one(family):
    model = tiny.model(family)
    prompts = [model.encode(said(text)) for text in TEXTS]
    together = answers(model, prompts, batch_size=len(prompts))
    assert together == {index: slow_answer(model, ids, 8) for index, ids in enumerate(prompts)}
    assert len(set(together.values())) > 3


def test_batches_are_by_length_and_hold_every_prompt_once(tiny_model):
    prompts = [tiny_model.encode(said(text)) for text in TEXTS]
    batches = list(generate(tiny_model, prompts, max_new_tokens=2, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    order = [index for batch in batches for index, _ in batch]
    assert sorted(order) == list(range(len(TEXTS)))
    lengths = [len(prompts[index]) for index in order]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("skip", [0, 3, 6, 7, 9])
def test_skip_continues_with_the_same_batches(tiny_model, skip):
    prompts = [tiny_model.encode(said(text)) for text in TEXTS]
    whole = list(generate(tiny_model, prompts, max_new_tokens=4, batch_size=3))
    rest = list(generate(tiny_model, prompts, max_new_tokens=4, batch_size=3, skip=skip))
    assert rest == whole[-(-skip // 3) :]


def test_only_whole_batches_can_be_skipped(tiny_model):
    with pytest.raises(ValueError, match="whole batches"):
        list(generate(tiny_model, [[5], [6], [7]], max_new_tokens=1, batch_size=2, skip=1))


def test_no_prompts_no_answers(tiny_model):
    assert list(generate(tiny_model, [], max_new_tokens=1, batch_size=2)) == []


@pytest.mark.parametrize("ends", [None, 250, [250, 251]])
def test_an_answer_ends_at_the_end_token_of_the_chat_form(tiny_model, ends):
    """Also where the generation settings name only the end token of the base model, or none."""
    ids = tiny_model.encode(said(TEXTS[0]))
    tokens = slow_tokens(tiny_model, ids, 8)
    end = tokens[3]
    assert end not in tokens[:3]
    tiny_model.network.generation_config.eos_token_id = ends
    tiny_model.tokenizer.eos_token = tiny_model.tokenizer.convert_ids_to_tokens(end)
    # A byte does not become a special token by being the end token, so it is still shown.
    assert answers(tiny_model, [ids]) == {0: tiny_model.tokenizer.decode(tokens[:4]).strip()}


def test_generation_is_greedy_whatever_the_checkpoint_prefers(tiny_model):
    prompts = [tiny_model.encode(said(text)) for text in TEXTS]
    plain = answers(tiny_model, prompts)
    preferred = {"do_sample": True, "temperature": 5.0, "top_k": 5, "repetition_penalty": 3.0, "num_beams": 3}
    tiny_model.network.generation_config.update(**preferred)
    assert answers(tiny_model, prompts) == plain


# -- sampling ------------------------------------------------------------------------------------------------


def sampled(model, sampling, **options):
    prompts = [model.encode(said(text)) for text in TEXTS]
    return dict(one for batch in generate(model, prompts, 6, 3, sampling=sampling, **options) for one in batch)


def test_the_seed_decides_what_is_drawn_and_nothing_else_is_touched(tiny_model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sampled(tiny_model, Sampling(seed=1))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(9)
    assert sampled(tiny_model, Sampling(seed=1)) == first
    assert sampled(tiny_model, Sampling(seed=2)) != first
    rest = sampled(tiny_model, Sampling(seed=1), skip=3)
    assert rest == {index: first[index] for index in rest}
    assert len(rest) == len(TEXTS) - 3


def test_the_same_prompt_is_answered_in_different_ways(tiny_model):
    ids = tiny_model.encode(said("b"))
    (batch,) = generate(tiny_model, [ids] * 6, 6, 6, sampling=Sampling(seed=3))
    assert len({text for _, text in batch}) > 3


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-4), Sampling(top_p=1e-6)])
def test_without_chance_sampling_is_greedy(tiny_model, sampling):
    assert sampled(tiny_model, sampling) == sampled(tiny_model, None)


def test_tokens_are_drawn_as_often_as_they_are_probable(tiny_model):
    """One token each, 2,000 times, against the softmax at that temperature; the checkpoint's wishes do not count."""
    tiny_model.network.generation_config.update(temperature=5.0, top_k=2, top_p=0.1, repetition_penalty=3.0)
    ids = tiny_model.encode(said("b"))
    with torch.no_grad():
        logits = tiny_model.network(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = torch.softmax(logits / 0.7, dim=0)
    # Many tokens are half a character and look the same.
    texts = [tiny_model.tokenizer.decode([token]).strip() for token in range(len(expected))]
    text = texts[int(expected.argmax())]
    probability = sum(float(p) for p, one in zip(expected, texts, strict=True) if one == text)
    draws = generate(tiny_model, [ids] * 2000, 1, 500, sampling=Sampling(temperature=0.7))
    share = sum(found == text for batch in draws for _, found in batch) / 2000
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 2000) ** 0.5)
    assert 0.02 < share < 0.98


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_sampling_out_of_range(wrong):
    with pytest.raises(InputError, match="leave sampling out to answer greedily"):
        Sampling(**wrong)
