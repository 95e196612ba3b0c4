"""What a run needs in memory, from its config: the lines of `plan`, and the plan of each training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safeneuron.config.align import AlignTable
from safeneuron.config.schema import Config
from safeneuron.config.states import State
from safeneuron.config.tables import SourceTable
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.model import Message, Model
from safeneuron.models.shape import Shape
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.planning.lengths import SAMPLE, Lengths, VisionShape, available_pairs, available_prompts, some_of
from safeneuron.planning.memory import (
    GB,
    Device,
    Need,
    Plan,
    align_need,
    attack_need,
    bytes_per_number,
    fits,
    gigabytes,
    longest_pair,
    measure_need,
    pairs_at_once,
    plan_training,
    require_fit,
    total_bytes,
    ways,
)
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import device_named
from safeneuron.training.settings import TrainingSettings

UNITS = {"MB": 2**20, "GB": GB, "TB": 2**40}
TEMPLATE_TOKENS = 64
"""About what a chat template adds to a prompt."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as it is on paper: its sizes, those of its vision tower if it has one, and what counts its tokens."""

    shape: Shape
    eyes: VisionShape | None
    lengths: Lengths

    @classmethod
    def of(cls, config: Config, words: bool = False) -> ModelSpec:
        """What a config's model is, without its weights; with a tokenizer for pictures alone, or for ``words`` too.

        Raises ``InputError`` where the model's config cannot be read.
        """
        table = config.model
        network = Shape.network(table.name, table.revision, table.trust_remote_code)
        shape = Shape.of(network, embedded.LABEL if table.name == embedded.NAME else table.name)
        eyes = VisionShape.of(network)
        known = words or eyes is not None
        lengths = Lengths.read(table.name, table.revision, table.trust_remote_code) if known else Lengths()
        return cls(shape, eyes, lengths)


@dataclass(frozen=True)
class Pictures:
    """What some pictures take: the fewest and the most tokens of a prompt with one, and the most patches."""

    fewest: int
    most: int
    patches: int


def plan_for(
    model: Model, pairs: Sequence[Pair], training: TrainingSettings, frozen: NeuronSet | None, change: bool
) -> Plan:
    """How the training of a loaded model on these pairs is done so that it fits on its device, or on that of each rank.

    Raises ``InputError`` if it may be changed and there is no way.
    """
    paper = ModelSpec(
        Shape.of(model.network, model.name), VisionShape.of(model.network), Lengths(model.tokenizer, model.processor)
    )
    length = longest_pair(model, pairs, training.max_length)
    seen = _pictures(paper, [(pair.prompt, pair.image) for pair in some_of([p for p in pairs if p.image is not None])])
    count = len(frozen) if frozen is not None else 0
    made = _plan(paper, Device.of(model.device), training, length, count, change, seen)
    if change:
        require_fit(made, "the training")
    return replace(made, training=_of_all_ranks(made.training))


def _of_all_ranks(training: TrainingSettings) -> TrainingSettings:
    """What suits the rank with the least memory, since all must go through the model in the same way."""
    asked = distributed.gather([training.at_once, training.gradient_checkpointing])
    at_once = min((size for size, _ in asked if size), default=0)
    return replace(training, at_once=at_once, gradient_checkpointing=any(again for _, again in asked))


def plans_for(config: Config, states: Sequence[State]) -> dict[str, Plan]:
    """The plans for the training of states, before anything is loaded, with the lengths of pairs only guessed.

    Raises ``InputError`` if even one pair of a few words at a time would not fit, for training that may be changed.
    """
    paper = ModelSpec.of(config)
    device = Device.of(device_named(config.model.device))
    found = {}
    for state in states:
        table = config.variant(state.variant)
        if table.fit_memory:
            few_words = min(TEMPLATE_TOKENS, table.max_length)
            require_fit(_planned(config, table, paper, device, (few_words, None)), f"{state.name}/align")
        found[state.name] = _planned(config, table, paper, device, _pair_length(config, table, paper))
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


