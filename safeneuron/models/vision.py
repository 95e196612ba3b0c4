"""What a vision-language model is given: its processor, prompts with a picture as tokens, and pictures as tensors.

A conversation with a picture is a list of token ids like any other (``ImageTokens``), in which the processor has put as
many ids as the picture has patches. Its pixels are computed anew for each batch, so that thousands of prompts take no
memory. Rows with and without a picture never share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from safeneuron.data.images import name_of, opened
from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.layout import network_of
from safeneuron.runtime.offloading import device_of_inputs, explaining_meta_tensors

OF_TOKENS = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What processors return for each token of a row, ``[row, token, ...]``, beside its id; all else is of the pictures."""

NOT_FOR_MODELS = ("input_ids", "attention_mask")
"""What a processor also returns, which is known already."""

Features = dict[str, Tensor]
"""What a model is given of the picture of one row."""


class ImageTokens(list[int]):
    """Token ids of a conversation with a picture, and what is needed to show it to the model.

    ``text`` is the conversation as the template has it, before the picture's place is widened. What is added with ``+``
    follows the conversation.
    """

    def __init__(self, ids: Iterable[int], text: str, picture: Any) -> None:
        super().__init__(ids)
        self.text = text
        self.picture = picture

    def __add__(self, more: list[int]) -> ImageTokens:  # type: ignore[override]
        return ImageTokens([*self, *more], self.text, self.picture)


class _NoVideo(dict[str, Any]):
    """Stands in for a video processor, which needs torchvision; keeps its settings, so that they can be saved."""

    _auto_class = None
    model_input_names: tuple[str, ...] = ()


def takes_images(config: Any) -> bool:
    """Whether a config describes a vision-language model, one that answers to images and text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def processor_of(source: str, options: Mapping[str, Any]) -> ProcessorMixin:
    """The processor of a vision-language model, with Pillow's image processing where there is no torchvision.

    Args:
        source: A folder or a name on the Hub.
        options: What ``from_pretrained`` is given besides.

    Returns:
        The processor.

    Raises:
        InputError: Where it cannot be loaded.
    """
    try:
        return _processor_of(source, options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).strip().split("\n")[:2])
        raise InputError(
            f"the processor of {source} cannot be loaded ({reason}), so it can be asked in text only; install what is "
            "missing with: pip install 'safeneuron[vision]'"
        ) from error


def _processor_of(source: str, options: Mapping[str, Any]) -> ProcessorMixin:
    config = AutoConfig.from_pretrained(source, **options)
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    settings, _ = ProcessorMixin.get_processor_dict(source, **options)
    other = kind is None or settings.get("processor_class", kind.__name__) != kind.__name__
    if is_torchvision_available() or other or "video_processor" not in kind.get_attributes():
        processor = AutoProcessor.from_pretrained(source, **options)  # type: ignore[no-untyped-call]
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(f"there is only a {type(processor).__name__}")
        return processor
    parts = {
        "image_processor": cast("Any", AutoImageProcessor).from_pretrained(source, backend="pil", **options),
        "tokenizer": AutoTokenizer.from_pretrained(source, **options),
        "video_processor": _NoVideo(settings.get("video_processor") or {}),
    }
    without_video = processor_without_video(kind)
    return cast(
        "ProcessorMixin", without_video.from_args_and_dict([parts[name] for name in kind.get_attributes()], settings)
    )


def processor_without_video(kind: type[ProcessorMixin]) -> Any:
    """The class of a processor, of the same name, whose video processor may be a stand-in."""

    proper: Callable[..., Any] = kind.check_argument_for_proper_class

    def check(self: ProcessorMixin, name: str, value: Any) -> Any:
        return type(value) if name == "video_processor" else proper(self, name, value)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def no_video() -> Any:
    """The stand-in itself, for processors made by hand."""
    return _NoVideo()


def encode_image_chat(processor: ProcessorMixin, messages: Sequence[Mapping[str, str]], picture: Any) -> list[int]:
    """Token ids of a conversation through the processor's chat template, with the generation prompt at the end.

    Args:
        processor: Of a vision-language model.
        messages: Each with a ``role`` and ``content``.
        picture: Stands before the first message of the user; None for a conversation without one.

    Returns:
        Token ids; with a picture ``ImageTokens``.

    Raises:
        InputError: For a picture that cannot be opened or that the processor cannot take, and for a text with the
            picture's mark in it.
    """
    maker: Any = processor
    mark = str(getattr(maker, "image_token", "") or "")
    if mark and any(mark in message["content"] for message in messages):
        raise InputError(f"a text holds {mark!r}, which is this model's mark for an image; take it out of the prompt")
    text = rendered(processor, messages, picture is not None)
    special = not (maker.tokenizer.bos_token and text.startswith(maker.tokenizer.bos_token))
    if picture is None:
        return list(maker.tokenizer(text, add_special_tokens=special)["input_ids"])
    ids = _processed(processor, text, picture)["input_ids"][0].tolist()
    return ImageTokens(ids, text, picture)


def rendered(processor: ProcessorMixin, messages: Sequence[Mapping[str, str]], pictured: bool, answer: str = "") -> str:
    """The conversation as text, up to the generation prompt, or up to the end of the ``answer`` if there is one."""
    conversation: list[dict[str, Any]] = []
    for message in messages:
        parts: list[dict[str, str]] = [{"type": "text", "text": message["content"]}]
        if pictured and message["role"] == "user":
            parts, pictured = [{"type": "image"}, *parts], False
        conversation.append({"role": message["role"], "content": parts})
    if answer:
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(conversation, add_generation_prompt=not answer, tokenize=False))


def answer_ids(
    processor: ProcessorMixin, messages: Sequence[Mapping[str, str]], answer: str, pictured: bool
) -> list[int]:
    """Token ids of an answer as the template writes it after the generation prompt, to the end of its turn.

    Args:
        processor: Of a vision-language model.
        messages: The conversation up to the answer.
        answer: Its text.
        pictured: Whether a picture stands in the conversation.

    Returns:
        Token ids of the answer alone.
    """
    maker: Any = processor
    before, whole = rendered(processor, messages, pictured), rendered(processor, messages, pictured, answer)
    # Templates may open an answer in other words than the one that they write out; the answer itself is always there.
    start = len(before) if whole.startswith(before) else whole.rindex(answer.strip())
    return list(maker.tokenizer(whole[start:], add_special_tokens=False)["input_ids"])


def image_features(processor: ProcessorMixin, row: ImageTokens) -> Features:
    """What the model is given of a row's picture, as the processor makes it.

    Args:
        processor: Of the model.
        row: An encoded conversation with a picture.

    Returns:
        Tensors by the names of the network's arguments.
    """
    processed = _processed(processor, row.text, row.picture)
    return {name: value for name, value in processed.items() if name not in NOT_FOR_MODELS}


def _processed(processor: ProcessorMixin, text: str, picture: Any) -> Any:
    maker: Any = processor
    special = not (maker.tokenizer.bos_token and text.startswith(maker.tokenizer.bos_token))
    try:
        return maker(text=[text], images=[[opened(picture)]], return_tensors="pt", add_special_tokens=special)
    except InputError:
        raise
    # A picture that is a line, for example, has no patches.
    except ValueError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the model cannot take {name_of(picture)} ({reason}); use another size or another file"
        ) from error


def joined_images(features: Sequence[Features], lengths: Sequence[int], width: int, side: str) -> Features:
    """The features of the rows of a batch as one.

    What is of tokens is widened like the ids: tokens that follow the conversation are like its last one, padding is
    zero. What is of pictures is put one after the other, in the order of the rows; where their sizes differ, the
    smaller ones are filled up with zeros, as processors do it.

    Args:
        features: Of each row.
        lengths: Tokens of each row.
        width: Tokens of a row with its padding.
        side: Where rows are padded, ``left`` or ``right``.

    Returns:
        Tensors by the names of the network's arguments.
    """
    joined = {}
    for name in features[0]:
        values = [of_row[name] for of_row in features]
        if name in OF_TOKENS:
            values = [_widened(value, length, width, side) for value, length in zip(values, lengths, strict=True)]
        joined[name] = torch.cat(_of_one_size(values))
    return joined


def _widened(value: Tensor, length: int, width: int, side: str) -> Tensor:
    """A value ``[1, token, ...]`` of a conversation for a row of ``length`` tokens, which may be more or fewer."""
    more = max(0, length - value.shape[1])
    value = torch.cat([value, value[:, -1:].expand(-1, more, *value.shape[2:])], dim=1)[:, :length]
    padding = value.new_zeros(value.shape[0], max(0, width - length), *value.shape[2:])
    return torch.cat([value, padding] if side == "right" else [padding, value], dim=1)[:, :width]


def _of_one_size(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with every dimension but the first as large as the largest, filled up with zeros at the end."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        if list(value.shape[1:]) != largest:
            wide = value.new_zeros(value.shape[0], *largest)
            wide[tuple(slice(size) for size in value.shape)] = value
            value = wide
        filled.append(value)
    return filled


def input_kinds(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the rows without a picture, and of those with one, as far as there are any."""
    apart: tuple[list[int], list[int]] = ([], [])
    for place, row in enumerate(rows):
        apart[isinstance(row, ImageTokens)].append(place)
    return [places for places in apart if places]


