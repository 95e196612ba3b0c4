"""Loading a chat model, turning prompts into tokens and batches, and generating answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from safeneuron.data.images import digest_of
from safeneuron.data.rows import Message
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models import vision
from safeneuron.neurons.layout import LINEAGE, fingerprint, widths_of
from safeneuron.runtime import distributed, quantization
from safeneuron.runtime.devices import Halving
from safeneuron.runtime.files import whole_folder
from safeneuron.runtime.offloading import device_of_inputs, explaining_meta_tensors

MOST_IMAGE_CHATS = 4096
"""How many conversations with pictures a model remembers as tokens, of some kilobytes each."""


@dataclass
class Model:
    """A causal language model with its tokenizer, or a vision-language model with its processor.

    Args:
        network: The network.
        tokenizer: Its tokenizer, with a padding token.
        name: What reports call it.
        source: Where it was loaded from.
        stored_dtype: The precision of its weights there, which may be another than the one it computes in now.
        processor: Of a vision-language model; without it the model is asked in text only.
        without_images: Why a vision-language model has no processor.
        unpacked: How weights that are plain here were packed.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    stored_dtype: torch.dtype = torch.float32
    processor: ProcessorMixin | None = None
    without_images: str = ""
    unpacked: str = ""
    _image_chats: dict[tuple[str, str], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Whose neurons these are; the same for all models trained from one (see ``layout.fingerprint``)."""
        return fingerprint(self.network)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return widths_of(self.network)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return device_of_inputs(self.network) or self.network.device

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, the processor's or the tokenizer's."""
        return bool(self._has_image_template or self.tokenizer.chat_template)

    @property
    def _has_image_template(self) -> bool:
        """Whether the processor has a chat template of its own, into which images fit."""
        return self.processor is not None and bool(cast("Any", self.processor).chat_template)

    def encode(self, messages: Sequence[Message], picture: Any = None) -> list[int]:
        """Token ids of a conversation through the chat template, with the generation prompt at the end.

        A model without a chat template gets the bare text of the messages, with its own special tokens.

        Args:
            messages: Each with a ``role`` and ``content``.
            picture: Stands at the beginning of the first message of the user (see ``Prompt``).

        Returns:
            Token ids; with a picture ``vision.ImageTokens``.

        Raises:
            InputError: For a picture that the model cannot be shown.
        """
        if self.processor is not None and self._has_image_template:
            if picture is None:
                return vision.encode_image_chat(self.processor, messages, None)
            return self._encode_image_chat(self.processor, messages, picture)
        if picture is not None:
            reason = self.without_images or "it is no vision-language model, or its processor has no chat template"
            raise InputError(f"{self.name} cannot be shown images: {reason}; use prompts without images")
        return encode_chat(self.tokenizer, messages)

    def _encode_image_chat(self, processor: ProcessorMixin, messages: Sequence[Message], picture: Any) -> list[int]:
        """Token ids of a conversation with a picture, remembered for the ``MOST_IMAGE_CHATS`` latest new ones."""
        # The same pictures come back under every attack; how many tokens one takes, only its processing tells.
        key = (repr(messages), digest_of(picture))
        if key not in self._image_chats:
            ids = vision.encode_image_chat(processor, messages, picture)
            while len(self._image_chats) >= MOST_IMAGE_CHATS:
                del self._image_chats[next(iter(self._image_chats))]
            self._image_chats[key] = ids
        return self._image_chats[key]

    def ask(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """Token ids of one request, with its picture if it has one.

        Args:
            prompt: The request.
            max_tokens: How many of its last tokens are taken; all if not given.

        Returns:
            Token ids, with the generation prompt at the end.

        Raises:
            InputError: Like ``encode``, and where a picture would be cut.
        """
        ids = self.encode([{"role": "user", "content": prompt.written}], prompt.image)
        return ids if max_tokens is None else vision.truncated(ids, max_tokens, prompt.text)

    def inputs(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        """What the network is given of encoded conversations: ids, mask, pictures.

        Args:
            rows: Token ids of each; either all rows have a picture or none has.
            side: Where shorter rows are padded, ``left`` or ``right``.

        Returns:
            Tensors by the names of the network's arguments, ``[row, token]`` those of ids and mask.
        """
        ids, mask = pad(rows, int(self.tokenizer.pad_token_id), side, self.device)
        with_picture = [row for row in rows if isinstance(row, vision.ImageTokens)]
        if len(with_picture) not in (0, len(rows)):
            raise ValueError(
                f"{len(with_picture)} of {len(rows)} rows have a picture; only all or none can share a batch"
            )
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.processor is None or not with_picture:
            return inputs
        features = [vision.image_features(self.processor, row) for row in with_picture]
        images = vision.joined_images(features, [len(row) for row in with_picture], ids.shape[1], side)
        return inputs | vision.pixels_at(images, self.network)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, whole or not at all; its config remembers whose neurons the model has.

        Args:
            folder: Where; its parent is made.

        Raises:
            InputError: For a model that is quantised in memory.
        """
        if quantization.has_four_bits(self.network):
            raise InputError(f"{self.name} is in 4 bits here, which cannot be saved; save what it was made from")
        setattr(self.network.config, LINEAGE, self.fingerprint)
        if distributed.is_main():
            with whole_folder(folder) as neighbour:
                self.network.save_pretrained(neighbour)
                (self.processor or self.tokenizer).save_pretrained(neighbour)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn at random: from the most probable tokens that together have ``top_p``, at ``temperature``.

    The draws depend on the ``seed`` and on what shares a batch alone, so interrupted work continues with the same
    ones. Raises ``InputError`` for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "to sample, temperature must be above 0 and top_p above 0 and at most 1, found "
                f"{self.temperature:g} and {self.top_p:g}; leave sampling out to answer greedily"
            )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation without images, for whatever answers it; see ``Model.encode``.

    Args:
        tokenizer: With a chat template, or without one: then the bare text of the messages is taken.
        messages: Each with a ``role`` and ``content``.

    Returns:
        Token ids, with the generation prompt at the end.
    """
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[row, token]`` of rows of unequal length, padded on the given side."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    skip: int = 0,
    opening: int = 0,
    sampling: Sampling | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Answers to encoded prompts, greedy or sampled, batch by batch.

    All ranks get all answers; each of them generates its share of the batches. Batches are formed by length, always in
    the same way, and padded on the left. An answer ends at any end token of the model's generation settings, or at the
    tokenizer's own. A batch that does not fit into memory is answered in halves, with a ``MemoryShortage`` warning, and
    so are all later ones.

    Args:
        model: Who answers.
        prompts: Token ids of each, with the generation prompt at the end.
        max_new_tokens: Tokens of an answer, at most.
        batch_size: Prompts in one batch.
        skip: So many prompts, always whole batches, are left out from the beginning of the order, so that interrupted
            work continues with the same batches.
        opening: The last so many tokens of every prompt are the beginning of its answer, and part of the text.
        sampling: How tokens are drawn; greedy if not given.

    Yields:
        The answers of a batch, as (index of the prompt, text).

    Raises:
        InputError: Where a single prompt is too much for the memory.
    """
    batches = by_length(prompts, batch_size, skip)
    settings = generation_settings(model.network, model.tokenizer, max_new_tokens, sampling)

    def texts_of(batch: Sequence[int]) -> list[str]:
        inputs = model.inputs([prompts[i] for i in batch], "left")
        with _seeded(sampling, batch[0], model.device):
            texts = generate_texts(model.network, model.tokenizer, inputs, settings, opening)
        return [text.strip() for text in texts]

    halving: Halving[int] = Halving("answering", "use a smaller max_new_tokens, or a device with more memory")

    def in_halves(batch: list[int]) -> list[str]:
        # Prompts with and without a picture may be in one batch, but not in one pass.
        answers: dict[int, str] = {}
        for places in vision.input_kinds([prompts[index] for index in batch]):
            alike = [batch[place] for place in places]
            texts = [text for part in halving.over(alike, texts_of) for text in part]
            answers |= dict(zip(alike, texts, strict=True))
        return [answers[index] for index in batch]

    for batch, texts in zip(batches, distributed.deal(batches, in_halves), strict=True):
        yield list(zip(batch, texts, strict=True))


def generation_settings(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> GenerationConfig:
    """How a network writes, whatever its own generation settings ask for: greedily, or as ``sampling`` says."""
    drawn = {} if sampling is None else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # A static cache was slower than this dynamic one at every batch size, and compiled graphs would not see hooks.
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=sampling is not None,
        **drawn,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(network.generation_config, tokenizer),
        pad_token_id=padding_token(network, tokenizer),
        use_cache=True,
    )


def generate_texts(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    settings: GenerationConfig,
    opening: int = 0,
) -> list[str]:
    """What a network writes after each row of ``inputs``, padded on the left, special tokens left out.

    The last ``opening`` tokens of every row are part of the text.
    """
    answer = cast("Callable[..., Tensor]", network.generate)
    with torch.inference_mode(), explaining_meta_tensors(network):
        out = answer(**inputs, generation_config=settings)
    width = inputs["input_ids"].shape[1]
    return list(tokenizer.batch_decode(out[:, width - opening :], skip_special_tokens=True))


@contextmanager
def _seeded(sampling: Sampling | None, first: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws what the seed and the first prompt of a batch decide; then it goes on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed * 1_000_003 + first)
        yield


def by_length(prompts: Sequence[Sequence[int]], batch_size: int, skip: int = 0) -> list[list[int]]:
    """Indices of prompts in batches, longest first, without the first ``skip`` prompts, which are whole batches."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    if skip % batch_size and skip < len(order):
        raise ValueError(f"only whole batches can be skipped, found {skip} prompts in batches of {batch_size}")
    return [order[start : start + batch_size] for start in range(skip, len(order), batch_size)]


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer: those of a model's generation settings, and the tokenizer's own."""
    # Community checkpoints often keep the base model's generation settings, which lack the end token of the chat form.
    of_model = settings.eos_token_id
    ends = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


def padding_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that fills up rows: the tokenizer's, or an end token, which the decoding of answers leaves out."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    end: Any = network.generation_config.eos_token_id
    first = end[0] if isinstance(end, list) else tokenizer.eos_token_id if end is None else end
    return None if first is None else int(first)
