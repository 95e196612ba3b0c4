"""Refusal-direction ablation: what tells harmful requests from harmless ones in the residual stream, projected out.

Arditi et al. 2024, arXiv:2406.11717; reference code github.com/andyrdt/refusal_direction. The stream of a decoder layer
is what it adds its attention's and its FFN's output to. Shapes: ``[hidden]`` one vector of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.data.prompts import check_classes
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import Judge
from safeneuron.models.forward import forward_batches
from safeneuron.models.model import Model, generate
from safeneuron.models.vision import input_kinds, run_without_head
from safeneuron.neurons.anatomy import decoder_of, hidden_size, layers_of
from safeneuron.neurons.interventions import require_eager
from safeneuron.neurons.layout import HasNetwork, network_of
from safeneuron.neurons.statistics import Moments
from safeneuron.runtime import distributed

DEPTH = 0.8
"""The share of the layers, from the first on, in which a direction is looked for, as in the reference code."""


@dataclass(frozen=True)
class Direction:
    """A unit vector ``[hidden]``, float32 on the CPU, found at the input of decoder layer ``layer``.

    ``separation`` is the distance of the class means in units of a prompt's usual distance from the mean of its class.
    """

    vector: Tensor
    layer: int
    separation: float


def candidate_directions(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    *,
    batch_size: int = 16,
    max_tokens: int = 1024,
) -> list[Direction]:
    """The direction of each layer of the first ``DEPTH`` of the model, in order, from one streaming pass.

        r = mean over unsafe prompts - mean over safe prompts   of the stream at the last token, at the layer's input
        separation = |r| / sqrt(mean squared distance of a prompt from the mean of its class)

    The last token is that of the generation prompt, as in ``measure``. Layers whose means are equal have no direction;
    the first is always such a one. Every rank does all of it.

    Args:
        model: The model.
        unsafe: Harmful prompts.
        safe: Harmless prompts.
        batch_size: Prompts at a time.
        max_tokens: Where a prompt is cut off.

    Raises:
        InputError: For a class with fewer than 2 prompts, activations that are not finite, or a model with no direction
            at all.
    """
    check_classes(list(unsafe), list(safe))
    harmful, harmless = (_stream_moments(model, prompts, batch_size, max_tokens) for prompts in (unsafe, safe))
    gap = harmful.mean - harmless.mean
    spread = (harmful.m2 + harmless.m2).sum(dim=1) / (harmful.count + harmless.count - 2)
    length = gap.norm(dim=1)
    separation = length / spread.sqrt()
    directions = [
        Direction((gap[layer] / length[layer]).float(), layer, float(separation[layer]))
        for layer in range(max(1, int(DEPTH * len(gap))))
        if length[layer] > 0 and spread[layer] > 0
    ]
    if not directions:
        raise InputError(
            "in no layer does the model tell the unsafe prompts from the safe ones; expected two different classes of "
            "prompts, check both"
        )
    return directions


def find_direction(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    *,
    judge: Judge | None = None,
    validation: Sequence[Prompt] = (),
    tries: int = 8,
    batch_size: int = 16,
    max_new_tokens: int = 32,
) -> Direction:
    """The refusal direction, chosen among those of all layers by one of two rules.

    Without a judge: the one with the largest separation. With one: some of them, evenly spread over the layers, are
    projected out in turn, and the one that leaves the fewest refusals is taken; of several, the one with the largest
    separation. The reference code compares the probabilities of a refusal's first token instead, which need to be
    known for each model.

    Args:
        model: The model.
        unsafe: Harmful prompts.
        safe: Harmless prompts.
        judge: Counts refusals; without one the separation decides.
        validation: Harmful prompts whose answers are judged, not those of a test; ``unsafe`` if there are none.
        tries: How many of the directions are projected out.
        batch_size: Prompts at a time.
        max_new_tokens: Where a judged answer is cut off, in tokens.

    Raises:
        InputError: As ``candidate_directions`` does.
    """
    candidates = candidate_directions(model, unsafe, safe, batch_size=batch_size)
    if judge is None:
        return max(candidates, key=lambda direction: direction.separation)
    step = max(1.0, len(candidates) / tries)
    spread = [candidates[int(step * number)] for number in range(min(tries, len(candidates)))]
    requests = [prompt.text for prompt in validation or unsafe]
    encoded = [model.ask(prompt) for prompt in validation or unsafe]

    def refusals(direction: Direction) -> int:
        with without_direction(model, direction):
            batches = generate(model, encoded, max_new_tokens, batch_size)
            answers = dict(answer for batch in batches for answer in batch)
        responses = [answers[index] for index in range(len(requests))]
        return distributed.from_main(lambda: judge(requests, responses)).count("refused")

    return min(spread, key=lambda direction: (refusals(direction), -direction.separation))


@contextmanager
def without_direction(model: nn.Module | HasNetwork, direction: Direction) -> Iterator[None]:
    """Within the block nothing is written into the residual stream along the direction: the attack.

        x' = x - r (r . x)   for the embeddings and for what each attention and each FFN adds; |r| = 1

    As in the reference code the input of each layer is projected too, which takes away what rounding leaves there.
    The weights are not touched, so the model is bit-identical afterwards, also after an exception.

    Args:
        model: The model, or its network.
        direction: Of this model, or of one of its width.

    Raises:
        InputError: For a direction of another width, and for a model whose layers are not understood.
    """
    require_eager(model)
    network = network_of(model)
    width = hidden_size(decoder_of(network))
    if direction.vector.shape != (width,):
        raise InputError(
            f"the direction has the shape {tuple(direction.vector.shape)}, but the model's residual stream has {width} "
            "values; find the direction on this model or on one of its shape"
        )
    layers = decoder_layers(network)
    writers = [writer for layer in layers for writer in _writers(layer)]
    before, after = _hooks(direction.vector.float())
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [writer.register_forward_hook(after) for writer in writers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(vector: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A hook for what a module is given and one for what it returns; both project the first tensor of it."""

    def project(stream: Tensor) -> Tensor:
        # In float32, so that what is left along the direction is no more than the precision of the stream itself.
        unit, values = vector.to(stream.device), stream.float()
        return (values - (values @ unit).unsqueeze(-1) * unit).to(stream.dtype)

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (project(inputs[0]), *inputs[1:])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return (project(output[0]), *output[1:]) if isinstance(output, tuple) else project(output)

    return before, after


