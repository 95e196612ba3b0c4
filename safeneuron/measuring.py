"""Activation statistics of a model on unsafe and safe prompts, in one streaming pass whose memory does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from safeneuron.data import Prompt, check_classes
from safeneuron.errors import InputError
from safeneuron.ffn import decoder_of, recorded
from safeneuron.halving import Halving
from safeneuron.models import Model, pad
from safeneuron.moments import Moments
from safeneuron.statistics import ActivationStats

POOLINGS = ("last", "mean", "max")
Progress = Callable[[int, int], None]


def measure(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    pooling: str = "last",
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> ActivationStats:
    """Moments of every neuron over both classes of prompts (the means and variances of Eq. 4-6).

    Each prompt goes through the chat template with the generation prompt and gives one activation vector a layer:
    that of its ``last`` token, or the ``mean`` or ``max`` over its tokens; padding never counts. Prompts of like length
    share a batch of at most ``batch_tokens`` tokens, padding included; a prompt is cut to its last ``max_tokens``.
    The LM head is never run. ``progress(done, total)`` is called after each batch. A batch that does not fit into memory
    is run in halves, with a ``MemoryShortage`` warning, and so are all later ones with as many tokens.

    Raises ``InputError`` for a class with fewer than 2 prompts, an unknown pooling, or activations that are not finite.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown; expected one of {', '.join(POOLINGS)}")
    check_classes(list(unsafe), list(safe))
    total, done = len(unsafe) + len(safe), 0
    advice = "use a smaller max_tokens, or a device with more memory"
    halving: Halving[list[int]] = Halving("measuring", advice, lambda rows: len(rows) * max(map(len, rows)))
    moments = []
    for prompts in (unsafe, safe):
        merged = Moments.zero((sum(model.widths),))
        encoded = [model.encode([{"role": "user", "content": prompt.text}])[-max_tokens:] for prompt in prompts]
        for batch in length_batches(encoded, batch_tokens):
            rows = [encoded[index] for index in batch]
            vectors = torch.cat(halving.over(rows, lambda part: pooled(model, part, pooling)))
            if not torch.isfinite(vectors).all():
                bad = batch[int((~torch.isfinite(vectors)).any(dim=1).nonzero()[0])]
                raise InputError(
                    f"the model's activations are not finite on the prompt {prompts[bad].text[:60]!r}; "
                    "load it with dtype = 'float32', or use another checkpoint"
                )
            merged = merged.merge(Moments.of(vectors))
            done += len(batch)
            if progress is not None:
                progress(done, total)
        moments.append(merged)
    return ActivationStats(moments[0], moments[1], model.widths, model.fingerprint, pooling)


def pooled(model: Model, batch: Sequence[Sequence[int]], pooling: str) -> Tensor:
    """One activation vector a prompt, ``[prompt, neuron]``, of encoded prompts run together.

    Rows are padded on the right, where causal attention cannot see the padding and position ids stay correct.
    """
    ids, mask = pad(batch, int(model.tokenizer.pad_token_id), "right", model.device)
    last = mask.sum(dim=1) - 1
    padding = mask.unsqueeze(-1) == 0

    def reduce(activations: Tensor) -> Tensor:
        if pooling == "last":
            return activations[torch.arange(len(last), device=last.device), last]
        if pooling == "mean":
            return activations.masked_fill(padding, 0).sum(dim=1, dtype=torch.float32) / (last + 1).unsqueeze(-1)
        return activations.masked_fill(padding, -torch.inf).amax(dim=1)

    with torch.inference_mode(), recorded(model, reduce) as recording:
        decoder_of(model.network)(input_ids=ids, attention_mask=mask, use_cache=False)
    return torch.cat([recording.layers[layer].float().cpu() for layer in sorted(recording.layers)], dim=1)


def length_batches(encoded: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of like length, longest first, each at most ``batch_tokens`` with its padding.

    A prompt longer than that is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
