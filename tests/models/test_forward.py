"""The one forward loop: batches by length, ranks and faults; and what is pooled of a prompt, whatever the padding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import (
    POOLINGS,
    MeasurementSettings,
    forward_batches,
    length_batches,
    over_ranks,
    pooled,
    pooled_batches,
)
from safeneuron.models.model import Model
from safeneuron.runtime import distributed
from tests.helpers import tiny_experts

PROMPTS = [Prompt(text) for text in ("a", "how do I do it?", "tell me", "x" * 40, "what then")]
SMALL = MeasurementSettings(batch_tokens=60)


def encoded(model: Model) -> list[list[int]]:
    return [model.ask(prompt) for prompt in PROMPTS]


def spoil(model: Model, token: str, value: float) -> None:
    """Make every activation that follows the token infinite or not a number."""
    with torch.no_grad():
        model.network.model.embed_tokens.weight[model.tokenizer(token, add_special_tokens=False)["input_ids"]] = value


# -- settings and batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["median", "", "Last"])
def test_an_unknown_pooling(pooling):
    with pytest.raises(InputError, match="pooling"):
        MeasurementSettings(pooling=pooling)


def test_settings_make_batches_of_their_size(tiny_model):
    assert list(SMALL.batches(encoded(tiny_model))) == list(length_batches(encoded(tiny_model), 60))
    assert len(list(MeasurementSettings().batches(encoded(tiny_model)))) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80))
def test_batches_hold_every_prompt_once_within_the_budget(lengths, budget):
    batches = list(length_batches([[0] * length for length in lengths], budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[index] for index in batch) <= budget or len(batch) == 1
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)
    # No batch could have taken the first prompt of the next one.
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


# -- the loop -------------------------------------------------------------------------------------------------


def test_every_prompt_has_its_vector_once(tiny_model):
    calls: list[tuple[int, int]] = []
    batches = list(pooled_batches(tiny_model, PROMPTS, SMALL, lambda done, total: calls.append((done, total))))
    assert [batch for batch, _ in batches] == list(length_batches(encoded(tiny_model), 60))
    assert len(batches) > 1
    for batch, vectors in batches:
        assert torch.equal(vectors, pooled(tiny_model, [encoded(tiny_model)[index] for index in batch], "last"))
    assert calls[-1] == (5, 5)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_the_batches_in_turn_and_alone_all_of_them(tiny_model, monkeypatch, world):
    plan = list(length_batches(encoded(tiny_model), 1))
    monkeypatch.setattr(distributed, "agree", lambda problem: None)
    monkeypatch.setattr(distributed, "world", lambda: world)
    calls: list[int] = []
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loop = pooled_batches(
            tiny_model, PROMPTS, MeasurementSettings(batch_tokens=1), lambda done, _: calls.append(done)
        )
        shares.append([batch for batch, _ in loop])
    assert shares == [plan[rank::world] for rank in range(world)]
    # Each rank counts what all have done.
    assert calls == [1, 2, 3, 4, 5] * world


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_fault_names_its_prompt_and_ends_the_loop_on_every_rank(tiny_model, monkeypatch, value):
    spoil(tiny_model, "?", value)
    problems: list[str] = []
    monkeypatch.setattr(distributed, "agree", problems.append)
    batches = [batch for batch, _ in pooled_batches(tiny_model, PROMPTS, MeasurementSettings(batch_tokens=1))]
    # The longest prompt came before it; the others wait for nobody.
    assert batches == [[3]]
    assert "'how do I do it?'" in problems[0]
    monkeypatch.undo()
    with pytest.raises(InputError, match="not finite"):
        list(pooled_batches(tiny_model, PROMPTS, SMALL))


def test_neurons_of_experts_that_were_not_run_are_no_fault():
    model = tiny_experts.model("qwen3-moe")
    vectors = torch.cat([vectors for _, vectors in pooled_batches(model, PROMPTS)])
    assert vectors.isnan().any()
    assert not vectors.isinf().any()


def test_any_plan_and_any_values_go_through_the_same_loop(tiny_model):
    def backwards(rows: list[list[int]]) -> Iterator[list[int]]:
        yield from ([index] for index in reversed(range(len(rows))))

    def lengths(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[[float(len(row))]] for row in rows])

    batches = list(forward_batches(tiny_model, PROMPTS, lengths, backwards, max_tokens=20))
    assert [batch for batch, _ in batches] == [[4], [3], [2], [1], [0]]
    assert [values.item() for _, values in batches] == [min(20, len(row)) for row in reversed(encoded(tiny_model))]
    with pytest.raises(InputError, match="the sizes are not finite"):
        list(
            forward_batches(
                tiny_model, PROMPTS, lambda rows: lengths(rows) + torch.inf, backwards, what="the sizes are"
            )
        )


def test_the_sum_over_one_rank_is_its_own_tensor():
    assert torch.equal(over_ranks(torch.tensor([1.0, -2.0])), torch.tensor([1.0, -2.0]))


# -- pooling --------------------------------------------------------------------------------------------------


def test_poolings_differ(tiny_model):
    rows = encoded(tiny_model)
    last, mean, most = (pooled(tiny_model, rows, pooling) for pooling in ("last", "mean", "max"))
    assert (most >= mean).all()
    assert (most >= last).all()
    assert not torch.allclose(last, mean, atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_never_counts_whatever_its_activations(tiny_model, pooling):
    """Padding overflows in the last layer: were it read anywhere, the result would be infinite or not a number."""
    rows = [[40, 41, 42, 43], [50, 51]]
    plain = pooled(tiny_model, rows, pooling)

    def overflow(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        spoilt = inputs[0].clone()
        spoilt[1, 2:, ::2], spoilt[1, 2:, 1::2] = torch.inf, torch.nan
        return spoilt

    tiny_model.network.model.layers[-1].mlp.down_proj.register_forward_pre_hook(overflow)
    assert torch.equal(pooled(tiny_model, rows, pooling), plain)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_token_does_not_matter(tiny_model, pooling):
    rows = [[40, 41, 42, 43], [50, 51]]
    plain = pooled(tiny_model, rows, pooling)
    tiny_model.tokenizer.pad_token = "a"
    with torch.no_grad():
        tiny_model.network.model.embed_tokens.weight[tiny_model.tokenizer.pad_token_id] = 1e4
    torch.testing.assert_close(pooled(tiny_model, rows, pooling), plain, rtol=0, atol=1e-5)
