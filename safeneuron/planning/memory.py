"""What a model needs in memory while it is measured, attacked and aligned, from its shape alone.

Sizes are in bytes. In the formulas P is the number of parameters, T the number of tokens in a pass (padding included),
L their longest sequence, H the hidden size, F the FFN's width, Q and K the sizes of a token's queries and of its keys
in a layer, V the vocabulary, and c the bytes of a number as it is computed with: 2 under bfloat16, else 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.shape import Shape
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import available_memory, bfloat16_pays, resident_memory
from safeneuron.training.settings import TrainingSettings, is_sharded

GB = 2**30
Need = dict[str, float]
"""Bytes by what they are for."""

LIBRARIES = {"cpu": 0.55 * GB, "cuda": 0.3 * GB}
"""What torch, transformers and TRL take before any model is loaded; on a GPU, the work space of its libraries."""

WASTE = 0.05
"""The share of what is asked for that allocators lose between tensors."""

# TRL's fused LM head (1.16) computes logits in tiles of so many tokens by so many entries of the vocabulary. Without
# Triton it has so many bytes of each of a tile's logits: three copies in float32 forward, seven and a mask backward.
TILE_TOKENS, TILE_ENTRIES = 4096, 32768
TILE_FORWARD, TILE_BACKWARD = 3 * 4, 7 * 4 + 1


@dataclass(frozen=True)
class Device:
    """Where a model computes: how much memory there is for this process, ``None`` if unknown, and in what precision.

    With ``count`` devices that are ``sharded``, each holds its share of the weights that are trained, of their
    gradients and of the optimizer (FSDP2); else each holds all of them (DDP).
    """

    kind: str
    memory: float | None
    bfloat16: bool
    count: int = 1
    sharded: bool = False

    @classmethod
    def of(cls, place: torch.device) -> Device:
        """The device as it is now; what this process has taken counts as free, since it is part of what it needs.

        With several ranks there is one for each, and on the CPU an equal share of what is free.
        """
        if place.type == "cuda":
            memory: float = torch.cuda.mem_get_info(place)[0] + torch.cuda.memory_reserved(place)
        else:
            memory = available_memory() / distributed.local_world() + resident_memory()
        return cls(place.type, memory, bfloat16_pays(place), distributed.world(), is_sharded())

    @property
    def shards(self) -> int:
        """Over how many devices the weights being trained are spread."""
        return self.count if self.sharded else 1


def total_bytes(need: Need) -> float:
    """All of it, with what allocators waste."""
    libraries = need.get("libraries", 0.0)
    return (sum(need.values()) - libraries) * (1 + WASTE) + libraries


def align_need(
    shape: Shape,
    device: Device,
    training: TrainingSettings,
    length: int,
    frozen: int = 0,
    lora_rank: int = 0,
    given_bytes: float = 4.0,
    vision_bytes: float = 0.0,
) -> Need:
    """At the peak of training with pairs of at most ``length`` tokens, on each device.

        held all the time   the given model, the reference, which stays as it was: ``given_bytes`` P
                            weights 4 P, AdamW's two moments 8 P, frozen slices 2 * 4 * 3 H each (saved and proof)
                            over N sharded devices the last three by N, and two layers that are put together
        before the backward pass     gradients 4 P, if there were micro-batches before, and on the CPU in any case,
                                     since the C library finds no other use for the memory of the step before
                                     activations of all layers, copies of their linear weights in c, the LM head
        in the backward pass         gradients 4 P and the output's anew, if it is tied to the input
        after the last step          24 bytes of each weight of the largest parameter: how far it has moved
        over N sharded devices       the weights whole: before they are spread, and again once they are put together

    ``vision_bytes`` is what the vision tower has in memory of the images of a pass, before the decoder begins. The
    reference's log-probabilities are computed before, with nothing in memory that is not there later. With gradient
    checkpointing the first of these is the input of every layer, 4 H a token, and the most of one layer or the LM head.
    With adapters of ``lora_rank`` only these have gradients and moments; the weights are 2 P where they are stored and
    computed in bfloat16, and once they are merged there is the model again in float32.
    """
    rows = 2 * pairs_at_once(training, device)
    tokens = rows * length
    half = training.precision == "bfloat16" or (training.precision == "auto" and device.bfloat16)
    c = 2 if half else 4
    trained = shape.parameters if not lora_rank else lora_rank * (shape.inputs + shape.outputs) * shape.layers
    small_base = bool(lora_rank) and half and shape.stored == 2
    weights = 4 * shape.parameters if not lora_rank else (2 if small_base else 4) * shape.parameters + 4 * trained
    shards = device.shards
    held: Need = {
        "libraries": LIBRARIES.get(device.kind, 0.0),
        "given model": given_bytes * shape.parameters,
        "weights": weights / shards,
        "optimizer": 8 * trained / shards,
        "frozen": 2 * 4 * 3 * shape.hidden * frozen / shards,
    }
    if shards > 1:
        held["gathered layers"] = c * (2 * shape.layer + shape.vocabulary * shape.hidden * (1 if shape.tied else 2))
    gradients = 4 * trained / shards
    one_layer = tokens * layer_activations(shape, length, c)
    # A layer's linear weights are copied when they are used, and the copies are kept for the backward pass.
    copied = shape.linear * 2 if half and not small_base and shards == 1 else 0
    head = head_memory(shape, tokens, c, device.kind, trained=not lora_rank)
    working = tokens * (3 * shape.width * c + 12 * shape.hidden)
    accumulates = training.batch_size > training.micro_batch_size * device.count
    before = gradients if accumulates or device.kind == "cpu" else 0
    if training.gradient_checkpointing:
        inputs = tokens * 4 * shape.hidden * shape.layers
        forward = {"copies of weights": copied * shape.layers, "activations": inputs}
        moments: list[Need] = [
            {"gradients": before, "LM head": head["forward"], **forward},
            {"gradients": before, "LM head": head["backward"], "activations": inputs},
            {"gradients": before, "copies of weights": copied, "activations": inputs + one_layer + working},
            {"gradients": gradients, "copies of weights": copied, "activations": one_layer + working},
        ]
    else:
        everything = {"copies of weights": copied * shape.layers, "activations": one_layer * shape.layers}
        moments = [
            {"gradients": before, "LM head": head["backward"], **everything},
            {"gradients": before, **everything, "activations": everything["activations"] + working},
            {"gradients": gradients, "LM head": 4 * shape.vocabulary * shape.hidden if shape.tied else 0},
        ]
    moments.append({"gradients": before, "vision tower": vision_bytes})
    moments.append({"comparison": 24 * shape.largest})
    if lora_rank or shards > 1:
        moments.append({"merged model": 4 * shape.parameters})
    return {name: size for name, size in (held | max(moments, key=total_bytes)).items() if size}


def layer_activations(shape: Shape, length: int, c: int) -> float:
    """Bytes that a layer keeps for the backward pass, of each token.

        norms      8 bytes of each number that goes in, which is float32: itself, and as it is normalised
        attention  c (2 Q + 2 Q): queries, keys and values repeated for each query head, output; the mask c L; 4 a head
        linear     c of each input; the copies in bfloat16 are made anew for each layer, float32 shares what is alike
        FFN        4 c F: both projections, the activation function's output, and the product, which the last one reads

    Attention that is computed in plain steps (eager) keeps its probabilities instead of the mask: 4 L a head in
    float32, and again in bfloat16.
    """
    probabilities = (6 if c == 2 else 4) * length * shape.heads
    attention = 4 * c * shape.queries + (probabilities if shape.eager else 4 * shape.heads + c * length)
    others = shape.inputs - shape.width - shape.queries
    linear = c * (others if c == 2 else min(others, 2 * shape.hidden))
    return 8 * shape.norms + attention + linear + 4 * c * shape.width


def head_memory(shape: Shape, tokens: int, c: int, kind: str, trained: bool = True) -> dict[str, float]:
    """What TRL's fused LM head needs in its forward and in its backward pass; there are never logits of all tokens.

    tile      n = min(T, 4,096) tokens by v = min(V, 32,768) entries; its buffer is c n 32,768, but c n v on the CPU,
              where memory that is not written to is not taken
    forward   the buffer; without Triton 12 n v, three copies in float32
    backward  the buffer, gradients in float32 of its input 4 T H and of the weights 4 V H, the weights of a tile c v H;
              without Triton 29 n v, seven copies in float32 and a mask
    """
    n, v = min(tokens, TILE_TOKENS), min(shape.vocabulary, TILE_ENTRIES)
    plain = n * v if kind == "cpu" else 0
    buffer = c * n * (v if kind == "cpu" else TILE_ENTRIES)
    weights = 4 * shape.vocabulary * shape.hidden if trained else 0
    gradients = 4 * tokens * shape.hidden + weights + (c * v * shape.hidden if c == 2 else 0)
    return {"forward": buffer + TILE_FORWARD * plain, "backward": buffer + TILE_BACKWARD * plain + gradients}


def measure_need(
    shape: Shape, device: Device, batch_tokens: int, max_tokens: int, dtype: str = "auto", vision_bytes: float = 0.0
) -> Need:
    """While activations are measured: nothing is kept for a backward pass, and the LM head is not run.

    weights      b P, with b = 2 or 4 bytes a number
    activations  of one layer: T (4 b F + 24 H), with T = ``batch_tokens``, or a longer prompt alone
    statistics   of a batch of prompts of about 32 tokens: 20 bytes of each neuron of each prompt
    vision tower as ``vision_bytes`` says
    """
    b = bytes_per_number(dtype, device)
    tokens = max(batch_tokens, max_tokens)
    return {
        "libraries": LIBRARIES.get(device.kind, 0.0),
        "weights": b * shape.parameters,
        "activations": tokens * (4 * b * shape.width + 24 * shape.hidden),
        "statistics": 20 * (batch_tokens / 32) * shape.width * shape.layers,
        **({"vision tower": vision_bytes} if vision_bytes else {}),
    }


def attack_need(
    shape: Shape,
    device: Device,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    dtype: str = "auto",
    vision_bytes: float = 0.0,
) -> Need:
    """While answers are generated, B = ``batch_size`` side by side.

    weights      b P, with b = 2 or 4 bytes a number
    KV cache     2 b K B (prompt + answer) for each layer, and once more for the layer that grows
    activations  of one layer on the prompts: B prompt (4 b F + 24 H)
    logits       (b + 8) V for each of B answers; perplexity has 512 tokens at once
    vision tower as ``vision_bytes`` says
    """
    b = bytes_per_number(dtype, device)
    cache = 2 * b * shape.keys * batch_size * (prompt_tokens + max_new_tokens)
    return {
        "libraries": LIBRARIES.get(device.kind, 0.0),
        "weights": b * shape.parameters,
        "KV cache": cache * (shape.layers + 1),
        "activations": batch_size * prompt_tokens * (4 * b * shape.width + 24 * shape.hidden),
        "logits": (b + 8) * shape.vocabulary * max(batch_size, 512),
        **({"vision tower": vision_bytes} if vision_bytes else {}),
    }


def longest_pair(model: Model, pairs: Sequence[Pair], max_length: int) -> int:
    """Tokens of the longest pair as it will be trained on, at most ``max_length``.

    Only the pairs with the most characters are turned into tokens, so that it takes no time with many pairs.
    """
    texts = [
        ([*pair.prompt, {"role": "assistant", "content": answer}], pair.image)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    texts.sort(key=lambda text: sum(len(message["content"]) for message in text[0]), reverse=True)
    # An image's tokens do not show in the characters, so that pairs with one are taken whatever their length.
    some = [*texts[:64], *[text for text in texts[64:] if text[1] is not None][:64]]
    return min(max_length, max((len(model.encode(messages, image)) for messages, image in some), default=max_length))


def pairs_at_once(training: TrainingSettings, device: Device) -> int:
    """How many pairs are in one pass on each device."""
    share = math.ceil(training.batch_size / device.count)
    return min(training.at_once or training.micro_batch_size, training.micro_batch_size, share)


def bytes_per_number(dtype: str, device: Device) -> int:
    """Bytes of a number in the precision of that name on the device."""
    return 2 if dtype in ("bfloat16", "float16") or (dtype == "auto" and device.bfloat16) else 4


MARGIN = 1.1
"""A plan fits if the memory is so many times what it needs: the estimates are within about so much."""


@dataclass(frozen=True)
class Plan:
    """How a training is done, what it needs with pairs of at most ``length`` tokens, and the device for that."""

    training: TrainingSettings
    need: Need
    device: Device
    length: int
    changed: bool

    @property
    def fits(self) -> bool:
        """Whether the device has what it needs, as far as is known."""
        return fits(self.need, self.device)

    def sentence(self) -> str:
        """The plan in one line."""
        return f"{needs(self.need)} of {available(self.device)}; {ways(self.training)}, up to {self.length} tokens each"

    def to_record(self) -> dict[str, Any]:
        """The plan for JSON, sizes in bytes."""
        return {
            "need": {name: round(size) for name, size in self.need.items()} | {"total": round(total_bytes(self.need))},
            "available": None if self.device.memory is None else round(self.device.memory),
            "length": self.length,
            "at_once": self.training.at_once,
            "gradient_checkpointing": self.training.gradient_checkpointing,
            "changed": self.changed,
        }


def plan_training(
    training: TrainingSettings,
    device: Device,
    length: int,
    need: Callable[[TrainingSettings], Need],
    change: bool = True,
) -> Plan:
    """The training as it is asked for if it fits, or, with ``change``, in the first of these ways that does.

    Fewer pairs of a micro-batch at a time, by halves; then gradient checkpointing, with as many at a time as fit. Both
    leave the results as they are, to rounding. The least of them, or the training as it was asked for without
    ``change``, is returned also when it does not fit.
    """
    tried = training
    for tried in _ways(training) if change else [training]:
        if fits(need(tried), device):
            break
    return Plan(tried, need(tried), device, length, tried != training)


def require_fit(plan: Plan, what: str) -> None:
    """Raise ``InputError`` if even this plan does not fit into memory."""
    if not plan.fits:
        raise InputError(
            f"{what} needs {needs(plan.need)} even with {ways(plan.training)} of {plan.length} tokens each, and there "
            f"are {available(plan.device)}; train adapters (lora_rank) instead of all weights, use more or larger "
            "devices, or a smaller max_length"
        )


def fits(need: Need, device: Device) -> bool:
    """Whether it fits, with a margin; without knowledge of the device it does."""
    return device.memory is None or total_bytes(need) * MARGIN <= device.memory


def needs(need: Need) -> str:
    """The total and its largest parts: ``5.1 GB (activations 1.9, optimizer 1.0, weights 0.5, ...)``."""
    largest = sorted(need.items(), key=lambda part: -part[1])
    named = [f"{name} {size / GB:.1f}" for name, size in largest if size >= GB / 20][:5]
    return f"{gigabytes(total_bytes(need))} ({', '.join(named)})" if named else gigabytes(total_bytes(need))


def available(device: Device) -> str:
    """What the device has."""
    return "an unknown amount" if device.memory is None else gigabytes(device.memory)


def gigabytes(size: float) -> str:
    """A size in GB of 2**30 bytes."""
    return f"{size / GB:,.1f} GB"


def ways(training: TrainingSettings) -> str:
    """How many pairs at a time, and whether their activations are computed again."""
    count = training.at_once or training.micro_batch_size
    pairs = f"{count} pair{'s' if count > 1 else ''} at a time"
    return pairs + (" and gradient checkpointing" if training.gradient_checkpointing else "")


def _ways(training: TrainingSettings) -> Iterator[TrainingSettings]:
    for checkpointing in sorted({training.gradient_checkpointing, True}):
        size = training.at_once or training.micro_batch_size
        yield replace(training, gradient_checkpointing=checkpointing)
        while size > 1:
            size = (size + 1) // 2
            yield replace(training, gradient_checkpointing=checkpointing, at_once=size)