def table_of_needs(config: Config, device: Device, paper: ModelSpec | None = None) -> list[str]:
    """What each stage needs, by what it is for, as lines of text.

    Tokens are guessed from the texts' characters where these are at hand, and pictures counted by the model's own
    processor where that is; where they are not, the caps are taken.
    """
    paper = paper or ModelSpec.of(config)
    shape = paper.shape
    plans = dict(_plans(config, paper, device))
    needs = _needs(config, paper, device) | {name: made.need for name, made in plans.items()}
    kinds = list(dict.fromkeys(kind for need in needs.values() for kind in need))
    rows = [["", *needs]]
    rows += [[kind, *(f"{need[kind] / GB:.2f}" if kind in need else "-" for need in needs.values())] for kind in kinds]
    rows.append(["in all", *(f"{total_bytes(need) / GB:.2f}" for need in needs.values())])
    spread = {"measure", "attack"} if config.model.device_map else set()
    says = {name: "yes" if fits(need, device) else "spread" if name in spread else "no" for name, need in needs.items()}
    rows.append(["fits", *says.values()])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    told = [f"{name}: {_told(made)}" for name, made in plans.items()]
    if config.model.device_map:
        told.insert(0, "spread: what does not fit waits in main memory or on disk (model.device_map)")
    told += _of_pictures(config, paper)
    return [
        f"{shape.name}: {shape.parameters:,} parameters in {shape.layers} layers",
        *_about(device),
        "",
        *lines,
        "",
        *told,
    ]


def _plans(config: Config, paper: ModelSpec, device: Device) -> Iterator[tuple[str, Plan]]:
    """The main training, and each variant that needs another amount of memory than those before it."""
    seen: set[str] = set()
    for name in ["", *config.variants]:
        table = config.variant(name)
        made = _planned(config, table, paper, device, _pair_length(config, table, paper))
        if table.rounds and gigabytes(total_bytes(made.need)) not in seen:
            seen.add(gigabytes(total_bytes(made.need)))
            yield name or "align", made