def decoder_layers(network: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    return layers_of(decoder_of(network))


def _writers(layer: nn.Module) -> list[nn.Module]:
    """The modules whose outputs the layer adds to the stream: attention and FFN, or the norms behind them (Gemma 2)."""
    parts = dict(layer.named_children())
    sandwiched = "post_feedforward_layernorm" in parts
    attention = "cross_attn" if "cross_attn" in parts and "self_attn" not in parts else "self_attn"
    names = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwiched else (attention, "mlp")
    if not all(name in parts for name in names):
        raise InputError(
            f"{type(layer).__name__} has no {' and '.join(names)}, so it is not known what it adds to the residual "
            f"stream: found {', '.join(parts)}; use a Llama-like model"
        )
    return [parts[name] for name in names]


def _stream_moments(model: Model, prompts: Sequence[Prompt], batch_size: int, max_tokens: int) -> Moments:
    """Moments ``[layer, hidden]`` of the stream at the input of every layer, at the last token of each prompt."""
    layers = decoder_layers(network_of(model))
    moments = Moments.zero((len(layers), hidden_size(decoder_of(network_of(model)))))

    def batches(encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        for places in input_kinds(encoded):
            longest_first = sorted(places, key=lambda place: len(encoded[place]), reverse=True)
            for start in range(0, len(longest_first), batch_size):
                yield longest_first[start : start + batch_size]

    with distributed.alone():
        for _, vectors in forward_batches(
            model,
            prompts,
            lambda rows: last_of_stream(model, layers, rows),
            batches,
            max_tokens=max_tokens,
            what="the model's residual stream is",
        ):
            moments = moments.merge(Moments.of(vectors))
    return moments


def last_of_stream(model: Model, layers: nn.ModuleList, batch: Sequence[Sequence[int]]) -> Tensor:
    """The stream at each layer's input, at the last token of each of some encoded prompts.

    Args:
        model: The model.
        layers: Its ``decoder_layers``.
        batch: Token ids of each prompt; all have a picture, or none has.

    Returns:
        ``[prompt, layer, hidden]`` float64 on the CPU. Values that are not finite are infinite.

    Raises:
        InputError: If a layer did not run.
    """
    # Padded on the right, where causal attention cannot see the padding and position ids stay correct.
    inputs = model.inputs(batch, "right")
    mask = inputs["attention_mask"]
    last, rows, seen = mask.sum(dim=1) - 1, torch.arange(len(batch), device=mask.device), list[Tensor]()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0][rows.to(inputs[0].device), last.to(inputs[0].device)].double().cpu())

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        with torch.inference_mode():
            run_without_head(model.network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(layers):
        raise InputError(
            f"{len(seen)} of the {len(layers)} layers of {model.name} ran on a prompt, where all were expected; a "
            "model that leaves out layers where there is no picture needs one with every prompt"
        )
    # To moments NaN would be a value that is not there; here it is a fault.
    return torch.stack(seen, dim=1).nan_to_num(torch.inf, torch.inf, -torch.inf)
