"""Prompts through a model, once each, in batches of like length: the one loop that all such passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import input_kinds, run_without_head
from safeneuron.neurons.interventions import recorded
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import Halving
from safeneuron.runtime.progress import Progress

POOLINGS = ("last", "mean", "max")
"""Which of a prompt's activations make its vector: the last token's, or their mean or maximum over its tokens."""


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """How prompts become activation vectors, one a prompt.

    Args:
        pooling: One of ``POOLINGS``.
        batch_tokens: Tokens in one forward pass, padding included.
        max_tokens: A longer prompt is cut to its last so many tokens; one with an image never is.

    Raises:
        InputError: If the pooling is unknown.
    """

    pooling: str = "last"
    batch_tokens: int = 2048
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling {self.pooling!r} is unknown; expected one of {', '.join(POOLINGS)}")

    def batches(self, encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of encoded prompts in batches of at most ``batch_tokens``; see ``length_batches``."""
        return length_batches(encoded, self.batch_tokens)


def length_batches(encoded: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of like length, longest first, each at most ``batch_tokens`` with its padding.

    A prompt longer than that is a batch of its own. First come the prompts without a picture, then those with one.
    """
    for places in input_kinds(encoded):
        batch: list[int] = []
        for index in sorted(places, key=lambda index: (-len(encoded[index]), index)):
            if batch and (len(batch) + 1) * len(encoded[batch[0]]) > batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        yield batch


def pooled_batches(
    model: Model,
    prompts: Sequence[Prompt],
    settings: MeasurementSettings = MeasurementSettings(),
    progress: Progress | None = None,
    *,
    halving: Halving[list[int]] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Prompts through the model in batches of like length: this rank's batches, and one activation vector a prompt.

    Args:
        model: The model.
        prompts: Each goes through the chat template, with the generation prompt at its end.
        settings: The pooling, and the sizes of batches and prompts.
        progress: Called after each batch.
        halving: See ``forward_batches``.

    Yields:
        The indices of a batch's prompts, and their vectors ``[prompt, neuron]`` (see ``pooled``).

    Raises:
        InputError: If activations are infinite.
    """
    return forward_batches(
        model,
        prompts,
        lambda rows: pooled(model, rows, settings.pooling),
        settings.batches,
        max_tokens=settings.max_tokens,
        progress=progress,
        halving=halving,
    )


def forward_batches(
    model: Model,
    prompts: Sequence[Prompt],
    run: Callable[[Sequence[list[int]]], Tensor],
    plan: Callable[[Sequence[list[int]]], Iterable[list[int]]],
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    halving: Halving[list[int]] | None = None,
    what: str = "the model's activations are",
) -> Iterator[tuple[list[int], Tensor]]:
    """The one loop that takes prompts through a model in batches, for whatever is kept of each prompt.

    Several ranks take the batches in turn, so all must go through the loop to its end; within ``distributed.alone``
    each of them does all the work.

    Args:
        model: The model.
        prompts: Each goes through the chat template, with the generation prompt at its end.
        run: Takes encoded prompts through the model together and gives ``[prompt, ...]``. Infinite values are a fault;
            NaN says that there is nothing to know.
        plan: Puts encoded prompts into batches, given as their indices.
        max_tokens: A longer prompt is cut to its last so many tokens.
        progress: Called after each batch, with the number of prompts done.
        halving: What runs a batch in halves where memory runs out, and remembers that; one of its own if not given.
        what: Names the values in the error, with its verb.

    Yields:
        The indices of a batch's prompts, and what ``run`` makes of them.

    Raises:
        InputError: On every rank, if values are infinite on any of them; and where a single prompt is too much.
    """
    halving = halving or prompts_in_halves()
    encoded = [model.ask(prompt, max_tokens) for prompt in prompts]
    done, problem = 0, ""
    for number, batch in enumerate(plan(encoded)):
        if number % distributed.world() == distributed.rank():
            values = torch.cat(halving.over([encoded[index] for index in batch], run))
            problem = _not_finite(values, [prompts[index] for index in batch], what)
            # The other ranks may be in the middle of their batches: all meet at the end, where this is raised.
            if problem:
                break
            yield batch, values
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    distributed.agree(problem)


def prompts_in_halves() -> Halving[list[int]]:
    """What runs a batch of encoded prompts, in halves where it does not fit into memory."""
    advice = "use a smaller max_tokens, or a device with more memory"
    return Halving("measuring", advice, lambda rows: len(rows) * max(map(len, rows)))


def _not_finite(values: Tensor, prompts: Sequence[Prompt], what: str) -> str:
    """What is wrong with the values ``[prompt, ...]`` of these prompts, if anything."""
    faulty = values.isinf().flatten(1).any(dim=1).nonzero()
    if not len(faulty):
        return ""
    return (
        f"{what} not finite on the prompt {prompts[int(faulty[0])].text[:60]!r}; "
        "load it with dtype = 'float32', or use another checkpoint"
    )


def pooled(model: Model, batch: Sequence[Sequence[int]], pooling: str) -> Tensor:
    """One activation vector a prompt of encoded prompts that are run together.

    Rows are padded on the right, where causal attention cannot see the padding and position ids stay correct. To an
    expert some tokens only are routed: the last token counts for it if it is one of them, the mean and the maximum are
    over them. Where there are none its neurons are NaN, and so are those of layers that were not run.

    Args:
        model: The model.
        batch: Token ids of each prompt; all have a picture, or none has.
        pooling: One of ``POOLINGS``.

    Returns:
        ``[prompt, neuron]`` float32 on the CPU, layers laid end to end. Values that are not finite are infinite.
    """
    inputs = model.inputs(batch, "right")
    mask = inputs["attention_mask"]
    ends = mask.sum(dim=1) - 1
    everywhere = mask.unsqueeze(-1) == 0

    # What is kept of a layer's activations [prompt, token, neuron], while the model runs.
    def reduce(activations: Tensor) -> Tensor:
        # Of a model on several devices each layer's activations are on its own.
        last, padding = ends.to(activations.device), everywhere.to(activations.device)
        if recording.layer in recording.routed and pooling != "last":
            return _pooled_routed(activations, padding, pooling)
        if pooling == "last":
            return activations[torch.arange(len(last), device=last.device), last]
        if pooling == "mean":
            return activations.masked_fill(padding, 0).sum(dim=1, dtype=torch.float32) / (last + 1).unsqueeze(-1)
        return activations.masked_fill(padding, -torch.inf).amax(dim=1)

    with torch.inference_mode(), recorded(model, reduce) as recording:
        run_without_head(model.network, inputs)
    parts = []
    for layer, width in enumerate(model.widths):
        recorded_layer = recording.layers.get(layer)
        if recorded_layer is None:
            parts.append(torch.full((len(batch), width), torch.nan))
        else:
            # Where every token counts, NaN is a fault, which must not look like an expert that was not run.
            values = recorded_layer.float().cpu()
            parts.append(values if layer in recording.routed else values.nan_to_num(torch.inf, torch.inf, -torch.inf))
    return torch.cat(parts, dim=1)


def _pooled_routed(activations: Tensor, padding: Tensor, pooling: str) -> Tensor:
    """The mean or maximum of each neuron over the tokens routed to its expert; NaN where there are none."""
    absent = activations.isnan() | padding
    if pooling == "max":
        highest = activations.masked_fill(absent, -torch.inf).amax(dim=1)
        return highest.masked_fill(absent.all(dim=1), torch.nan)
    return activations.masked_fill(absent, 0).sum(dim=1, dtype=torch.float32) / (~absent).sum(dim=1)


def over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks of the tensor that each has, in the order of the ranks."""
    total = torch.zeros_like(tensor)
    for of_rank in distributed.each_tensor(tensor):
        total += of_rank
    return total
