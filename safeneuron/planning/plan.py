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
from safeneuron.data.rows import Message, Source
from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.model import Model
from safeneuron.models.shape import Shape
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.planning.lengths import SAMPLE, ImageLengths, VisionShape, available_pairs, available_prompts, some_of
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
    """A model as its config describes it: its sizes, those of its vision tower if it has one, and what images take."""

    shape: Shape
    vision: VisionShape | None
    lengths: ImageLengths

    @classmethod
    def of(cls, config: Config) -> ModelSpec:
        """What a config's model is, without its weights. Raises ``InputError`` where its config cannot be read."""
        table = config.model
        network = Shape.network(table.name, table.revision, table.trust_remote_code)
        shape = Shape.of(network, embedded.LABEL if table.name == embedded.NAME else table.name)
        vision = VisionShape.of(network)
        if vision is None:
            return cls(shape, None, ImageLengths())
        return cls(shape, vision, ImageLengths.read(table.name, table.revision, table.trust_remote_code))


@dataclass(frozen=True)
class ImageSizes:
    """What some images take: the fewest and the most tokens of a prompt with one, and the most patches."""

    fewest: int
    most: int
    patches: int


def plan_for(
    model: Model, pairs: Sequence[Pair], training: TrainingSettings, frozen: NeuronSet | None, change: bool
) -> Plan:
    """How the training of a loaded model on these pairs is done so that it fits on its device, or on that of each rank.

    Args:
        model: The model that is given to the training.
        pairs: Those that are trained on.
        training: The settings as they were asked for.
        frozen: The neurons that are frozen, if any.
        change: Whether fewer pairs at a time and gradient checkpointing may be chosen.

    Returns:
        The plan; its settings suit the rank with the least memory.

    Raises:
        InputError: If it may be changed and there is no way.
    """
    spec = ModelSpec(Shape.of(model.network, model.name), VisionShape.of(model.network), ImageLengths(model.processor))
    length = longest_pair(model, pairs, training.max_length)
    shown = some_of([pair for pair in pairs if pair.image is not None])
    images = _image_sizes(spec, [(pair.prompt, pair.image) for pair in shown])
    count = len(frozen) if frozen is not None else 0
    plan = _plan(spec, Device.of(model.device), training, length, count, change, images)
    if change:
        require_fit(plan, "the training")
    return replace(plan, training=_of_all_ranks(plan.training))


def _of_all_ranks(training: TrainingSettings) -> TrainingSettings:
    """What suits the rank with the least memory, since all must go through the model in the same way."""
    planned = distributed.gather([training.at_once, training.gradient_checkpointing])
    at_once = min((size for size, _ in planned if size), default=0)
    return replace(training, at_once=at_once, gradient_checkpointing=any(checkpointing for _, checkpointing in planned))


def plans_for(config: Config, states: Sequence[State]) -> dict[str, Plan]:
    """The plans for the training of states, before anything is loaded, with the lengths of pairs only guessed.

    Args:
        config: The config of the run.
        states: The states that are trained.

    Returns:
        The plans by the states' names.

    Raises:
        InputError: If even one pair of a few words at a time would not fit, for training that may be changed.
    """
    spec = ModelSpec.of(config)
    device = Device.of(device_named(config.model.device))
    plans = {}
    for state in states:
        table = config.variant(state.variant)
        if table.fit_memory:
            few_words = min(TEMPLATE_TOKENS, table.max_length)
            require_fit(_planned(config, table, spec, device, (few_words, None)), f"{state.name}/align")
        plans[state.name] = _planned(config, table, spec, device, _pair_length(config, table, spec))
    return plans