def truncated(ids: list[int], most: int, text: str = "") -> list[int]:
    """The last ``most`` tokens of a conversation. Raises ``InputError`` if that would cut through a picture."""
    if len(ids) <= most:
        return ids
    if isinstance(ids, ImageTokens):
        raise InputError(
            f"the prompt {text[:60]!r} with its image is {len(ids)} tokens long, and an image cannot be cut; raise "
            f"max_tokens from {most} to at least that, or use smaller images"
        )
    return ids[-most:]


def run_without_head(network: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """A pass through the text decoder, and before it through the vision tower if there are pictures; no LM head.

    Args:
        network: The network, or a wrapped one.
        inputs: Tensors by the names of its arguments.

    Returns:
        The output of transformers, with ``last_hidden_state`` ``[row, token, hidden]``.
    """
    inner = network_of(network)
    pictured = inputs.keys() - {"input_ids", "inputs_embeds", "attention_mask"}
    runs: Callable[..., Any] = cast("PreTrainedModel", inner).base_model if pictured else decoder_of(inner)
    with explaining_meta_tensors(inner):
        return runs(**inputs, use_cache=False)


def vision_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of the vision tower and the projector: all that are neither the decoder's nor the LM head's."""
    inner = network_of(network)
    whole = cast("Any", inner)
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    of_text = {id(p) for part in (decoder_of(inner), head, embeddings) if part is not None for p in part.parameters()}
    return [parameter for parameter in inner.parameters() if id(parameter) not in of_text]


def pixels_at(features: Features, network: PreTrainedModel) -> Features:
    """The features where the model is, in its precision."""
    place, dtype = device_of_inputs(network) or network.device, network.dtype
    return {
        name: value.to(place, dtype) if value.is_floating_point() else value.to(place)
        for name, value in features.items()
    }
