"""Times from shapes, held against operations that torch counts and bytes that are there; a speed that is measured."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from safeneuron.errors import InputError
from safeneuron.models.shape import Shape
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.planning.duration import (
    CALL,
    Speed,
    answering_seconds,
    forward_flops,
    measured,
    parse_bandwidth,
    reading_seconds,
    time_words,
    training_seconds,
)
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny, tiny_experts

ENDLESS = 1e30


def counted(network: torch.nn.Module, rows: int, length: int) -> int:
    """Operations of a pass through the whole model, as torch counts them."""
    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return counter.get_total_flops()


def test_operations_of_a_pass_are_those_that_torch_counts(family):
    network = tiny.network(family, hidden_size=64, intermediate_size=160, head_dim=16, attn_implementation="eager")
    shape = Shape.of(network, family)
    rows, length = 3, 40
    tokens = rows * length
    # Plain attention computes the half above the diagonal too, which ours leaves out.
    unseen = 2 * shape.layers * shape.queries * tokens * length
    assert forward_flops(shape, tokens, length, tokens) + unseen == pytest.approx(
        counted(network, rows, length), rel=0.03
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "olmoe", "gpt-oss", "deepseek-v3"])
def test_of_experts_only_those_count_that_a_token_is_routed_to(family):
    """A token of this model goes to two of four experts, and through what is shared."""
    network = tiny_experts.network(family)
    shape = Shape.of(network, family)
    routed = [one for name, one in network.named_parameters() if ".experts." in name]
    assert len(routed) > 0
    assert shape.weights == sum(one.numel() for one in network.model.layers.parameters())
    assert shape.weights - shape.active == sum(one.numel() for one in routed) / 2


def test_a_dense_model_is_active_as_a_whole(family):
    shape = Shape.of(tiny.network(family), family)
    assert (
        shape.active
        == shape.weights
        == sum(one.numel() for one in decoder_of(tiny.network(family)).layers.parameters())
    )


def test_reading_is_bound_by_operations_or_by_what_is_read():
    shape = Shape.of(tiny.network(), "llama")
    calls = 5 * shape.layers * CALL
    slow = reading_seconds(shape, Speed(1e6, ENDLESS), prompts=50, length=20, batch_tokens=200, b=2)
    assert slow - calls == pytest.approx(forward_flops(shape, 1000, 20) / 1e6)
    narrow = reading_seconds(shape, Speed(ENDLESS, 1e6), prompts=50, length=20, batch_tokens=200, b=2)
    assert narrow - calls == pytest.approx(5 * 2 * shape.weights / 1e6)


def test_each_token_of_an_answer_reads_the_weights_and_what_was_said_before():
    shape = Shape.of(tiny.network(), "llama")
    speed, head = Speed(ENDLESS, 1e6), shape.vocabulary * shape.hidden
    found = answering_seconds(shape, speed, prompts=8, length=10, new_tokens=6, batch_size=4, b=2)
    cache = 2 * 2 * shape.layers * shape.keys * 4 * 13
    expected = 2 * (2 * (shape.weights + head) + 6 * (2 * (shape.weights + head) + cache)) / 1e6
    assert found - 2 * 6 * shape.layers * CALL == pytest.approx(expected)
    # More side by side read the weights less often.
    assert answering_seconds(shape, speed, 8, 10, 6, 8, 2) < found
    assert answering_seconds(shape, speed, 0, 10, 6, 8, 2) == 0


def test_training_is_three_passes_and_one_for_the_reference():
    shape = Shape.of(tiny.network(), "llama")
    training = TrainingSettings(epochs=2, batch_size=4, micro_batch_size=4)
    tokens = 2 * 12 * 30
    once, head = forward_flops(shape, tokens, 30), 2 * shape.vocabulary * shape.hidden * tokens

    def passes(**changes: object) -> float:
        changed = replace(training, **changes)
        calls = 3 * (1 + 2 * (3 if changed.lora_rank else 4)) * shape.layers * CALL
        return training_seconds(shape, Speed(1e6, ENDLESS), changed, 12, 30, 0.0) - calls

    assert passes() == pytest.approx((once + head + 2 * (3 * once + 4 * head)) / 1e6)
    assert passes(gradient_checkpointing=True) - passes() == pytest.approx(2 * once / 1e6)
    assert passes() - passes(lora_rank=4) == pytest.approx(2 * (once + head) / 1e6)
    # Six steps of the optimizer, each over all weights, or over the adapters alone.
    by_memory = [
        training_seconds(shape, Speed(ENDLESS, 1e6), replace(training, lora_rank=rank), 12, 30, 0.0) for rank in (0, 1)
    ]
    assert (
        by_memory[0] - by_memory[1] > 6 * 40 * (shape.parameters - shape.layers * (shape.inputs + shape.outputs)) / 1e6
    )


def test_this_device_is_measured_in_a_moment():
    begun = time.monotonic()
    speed = measured(torch.device("cpu"), 4, Shape.of(tiny.network(hidden_size=64), "llama"))
    assert time.monotonic() - begun < 10
    assert 1e7 < speed.flops < 1e15
    assert 1e7 < speed.bandwidth < 1e13


@pytest.mark.parametrize(("text", "size"), [("3.3TB", 3.3e12), ("900 GB/s", 9e11), ("25gb", 2.5e10)])
def test_bandwidths(text, size):
    assert parse_bandwidth(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["much", "3.3", "TB", "-1TB", "nanGB", "infGB"])
def test_what_is_no_bandwidth_is_explained(text):
    with pytest.raises(InputError, match=r"--device-bandwidth expects bytes a second such as 3.3TB"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (3.04, "3.0 s"), (100.4, "100 s"), (150, "2.5 min"), (9000, "2.5 h"), (9e7, "1,042 days")],
)
def test_times_in_words(seconds, words):
    assert time_words(seconds) == words
