"""What texts and images take before any weights are loaded: how many there are, their tokens, and their patches.

Images are counted by the model's own processor where it lies beside its config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from safeneuron.config.tables import PairSourceTable, SourceTable
from safeneuron.data.catalogue import by_name, prompts_by_name
from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import read_prompts
from safeneuron.data.rows import Message, Source
from safeneuron.errors import InputError
from safeneuron.models.vision import (
    ImageTokens,
    encode_image_chat,
    image_features,
    processor_of,
    takes_images,
    vision_parameters,
)

SAMPLE = 16
"""So many texts or images stand for all of a source."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ImageLengths:
    """What images take, by the processor of a model; ``None`` where that is not there."""

    processor: ProcessorMixin | None = None

    @classmethod
    def read(cls, name: str, revision: str = "", trust_remote_code: bool = False) -> ImageLengths:
        """By the processor that lies beside the config of a model; without one if only a config is there."""
        try:
            return cls(processor_of(name, {"trust_remote_code": trust_remote_code, "revision": revision or "main"}))
        except InputError:
            return cls()

    def tokens(self, messages: Sequence[Message], image: Any) -> int | None:
        """Tokens of a conversation with an image and its generation prompt; ``None`` without a processor."""
        return len(encode_image_chat(self.processor, messages, image)) if self.processor is not None else None

    def patches(self, vision: VisionShape, messages: Sequence[Message], image: Any) -> int:
        """Patches of an image, as the vision tower is given them; 0 without a processor."""
        if self.processor is None:
            return 0
        row = encode_image_chat(self.processor, messages, image)
        assert isinstance(row, ImageTokens), "there is an image"
        return vision.patches(image_features(self.processor, row))


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower with its projector, in numbers: all weights, the widest layer, the width of a patch.

    ``pixels`` is how many numbers a patch has.
    """

    parameters: int
    width: int
    hidden: int
    pixels: int

    @classmethod
    def of(cls, network: PreTrainedModel) -> VisionShape | None:
        """Those of a network, whose weights may be on the meta device; ``None`` for a model of text."""
        if not takes_images(network.config):
            return None
        weights = {id(parameter): parameter for parameter in vision_parameters(network)}
        parts = [part for part in network.modules() if id(part._parameters.get("weight")) in weights]
        linear = [part for part in parts if isinstance(part, nn.Linear)]
        # Patches are embedded by a convolution whose steps do not overlap, or by the first linear layer.
        convolved = [part for part in parts if isinstance(part, nn.Conv2d | nn.Conv3d)]
        if not linear or any(parameter.dim() == 0 for parameter in weights.values()):
            return None
        if convolved:
            hidden = convolved[0].out_channels
            pixels = convolved[0].in_channels * math.prod(convolved[0].kernel_size)
        else:
            hidden, pixels = linear[0].out_features, linear[0].in_features
        width = max(max(part.in_features, part.out_features) for part in linear)
        return cls(sum(parameter.numel() for parameter in weights.values()), width, hidden, pixels)

    def patches(self, features: dict[str, Tensor]) -> int:
        """How many patches an image has, from what its processor makes of it: padding and tiles included."""
        values = features.get("pixel_values")
        return 0 if values is None else math.ceil(values.numel() / self.pixels)

    def need(self, patches: float, b: int) -> float:
        """Bytes that a pass over so many patches has at once, in numbers of ``b`` bytes: patches (4 b W + 24 H).

        No gradient flows into the tower, so that nothing is kept of its layers.
        """
        return patches * (4 * b * self.width + 24 * self.hidden)


class SourceSample(NamedTuple):
    """What a source holds: all items, without the images that are drawn, and some of those with an image, drawn."""

    all: list[Any]
    with_image: list[Any]


def available_prompts(source: Source) -> SourceSample | None:
    """The prompts of a source; ``None`` where they have yet to be fetched. Raises ``InputError`` as reading does."""
    return None if prompts_by_name(source).path.startswith("hub:") else _sample(source, read_prompts)


def available_pairs(source: Source) -> SourceSample | None:
    """The same of preference pairs."""
    return None if by_name(source).path.startswith("hub:") else _sample(source, read_pairs)


def _sample(source: Source, read: Callable[[Source], list[Any]]) -> SourceSample:
    items = read(replace(source, as_image=False, said=source.said if not source.as_image else ""))
    if source.as_image:
        return SourceSample(items, read(replace(source, count=min(source.count or SAMPLE, SAMPLE))))
    return SourceSample(items, list(some_of([item for item in items if item.image is not None])))


def number_of(tables: Sequence[SourceTable | PairSourceTable]) -> float:
    """How many prompts or pairs all these sources hold; NaN where some have yet to be fetched."""
    samples = [
        available_pairs(source) if isinstance(table, PairSourceTable) else available_prompts(source)
        for table in tables
        for source in [Source(**table.model_dump())]
    ]
    return sum(math.nan if sample is None else len(sample.all) for sample in samples)


def some_of(items: Sequence[_Item], most: int = SAMPLE) -> Sequence[_Item]:
    """At most so many of them, evenly spread."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]
