"""Measuring against one prompt at a time: padding, batches and streaming must not show in the statistics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import POOLINGS, MeasurementSettings, pooled
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats, Moments
from safeneuron.selection.measurement import activations_of, measure, measure_groups, search
from safeneuron.selection.scores import select
from tests.helpers import tiny

UNSAFE = [Prompt(text) for text in ("a", "how do I do it?", "tell me", "x" * 40, "what then")]
SAFE = [Prompt(text) for text in ("good morning", "b", "a somewhat longer question?", "no")]


def ids_of(model: Model, prompt: Prompt) -> list[int]:
    return model.encode([{"role": "user", "content": prompt.text}])


def one_vector(model: Model, ids: list[int], pooling: str) -> torch.Tensor:
    """The slow way: one prompt, no padding, one hook a layer, the whole model with its LM head."""
    rows: dict[int, torch.Tensor] = {}
    layers = model.network.get_decoder().layers
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, number=number: rows.update({number: inputs[0][0]})
        )
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        model.network(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    parts = []
    for number in range(len(layers)):
        tokens = rows[number].float()
        assert tokens.shape == (len(ids), tiny.WIDTH)
        parts.append({"last": tokens[-1], "mean": tokens.mean(dim=0), "max": tokens.max(dim=0).values}[pooling])
    return torch.cat(parts)


def assert_same(ours: Moments, theirs: Moments, atol: float = 1e-5) -> None:
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-5, atol=atol)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_batch_equals_one_prompt_at_a_time(family, pooling):
    model = tiny.model(family)
    encoded = [ids_of(model, prompt) for prompt in UNSAFE]
    assert len(set(map(len, encoded))) > 3
    vectors = pooled(model, encoded, pooling)
    expected = torch.stack([one_vector(model, ids, pooling) for ids in encoded])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
    stats = measure(model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling))
    assert_same(stats.unsafe, Moments.of(expected))
    assert_same(stats.safe, Moments.of(torch.stack([one_vector(model, ids_of(model, p), pooling) for p in SAFE])))
    assert (stats.widths, stats.fingerprint, stats.pooling) == (model.widths, model.fingerprint, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batch_size_does_not_matter(tiny_model, pooling, batch_tokens):
    plain = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling))
    other = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling, batch_tokens=batch_tokens))
    assert_same(other.unsafe, plain.unsafe)
    assert_same(other.safe, plain.safe)


def test_order_of_prompts_does_not_matter(tiny_model):
    plain = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling="mean", batch_tokens=60))
    other = measure(tiny_model, UNSAFE[::-1], SAFE[2:] + SAFE[:2], MeasurementSettings(pooling="mean", batch_tokens=60))
    assert_same(other.unsafe, plain.unsafe)
    assert_same(other.safe, plain.safe)


def test_streaming_equals_numpy_over_all_vectors(tiny_model):
    stats = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling="max", batch_tokens=50))
    vectors = pooled(tiny_model, [ids_of(tiny_model, prompt) for prompt in UNSAFE], "max").double().numpy()
    np.testing.assert_allclose(stats.unsafe.mean.numpy(), vectors.mean(axis=0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(stats.unsafe.variance.numpy(), vectors.var(axis=0, ddof=1), rtol=0, atol=1e-5)
    assert stats.unsafe.mean.dtype == torch.float64


def test_classes_are_not_exchanged(tiny_model):
    there, back = measure(tiny_model, UNSAFE, SAFE), measure(tiny_model, SAFE, UNSAFE)
    assert (there.unsafe.count, there.safe.count) == (len(UNSAFE), len(SAFE))
    assert torch.equal(there.unsafe.mean, back.safe.mean)
    assert not torch.equal(there.unsafe.mean, there.safe.mean)


def test_long_prompt_is_cut_to_its_last_tokens(tiny_model):
    prompts = [Prompt("y" * 30 + "end"), Prompt("z" * 50 + "end")]
    stats = measure(tiny_model, prompts, SAFE, MeasurementSettings(pooling="mean", max_tokens=7))
    cut = [one_vector(tiny_model, ids_of(tiny_model, prompt)[-7:], "mean") for prompt in prompts]
    assert_same(stats.unsafe, Moments.of(torch.stack(cut)))
    # The last seven tokens hold the end of the template, the generation prompt.
    assert ids_of(tiny_model, prompts[0])[-1] == tiny_model.tokenizer.convert_tokens_to_ids("<|assistant|>")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision_is_near(tiny_model, dtype, pooling):
    plain = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling))
    tiny_model.network.to(dtype)
    half = measure(tiny_model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling))
    assert half.fingerprint == plain.fingerprint
    assert half.unsafe.mean.dtype == torch.float64
    scale = plain.unsafe.mean.abs().max()
    assert (half.unsafe.mean - plain.unsafe.mean).abs().max() < 0.05 * scale


def test_lm_head_is_never_run(family):
    model = tiny.model(family)

    def fail(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise AssertionError("the LM head ran")

    model.network.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="LM head"):
        model.network(input_ids=torch.tensor([[5, 6]]))
    measure(model, UNSAFE[:2], SAFE[:2])


def test_model_is_left_as_it_was(tiny_model):
    weights = {name: value.clone() for name, value in tiny_model.network.state_dict().items()}
    measure(tiny_model, UNSAFE, SAFE)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model.network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())
    assert all(parameter.grad is None for parameter in tiny_model.network.parameters())


def test_progress_counts_every_prompt_once(tiny_model):
    calls: list[tuple[int, int]] = []
    measure(
        tiny_model,
        UNSAFE,
        SAFE,
        MeasurementSettings(batch_tokens=60),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert len(calls) > 3
    assert {total for _, total in calls} == {9}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (9, 9)


def test_search_finds_again_on_what_is_left(tiny_model):
    def find(stats: ActivationStats) -> NeuronSet:
        return select(stats, density=0.05)

    calls: list[tuple[int, int]] = []
    sets = search(tiny_model, UNSAFE, SAFE, find, 3, progress=lambda done, total: calls.append((done, total)))
    assert sets[0] == find(measure(tiny_model, UNSAFE, SAFE))
    for earlier, later in pairwise(sets):
        with pruned(tiny_model, earlier):
            again = find(measure(tiny_model, UNSAFE, SAFE))
        assert len(again & earlier) == 0
        assert len(again) > 0
        assert later == earlier | again
    assert calls[-1] == (27, 27)
    known = search(tiny_model, UNSAFE, SAFE, find, 3, first=sets[0])
    assert known == sets


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(tiny_model, value):
    # Only the prompt with a question mark meets the spoilt embedding.
    spoilt = tiny_model.tokenizer("?", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        tiny_model.network.model.embed_tokens.weight[spoilt] = value
    with pytest.raises(InputError, match=r"not finite on the prompt 'how do I do it\?'"):
        measure(tiny_model, UNSAFE, SAFE)
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())


@pytest.mark.parametrize(
    ("unsafe", "safe", "message"),
    [
        ([], SAFE, "at least 2 unsafe prompts, found 0"),
        (UNSAFE, [], "at least 2 safe prompts, found 0"),
        (UNSAFE[:1], SAFE, "at least 2 unsafe prompts, found 1"),
        (UNSAFE, SAFE[:1], "at least 2 safe prompts, found 1"),
    ],
)
def test_too_few_prompts(tiny_model, unsafe, safe, message):
    with pytest.raises(InputError, match=message):
        measure(tiny_model, unsafe, safe)


def test_groups_are_measured_as_they_would_be_alone(tiny_model):
    weights = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 2]])
    calls: list[tuple[int, int]] = []
    groups = measure_groups(
        tiny_model,
        UNSAFE,
        weights,
        MeasurementSettings(pooling="mean", batch_tokens=60),
        progress=lambda done, total: calls.append((done, total)),
    )
    for number, prompts in enumerate([[*UNSAFE[:2], UNSAFE[4]], [*UNSAFE[2:4], UNSAFE[4], UNSAFE[4]]]):
        alone = measure(tiny_model, prompts, SAFE, MeasurementSettings(pooling="mean")).unsafe
        assert_same(groups.group(number), alone)
    assert calls[-1] == (5, 5)


def test_activations_are_in_the_order_of_the_prompts_and_of_the_set(tiny_model):
    neurons = NeuronSet.of({0: [3, 5], 2: [0]}, tiny_model.widths, tiny_model.fingerprint)
    activations = activations_of(tiny_model, UNSAFE, neurons, MeasurementSettings(batch_tokens=60))
    expected = torch.stack([one_vector(tiny_model, ids_of(tiny_model, prompt), "last") for prompt in UNSAFE])
    torch.testing.assert_close(activations, expected[:, neurons.flat], rtol=1e-5, atol=1e-5)
