"""How many tokens texts and pictures take before any weights are loaded, and what pictures ask of a vision tower.

By the model's own tokenizer and processor where these lie beside its config, else by guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from safeneuron.data.catalogue import by_name, prompts_by_name
from safeneuron.data.pairs import read_pairs
from safeneuron.data.prompts import read_prompts
from safeneuron.data.rows import Source
from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.model import Message, encode_chat
from safeneuron.models.vision import ImageTokens, image_features, processor_of, takes_images, vision_parameters
from safeneuron.models.vision import encode_image_chat as encode_seen

SAMPLE = 16
"""So many texts or pictures stand for all of a source."""
TEMPLATE = 24
"""About what a chat template adds to a request."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Lengths:
    """The tokenizer and the processor of a model, as far as they are at hand."""

    tokenizer: PreTrainedTokenizerBase | None = None
    processor: ProcessorMixin | None = None

    @classmethod
    def read(cls, name: str, revision: str = "", trust_remote_code: bool = False) -> Lengths:
        """What lies beside the config of a model; nothing of a folder that holds a config alone."""
        source = str(embedded.embedded_folder()) if name == embedded.NAME else name
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            seeing = takes_images(AutoConfig.from_pretrained(source, **options))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError):
            return cls()
        try:
            return cls(tokenizer, processor_of(source, options) if seeing else None)
        except InputError:
            return cls(tokenizer)

    def of(self, messages: Sequence[Message], picture: Any = None) -> int | None:
        """Tokens of a conversation with its generation prompt; ``None`` for a picture that nobody here can count."""
        if picture is not None:
            return len(encode_seen(self.processor, messages, picture)) if self.processor is not None else None
        if self.tokenizer is not None:
            return len(encode_chat(self.tokenizer, messages))
        return sum(estimated_length(message["content"]) for message in messages) + TEMPLATE

    def words(self, text: str) -> int:
        """Tokens of a text alone."""
        return estimated_length(text) if self.tokenizer is None else len(self.tokenizer(text)["input_ids"])

    def patches(self, eyes: VisionShape, messages: Sequence[Message], picture: Any) -> int:
        """Patches of a picture, as the vision tower is given them; 0 without a processor."""
        if self.processor is None:
            return 0
        seen = encode_seen(self.processor, messages, picture)
        assert isinstance(seen, ImageTokens), "there is a picture"
        return eyes.patches(image_features(self.processor, seen))


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
        sight = {id(parameter): parameter for parameter in vision_parameters(network)}
        own = [part for part in network.modules() if id(part._parameters.get("weight")) in sight]
        linear = [part for part in own if isinstance(part, nn.Linear)]
        # Patches are embedded by a convolution whose steps do not overlap, or by the first linear layer.
        convolved = [part for part in own if isinstance(part, nn.Conv2d | nn.Conv3d)]
        if not linear or any(parameter.dim() == 0 for parameter in sight.values()):
            return None
        if convolved:
            hidden = convolved[0].out_channels
            pixels = convolved[0].in_channels * math.prod(convolved[0].kernel_size)
        else:
            hidden, pixels = linear[0].out_features, linear[0].in_features
        width = max(max(part.in_features, part.out_features) for part in linear)
        return cls(sum(one.numel() for one in sight.values()), width, hidden, pixels)

    def patches(self, features: dict[str, Tensor]) -> int:
        """How many patches a picture has, from what its processor makes of it: padding and tiles included."""
        values = features.get("pixel_values")
        return 0 if values is None else math.ceil(values.numel() / self.pixels)

    def need(self, patches: float, b: int) -> float:
        """Bytes that a pass over so many patches has at once, in numbers of ``b`` bytes: patches (4 b W + 24 H).

        No gradient flows into the tower, so that nothing is kept of its layers.
        """
        return patches * (4 * b * self.width + 24 * self.hidden)


class SourceSample(NamedTuple):
    """What a source holds: all of it without the pictures that are drawn, and some of those with a picture, drawn."""

    all: list[Any]
    pictured: list[Any]


def available_prompts(source: Source) -> SourceSample | None:
    """The prompts of a source; ``None`` where they have yet to be fetched. Raises ``InputError`` as reading does."""
    return None if prompts_by_name(source).path.startswith("hub:") else _glance(source, read_prompts)


def available_pairs(source: Source) -> SourceSample | None:
    """The same of preference pairs."""
    return None if by_name(source).path.startswith("hub:") else _glance(source, read_pairs)


def _glance(source: Source, read: Callable[[Source], list[Any]]) -> SourceSample:
    found = read(replace(source, as_image=False, said=source.said if not source.as_image else ""))
    if source.as_image:
        return SourceSample(found, read(replace(source, count=min(source.count or SAMPLE, SAMPLE))))
    return SourceSample(found, list(some_of([one for one in found if one.image is not None])))


def estimated_length(text: str) -> int:
    """About how many tokens a text has: one for four bytes."""
    return math.ceil(len(text.encode()) / 4)


def some_of(items: Sequence[_Item], most: int = SAMPLE) -> Sequence[_Item]:
    """At most so many of them, evenly spread."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]
