"""How long a model computes, from its shape: operations and bytes of each kind of work, at the speed of a device.

What takes longer counts, the operations or the bytes that they read (the roofline). As in ``planning`` H is the hidden
size, Q the size of a token's queries, K that of its keys, V the vocabulary, b the bytes of a number; W is the number of
weights of all layers, A of those that one token goes through, n of the layers, T of the tokens, L of those of a
sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from safeneuron.errors import InputError
from safeneuron.shapes import Shape
from safeneuron.training import Training

CALL = 5e-4
"""Seconds of Python in each layer of each pass, on any device: dozens of small operations that have to be started."""
SLOWER = 4.0
"""Real work reaches a quarter of a device's speed or more: there are norms, softmax, padding and small matrices."""
ADAM_BYTES = 40
"""What an optimizer step reads and writes of each trained weight: gradient, weight, two moments, clipping, zeroing."""
SECONDS = 0.4
"""How long each of the two figures is measured."""
BUFFER = 2**28
"""Bytes that are read to measure the memory: more than any cache holds."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: operations in products of matrices, and bytes read from its memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, traffic: float) -> float:
        """How long so many operations on so many bytes take at least."""
        return max(flops / self.flops, traffic / self.bandwidth)


def measured(place: torch.device, b: int, shape: Shape) -> Speed:
    """The speed of this device, from products of matrices as large as the model's; takes about a second."""
    dtype = torch.bfloat16 if b == 2 else torch.float32
    width = max(1, min(shape.width, 2**26 // shape.hidden))
    tokens = 512 if place.type == "cpu" else 4096
    first = torch.ones(tokens, shape.hidden, device=place, dtype=dtype)
    second = torch.ones(shape.hidden, width, device=place, dtype=dtype)
    flops = 2 * tokens * shape.hidden * width / _fastest(lambda: first @ second, place)
    # Bytes are bytes, and in float32 every device has a product that does nothing but read.
    rows = torch.ones(4096, BUFFER // 4 // 4096, device=place)
    vector = torch.ones(rows.shape[1], device=place)
    return Speed(flops, rows.nbytes / _fastest(lambda: rows @ vector, place))


def _fastest(work: Callable[[], torch.Tensor], place: torch.device) -> float:
    """Seconds of the fastest of as many repetitions as fit, after one to warm up."""

    def once() -> float:
        begun = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - begun

    with torch.inference_mode():
        once()
        found = [once()]
        while sum(found) < SECONDS:
            found.append(once())
    return min(found)


def forward_flops(shape: Shape, tokens: float, length: float, scored: float = 0) -> float:
    """Operations of a pass forward: 2 A T, causal attention 2 n Q T L, the head's 2 V H of each ``scored`` token."""
    attention = 2 * shape.layers * shape.queries * tokens * length
    return 2 * shape.active * tokens + attention + 2 * shape.vocabulary * shape.hidden * scored


def reading_seconds(shape: Shape, speed: Speed, prompts: int, length: float, batch_tokens: int, b: int) -> float:
    """Prompts through the layers, once: passes of about ``batch_tokens``, each of which reads all weights, b W."""
    passes = math.ceil(prompts * length / batch_tokens)
    flops = forward_flops(shape, prompts * length, length)
    return speed.seconds(flops, passes * b * shape.weights) + passes * shape.layers * CALL


def answering_seconds(
    shape: Shape, speed: Speed, prompts: int, length: float, new_tokens: int, batch_size: int, b: int
) -> float:
    """Answers of ``new_tokens`` each, ``batch_size`` side by side.

    First the prompts, then token after token: each reads all weights and the head, b (W + V H), and the KV cache, 2 b n
    K a token of each row; and computes 2 (A + V H) and attention over what is there, 4 n Q a token of it.
    """
    if not prompts:
        return 0.0
    batches = math.ceil(prompts / batch_size)
    rows, there = prompts / batches, length + new_tokens / 2
    head = shape.vocabulary * shape.hidden
    weights = b * (shape.weights + head)
    flops = rows * (2 * (shape.active + head) + 4 * shape.layers * shape.queries * there)
    traffic = weights + 2 * b * shape.layers * shape.keys * rows * there
    first = speed.seconds(forward_flops(shape, rows * length, length, rows), weights)
    step = speed.seconds(flops, traffic) + shape.layers * CALL
    return batches * (first + new_tokens * step)


def training_seconds(shape: Shape, speed: Speed, training: Training, pairs: int, length: float, share: float) -> float:
    """DPO on pairs of two sequences of ``length``; ``share`` of the forward passes is done once more (``refresh``).

    A pass back computes twice what the pass forward does, or once where only adapters are trained; with gradient
    checkpointing the pass forward is done again for it, and the head's always is. The reference is one more pass
    forward over all pairs. Each optimizer step moves ``ADAM_BYTES`` of every trained weight.
    """
    tokens = 2 * pairs * length
    once, head = forward_flops(shape, tokens, length), 2 * shape.vocabulary * shape.hidden * tokens
    back = 1 if training.lora_rank else 2
    passes = 1 + back + training.gradient_checkpointing + share
    flops = (once + head) + training.epochs * (passes * once + (2 + back) * head)
    trained = training.lora_rank * (shape.inputs + shape.outputs) * shape.layers or shape.parameters
    steps = math.ceil(training.epochs * pairs / training.batch_size)
    calls = math.ceil(pairs / training.micro_batch_size) * (1 + training.epochs * (2 + back))
    return flops / speed.flops + steps * ADAM_BYTES * trained / speed.bandwidth + calls * shape.layers * CALL


def bandwidth_said(text: str) -> float:
    """Bytes a second of a text such as 3.3TB. Raises ``InputError`` for one that is none."""
    units = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
    number, unit = text.strip().upper().removesuffix("/S")[:-2], text.strip().upper().removesuffix("/S")[-2:]
    try:
        found = float(number) * units[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < math.inf:
        raise InputError(f"--device-bandwidth expects bytes a second such as 3.3TB, but found {text!r}")
    return found


def in_words(seconds: float) -> str:
    """A time to two figures, in the unit that suits it."""
    units = {"days": (86400, 3 * 86400), "h": (3600, 2 * 3600), "min": (60, 120), "s": (1, 0)}
    unit = next(name for name, (_, least) in units.items() if seconds >= least)
    number = seconds / units[unit][0]
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"
