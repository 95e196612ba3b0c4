"""What a run needs in memory, from its config: the lines of `plan`, and the plan of each training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from safeneuron import ranks
from safeneuron.config import AlignTable, Config, SourceTable
from safeneuron.data import Pair, read_prompts
from safeneuron.errors import InputError
from safeneuron.fitting import Plan, fits, gigabytes, plan, require_fit, ways
from safeneuron.models import Model, device_named
from safeneuron.neurons import NeuronSet
from safeneuron.pairs import read_pairs
from safeneuron.planning import (
    GB,
    Device,
    Need,
    Shape,
    align_need,
    attack_need,
    longest_pair,
    measure_need,
    total,
)
from safeneuron.rows import Source
from safeneuron.states import State
from safeneuron.training import Training

TRAINING = {field.name for field in fields(Training)} - {"seed"}
"""The keys of [align] that are settings of the training itself."""

UNITS = {"MB": 2**20, "GB": GB, "TB": 2**40}
TEMPLATE_TOKENS = 64
"""About what a chat template adds to a prompt."""


def training_of(config: Config, table: AlignTable) -> Training:
    """The settings of a training in its table."""
    return Training(**table.model_dump(include=TRAINING), seed=config.seed)


def plan_for(model: Model, pairs: Sequence[Pair], training: Training, frozen: NeuronSet | None, change: bool) -> Plan:
    """How the training of a loaded model on these pairs is done so that it fits on its device, or on that of each rank.

    Raises ``InputError`` if it may be changed and there is no way.
    """
    shape, device = Shape.of(model.network, model.name), Device.of(model.device)
    length = longest_pair(model, pairs, training.max_length)
    made = _plan(shape, device, training, length, len(frozen) if frozen is not None else 0, change)
    if change:
        require_fit(made, "the training")
    return replace(made, training=_of_all_ranks(made.training))


def _of_all_ranks(training: Training) -> Training:
    """What suits the rank with the least memory, since all must go through the model in the same way."""
    asked = ranks.gather([training.at_once, training.gradient_checkpointing])
    at_once = min((size for size, _ in asked if size), default=0)
    return replace(training, at_once=at_once, gradient_checkpointing=any(again for _, again in asked))


def plans_for(config: Config, states: Sequence[State]) -> dict[str, Plan]:
    """The plans for the training of states, before anything is loaded, with the lengths of pairs only guessed.

    Raises ``InputError`` if even one pair of a few words at a time would not fit, for training that may be changed.
    """
    shape = _shape(config)
    device = Device.of(device_named(config.model.device))
    found = {}
    for state in states:
        table = config.variant(state.variant)
        if table.fit_memory:
            few_words = min(TEMPLATE_TOKENS, table.max_length)
            require_fit(_planned(config, table, shape, device, few_words), f"{state.name}/align")
        found[state.name] = _planned(config, table, shape, device, _pair_length(config, table))
    return found


def device_asked(config: Config, memory: str, count: int, sharded: bool) -> Device:
    """The device to plan for: this machine's, or so many GPUs with so much memory each ("80GB").

    Raises ``InputError`` for a size that is none.
    """
    if not memory:
        device = Device.of(device_named(config.model.device))
    else:
        size = re.fullmatch(r"([\d.]*\d)\s*([MGT])i?B?", memory.strip(), re.IGNORECASE)
        if size is None:
            raise InputError(f"--device-memory expects a size such as 80GB, but found {memory!r}")
        device = Device("cuda", float(size[1]) * UNITS[f"{size[2].upper()}B"], bfloat16=True)
    return replace(device, count=count, sharded=sharded and count > 1)


def table_of_needs(config: Config, device: Device) -> list[str]:
    """What each stage needs, by what it is for, as lines of text.

    Tokens are guessed from the texts' characters where these are at hand; where they are not, the caps are taken.
    """
    shape = _shape(config)
    plans = dict(_plans(config, shape, device))
    needs = _needs(config, shape, device) | {name: made.need for name, made in plans.items()}
    kinds = list(dict.fromkeys(kind for need in needs.values() for kind in need))
    rows = [["", *needs]]
    rows += [[kind, *(f"{need[kind] / GB:.2f}" if kind in need else "-" for need in needs.values())] for kind in kinds]
    rows.append(["in all", *(f"{total(need) / GB:.2f}" for need in needs.values())])
    rows.append(["fits", *("yes" if fits(need, device) else "no" for need in needs.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    told = [f"{name}: {_told(made)}" for name, made in plans.items()]
    return [
        f"{shape.name}: {shape.parameters:,} parameters in {shape.layers} layers",
        *_about(device),
        "",
        *lines,
        "",
        *told,
    ]


def _plans(config: Config, shape: Shape, device: Device) -> Iterator[tuple[str, Plan]]:
    """The main training, and each variant that needs another amount of memory than those before it."""
    seen: set[str] = set()
    for name in ["", *config.variants]:
        table = config.variant(name)
        made = _planned(config, table, shape, device, _pair_length(config, table))
        if table.rounds and gigabytes(total(made.need)) not in seen:
            seen.add(gigabytes(total(made.need)))
            yield name or "align", made


def _needs(config: Config, shape: Shape, device: Device) -> dict[str, Need]:
    measure, attack, dtype = config.measure, config.attack, config.model.dtype
    asked = _prompt_tokens([*config.data.test_unsafe, *config.data.test_safe], measure.max_tokens)
    return {
        "measure": measure_need(shape, device, measure.batch_tokens, measure.max_tokens, dtype),
        "attack": attack_need(shape, device, attack.batch_size, asked, attack.max_new_tokens, dtype),
    }


def _planned(config: Config, table: AlignTable, shape: Shape, device: Device, length: int) -> Plan:
    frozen = round((config.select.density or 0.01) * shape.width * shape.layers) if table.freeze != "none" else 0
    return _plan(shape, device, training_of(config, table), length, frozen, table.fit_memory)


def _plan(shape: Shape, device: Device, training: Training, length: int, frozen: int, change: bool) -> Plan:
    return plan(
        training,
        device,
        length,
        lambda tried: align_need(shape, device, tried, length, frozen, tried.lora_rank),
        change,
    )


def _shape(config: Config) -> Shape:
    return Shape.read(config.model.name, config.model.revision, config.model.trust_remote_code)


def _told(made: Plan) -> str:
    if not made.fits:
        return f"does not fit, with {ways(made.training)} of {made.length} tokens each"
    return f"{'is made to fit' if made.changed else 'fits'} with {ways(made.training)}, up to {made.length} tokens each"


def _about(device: Device) -> list[str]:
    has = "an unknown amount of memory" if device.memory is None else gigabytes(device.memory)
    if device.count == 1:
        return [f"on the {'CPU' if device.kind == 'cpu' else 'GPU'} with {has}; figures in GB"]
    how = "which share what is trained (FSDP2)" if device.sharded else "each of which holds everything (DDP)"
    return [f"on each of {device.count} devices with {has}, {how}; figures in GB"]


def _pair_length(config: Config, table: AlignTable) -> int:
    """Tokens of the longest pair, about; the cap where texts are not at hand yet."""
    pairs = config.pairs
    parts: tuple[Any, ...] = (pairs.safety, pairs.general)
    sources = [source for part in parts if part != "on-policy" for source in part]
    # How many tokens an image takes is the processor's to say.
    if any(source.path.startswith("hub:") or source.as_image for source in sources):
        return table.max_length
    read = [pair for source in sources for pair in read_pairs(Source(**source.model_dump()))]
    if any(pair.image is not None for pair in read):
        return table.max_length
    lengths = [
        _tokens_in("".join(message["content"] for message in pair.prompt) + answer)
        for pair in read
        for answer in (pair.chosen, pair.rejected)
    ]
    if "on-policy" in parts:
        lengths.append(_prompt_tokens([*pairs.unsafe, *pairs.safe], table.max_length) + pairs.max_new_tokens)
    return min(table.max_length, max(lengths, default=table.max_length))


def _prompt_tokens(sources: Sequence[SourceTable], most: int) -> int:
    if any(source.path.startswith("hub:") or source.as_image for source in sources):
        return most
    prompts = [prompt for source in sources for prompt in read_prompts(Source(**source.model_dump()))]
    if any(prompt.image is not None for prompt in prompts):
        return most
    return max((_tokens_in(prompt.text) for prompt in prompts), default=most)


def _tokens_in(text: str) -> int:
    """About how many tokens a message takes, rather too many: three bytes each, in any script."""
    return math.ceil(len(text.encode()) / 3) + TEMPLATE_TOKENS