def _needs(config: Config, paper: ModelSpec, device: Device) -> dict[str, Need]:
    measure, attack, dtype = config.measure, config.attack, config.model.dtype
    b, most = bytes_per_number(dtype, device), measure.max_tokens
    _, read = _prompt_tokens([*config.data.unsafe, *config.data.safe], most, paper)
    asked, seen = _prompt_tokens([*config.data.test_unsafe, *config.data.test_safe], most, paper)
    together = max(1, measure.batch_tokens // read.fewest) if read else 0
    return {
        "measure": measure_need(
            paper.shape, device, measure.batch_tokens, most, dtype, sight=_sight(paper, read, together, b)
        ),
        "attack": attack_need(
            paper.shape,
            device,
            attack.batch_size,
            asked,
            attack.max_new_tokens,
            dtype,
            sight=_sight(paper, seen, attack.batch_size, b),
        ),
    }


def _planned(
    config: Config, table: AlignTable, paper: ModelSpec, device: Device, longest: tuple[int, Pictures | None]
) -> Plan:
    shape, (length, seen) = paper.shape, longest
    frozen = round((config.select.density or 0.01) * shape.width * shape.layers) if table.freeze != "none" else 0
    return _plan(paper, device, TrainingSettings.of(table, config.seed), length, frozen, table.fit_memory, seen)


def _plan(
    paper: ModelSpec,
    device: Device,
    training: TrainingSettings,
    length: int,
    frozen: int,
    change: bool,
    seen: Pictures | None,
) -> Plan:
    b = bytes_per_number(training.precision, device)

    def need(tried: TrainingSettings) -> Need:
        # Both sequences of a pair show its picture.
        sight = _sight(paper, seen, 2 * pairs_at_once(tried, device), b)
        return align_need(paper.shape, device, tried, length, frozen, tried.lora_rank, sight=sight)

    return plan_training(training, device, length, need, change)


def _sight(paper: ModelSpec, seen: Pictures | None, count: int, b: int) -> float:
    """Bytes that the vision tower has at once of so many pictures."""
    return paper.eyes.need(count * seen.patches, b) if paper.eyes is not None and seen is not None else 0.0


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


def _pair_length(config: Config, table: AlignTable, paper: ModelSpec) -> tuple[int, Pictures | None]:
    """Tokens of the longest pair, about, and what pictures take; the cap where texts are not at hand yet."""
    pairs, most = config.pairs, table.max_length
    parts: tuple[Any, ...] = (pairs.safety, pairs.general)
    found = [available_pairs(Source(**one.model_dump())) for part in parts if part != "on-policy" for one in part]
    lengths, seen = [], []
    for one in found:
        if one is None:
            return most, None
        texts = [pair for pair in one.all if pair.image is None or paper.eyes is None]
        lengths += [_tokens_in(_text(pair.prompt) + max(pair.chosen, pair.rejected, key=len)) for pair in texts]
        seen += [(pair.prompt, pair.image) for pair in one.pictured]
    answers = [len(text.encode()) for one in found if one for p in one.pictured for text in (p.chosen, p.rejected)]
    pictures = _pictures(paper, seen)
    if seen:
        lengths.append(pictures.most + math.ceil(max(answers) / 3) if pictures else most)
    if "on-policy" in parts:
        asked, more = _prompt_tokens([*pairs.unsafe, *pairs.safe], most, paper)
        lengths.append(asked + pairs.max_new_tokens)
        pictures = pictures or more
    return min(most, max(lengths, default=most)), pictures


def _prompt_tokens(sources: Sequence[SourceTable], most: int, paper: ModelSpec) -> tuple[int, Pictures | None]:
    """Tokens of the longest prompt, about, and what pictures take; ``most`` where texts are not at hand yet."""
    found = [available_prompts(Source(**source.model_dump())) for source in sources]
    lengths, seen = [], []
    for one in found:
        if one is None:
            return most, None
        lengths += [_tokens_in(prompt.text) for prompt in one.all if not one.pictured or prompt.image is None]
        seen += [(({"role": "user", "content": prompt.written},), prompt.image) for prompt in one.pictured]
    pictures = _pictures(paper, seen)
    if seen:
        lengths.append(pictures.most if pictures else most)
    return max(lengths, default=most), pictures


def _pictures(paper: ModelSpec, seen: Sequence[tuple[Sequence[Message], Any]]) -> Pictures | None:
    """What these conversations with a picture take; ``None`` where there are none, or nobody here can count them."""
    if not seen or paper.eyes is None or paper.lengths.processor is None:
        return None
    tokens = [paper.lengths.of(messages, picture) or 0 for messages, picture in seen]
    patches = [paper.lengths.patches(paper.eyes, messages, picture) for messages, picture in seen]
    return Pictures(min(tokens), max(tokens), max(patches))


def _of_pictures(config: Config, paper: ModelSpec) -> list[str]:
    """What is known of the pictures, as lines."""
    if paper.eyes is None:
        return []
    tests = [*config.data.test_unsafe, *config.data.test_safe]
    _, seen = _prompt_tokens(tests, config.measure.max_tokens, paper)
    if seen is not None:
        return [
            f"pictures: {seen.fewest} to {seen.most} tokens a prompt and up to {seen.patches:,} patches each, by the "
            f"model's processor, of up to {SAMPLE} test prompts of each source"
        ]
    if paper.lengths.processor is None:
        return [
            "pictures: the model's processor is not at hand, so prompts with one are taken to be as long as they may "
            "be, and the vision tower's own memory is left out"
        ]
    return []


def _text(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)


def _tokens_in(text: str) -> int:
    """About how many tokens a message takes, rather too many: three bytes each, in any script."""
    return math.ceil(len(text.encode()) / 3) + TEMPLATE_TOKENS