def device_asked(config: Config, memory: str, count: int, sharded: bool) -> Device:
    """The device to plan for: this machine's, or so many GPUs with so much memory each.

    Args:
        config: Its ``model.device`` is the device of this machine.
        memory: Memory of each GPU such as "80GB"; empty for this machine.
        count: How many train together.
        sharded: Whether they share what is trained (FSDP2), or each hold it (DDP).

    Returns:
        The device.

    Raises:
        InputError: For a size that is none.
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

    Tokens are guessed from the texts' characters, and images counted by the model's own processor; where texts have yet
    to be fetched or there is no processor, the caps are taken.

    Args:
        config: The config of the run.
        device: Where it will run; see ``device_asked``.

    Returns:
        A table in GB, and remarks.
    """
    spec = ModelSpec.of(config)
    shape = spec.shape
    plans = dict(_plans(config, spec, device))
    needs = _needs(config, spec, device) | {name: plan.need for name, plan in plans.items()}
    kinds = list(dict.fromkeys(kind for need in needs.values() for kind in need))
    rows = [["", *needs]]
    rows += [[kind, *(f"{need[kind] / GB:.2f}" if kind in need else "-" for need in needs.values())] for kind in kinds]
    rows.append(["in all", *(f"{total_bytes(need) / GB:.2f}" for need in needs.values())])
    spread = {"measure", "attack"} if config.model.device_map else set()
    verdicts = ["yes" if fits(need, device) else "spread" if name in spread else "no" for name, need in needs.items()]
    rows.append(["fits", *verdicts])
    lines = aligned(rows)
    remarks = [f"{name}: {_remark(plan)}" for name, plan in plans.items()]
    if config.model.device_map:
        remarks.insert(0, "spread: what does not fit waits in main memory or on disk (model.device_map)")
    remarks += _image_remarks(config, spec)
    return [
        f"{shape.name}: {shape.parameters:,} parameters in {shape.layers} layers",
        *_about(device),
        "",
        *lines,
        "",
        *remarks,
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column on the left and the others on the right of their width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def time_words(seconds: float) -> str:
    """A time to two figures, in the unit that suits it; NaN is unknown."""
    if math.isnan(seconds):
        return "unknown"
    units = {"days": (86400, 3 * 86400), "h": (3600, 2 * 3600), "min": (60, 120), "s": (1, 0)}
    unit = next(name for name, (_, least) in units.items() if seconds >= least)
    number = seconds / units[unit][0]
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"


def _plans(config: Config, spec: ModelSpec, device: Device) -> Iterator[tuple[str, Plan]]:
    """The main training, and each variant that needs another amount of memory than those before it."""
    totals: set[str] = set()
    for name in ["", *config.variants]:
        table = config.variant(name)
        plan = _planned(config, table, spec, device, _pair_length(config, table, spec))
        if table.rounds and gigabytes(total_bytes(plan.need)) not in totals:
            totals.add(gigabytes(total_bytes(plan.need)))
            yield name or "align", plan


def _needs(config: Config, spec: ModelSpec, device: Device) -> dict[str, Need]:
    measure, attack, dtype = config.measure, config.attack, config.model.dtype
    b, most = bytes_per_number(dtype, device), measure.max_tokens
    _, measured = _prompt_tokens([*config.data.unsafe, *config.data.safe], most, spec)
    longest, attacked = _prompt_tokens([*config.data.test_unsafe, *config.data.test_safe], most, spec)
    together = max(1, measure.batch_tokens // measured.fewest) if measured else 0
    return {
        "measure": measure_need(
            spec.shape,
            device,
            measure.batch_tokens,
            most,
            dtype,
            vision_bytes=_vision_bytes(spec, measured, together, b),
        ),
        "attack": attack_need(
            spec.shape,
            device,
            attack.batch_size,
            longest,
            attack.max_new_tokens,
            dtype,
            vision_bytes=_vision_bytes(spec, attacked, attack.batch_size, b),
        ),
    }


def _planned(
    config: Config, table: AlignTable, spec: ModelSpec, device: Device, longest: tuple[int, ImageSizes | None]
) -> Plan:
    shape, (length, images) = spec.shape, longest
    frozen = round((config.select.density or 0.01) * shape.width * shape.layers) if table.freeze != "none" else 0
    return _plan(spec, device, TrainingSettings.of(table, config.seed), length, frozen, table.fit_memory, images)


def _plan(
    spec: ModelSpec,
    device: Device,
    training: TrainingSettings,
    length: int,
    frozen: int,
    change: bool,
    images: ImageSizes | None,
) -> Plan:
    b = bytes_per_number(training.precision, device)

    def need(tried: TrainingSettings) -> Need:
        # Both sequences of a pair show its image.
        vision = _vision_bytes(spec, images, 2 * pairs_at_once(tried, device), b)
        return align_need(spec.shape, device, tried, length, frozen, tried.lora_rank, vision_bytes=vision)

    return plan_training(training, device, length, need, change)


def _vision_bytes(spec: ModelSpec, images: ImageSizes | None, count: int, b: int) -> float:
    """Bytes that the vision tower has at once of so many images."""
    return spec.vision.need(count * images.patches, b) if spec.vision is not None and images is not None else 0.0


def _remark(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit, with {ways(plan.training)} of {plan.length} tokens each"
    return f"{'is made to fit' if plan.changed else 'fits'} with {ways(plan.training)}, up to {plan.length} tokens each"


def _about(device: Device) -> list[str]:
    has = "an unknown amount of memory" if device.memory is None else gigabytes(device.memory)
    if device.count == 1:
        return [f"on the {'CPU' if device.kind == 'cpu' else 'GPU'} with {has}; figures in GB"]
    how = "which share what is trained (FSDP2)" if device.sharded else "each of which holds everything (DDP)"
    return [f"on each of {device.count} devices with {has}, {how}; figures in GB"]


def _pair_length(config: Config, table: AlignTable, spec: ModelSpec) -> tuple[int, ImageSizes | None]:
    """Tokens of the longest pair, about, and what images take; the cap where texts have yet to be fetched."""
    pairs, most = config.pairs, table.max_length
    parts: tuple[Any, ...] = (pairs.safety, pairs.general)
    samples = [
        available_pairs(Source(**source.model_dump())) for part in parts if part != "on-policy" for source in part
    ]
    lengths, conversations, answers = [], [], []
    for sample in samples:
        if sample is None:
            return most, None
        texts = [pair for pair in sample.all if pair.image is None or spec.vision is None]
        lengths += [_tokens_in(_text(pair.prompt) + max(pair.chosen, pair.rejected, key=len)) for pair in texts]
        conversations += [(pair.prompt, pair.image) for pair in sample.with_image]
        answers += [len(text.encode()) for pair in sample.with_image for text in (pair.chosen, pair.rejected)]
    images = _image_sizes(spec, conversations)
    if conversations:
        lengths.append(images.most + math.ceil(max(answers) / 3) if images else most)
    if "on-policy" in parts:
        longest, prompted = _prompt_tokens([*pairs.unsafe, *pairs.safe], most, spec)
        lengths.append(longest + pairs.max_new_tokens)
        images = images or prompted
    return min(most, max(lengths, default=most)), images


def _prompt_tokens(sources: Sequence[SourceTable], most: int, spec: ModelSpec) -> tuple[int, ImageSizes | None]:
    """Tokens of the longest prompt, about, and what images take; ``most`` where texts have yet to be fetched."""
    samples = [available_prompts(Source(**source.model_dump())) for source in sources]
    lengths, conversations = [], []
    for sample in samples:
        if sample is None:
            return most, None
        lengths += [_tokens_in(prompt.text) for prompt in sample.all if not sample.with_image or prompt.image is None]
        conversations += [
            (({"role": "user", "content": prompt.written},), prompt.image) for prompt in sample.with_image
        ]
    images = _image_sizes(spec, conversations)
    if conversations:
        lengths.append(images.most if images else most)
    return max(lengths, default=most), images


def _image_sizes(spec: ModelSpec, conversations: Sequence[tuple[Sequence[Message], Any]]) -> ImageSizes | None:
    """What these conversations with an image take; ``None`` where there are none, or no processor to count them."""
    if not conversations or spec.vision is None or spec.lengths.processor is None:
        return None
    tokens = [spec.lengths.tokens(messages, image) or 0 for messages, image in conversations]
    patches = [spec.lengths.patches(spec.vision, messages, image) for messages, image in conversations]
    return ImageSizes(min(tokens), max(tokens), max(patches))


def _image_remarks(config: Config, spec: ModelSpec) -> list[str]:
    """What is known of the images, as lines."""
    if spec.vision is None:
        return []
    tests = [*config.data.test_unsafe, *config.data.test_safe]
    _, images = _prompt_tokens(tests, config.measure.max_tokens, spec)
    if images is not None:
        return [
            f"images: {images.fewest} to {images.most} tokens a prompt and up to {images.patches:,} patches each, by "
            f"the model's processor, of up to {SAMPLE} test prompts of each source"
        ]
    if spec.lengths.processor is None:
        return [
            "images: the model's processor is not there, so prompts with one are taken to be as long as they may be, "
            "and the vision tower's own memory is left out"
        ]
    return []


def _text(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)


def _tokens_in(text: str) -> int:
    """About how many tokens a message takes, rather too many: three bytes each, in any script."""
    return math.ceil(len(text.encode()) / 3) + TEMPLATE_TOKENS
