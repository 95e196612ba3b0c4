"""Tiny random vision-language models of every family, with tiny processors, built by code, without torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from safeneuron.models import vision
from safeneuron.models.model import Model

LAYERS, HIDDEN, WIDTH, PATCH = 3, 32, 48, 4
SPECIAL = [
    *("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<image>", "<video>", "<boi>", "<eoi>", "<soft>", "<|image|>"),
    *("<|python_tag|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
VOCABULARY = len(SPECIAL) + 256
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def number(token: str) -> int:
    """The id of a special token."""
    return SPECIAL.index(token)


def tokenizer(bos: str | None = None, **named: str) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer with the marks of all families; ``named`` ones are attributes, as processors want them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=named
    )


def text_config(**changes: Any) -> dict[str, Any]:
    """The settings of a tiny decoder."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": number("<|pad|>"), "initializer_range": 0.2, **changes,
    }  # fmt: skip


def tower(**changes: Any) -> dict[str, Any]:
    """The settings of a tiny vision tower."""
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": PATCH, "initializer_range": 0.2, **changes,
    }  # fmt: skip


SQUARE = {"height": 16, "width": 16}
QWEN_MARKS = {
    "image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>"),
    "vision_start_token_id": number("<|vision_start|>"), "vision_end_token_id": number("<|vision_end|>"),
}  # fmt: skip
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def qwen_eyes() -> Any:
    return hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 24 * 24}
    )


def without_video(kind: Any, *parts: Any, **settings: Any) -> Any:
    """A processor whose video part is a stand-in, as it is loaded where there is no torchvision."""
    return vision.processor_without_video(kind)(*parts, vision.no_video(), **settings)


def qwen2_vl() -> tuple[Any, Any]:
    config = hf.Qwen2VLConfig(
        text_config=text_config(rope_parameters=ROPE),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": PATCH},
        **QWEN_MARKS,
    )
    return config, without_video(hf.Qwen2VLProcessor, qwen_eyes(), tokenizer(), chat_template=template(QWEN_MARK))


def qwen2_5_vl() -> tuple[Any, Any]:
    eyes = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH}
    config = hf.Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters=ROPE),
        vision_config={**eyes, "out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_MARKS,
    )
    return config, without_video(hf.Qwen2_5_VLProcessor, qwen_eyes(), tokenizer(), chat_template=template(QWEN_MARK))


def qwen3_vl() -> tuple[Any, Any]:
    eyes = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH}
    config = hf.Qwen3VLConfig(
        text_config=text_config(rope_parameters={**ROPE, "mrope_interleaved": True}),
        vision_config={
            **eyes, "out_hidden_size": HIDDEN, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_MARKS,
    )  # fmt: skip
    return config, without_video(hf.Qwen3VLProcessor, qwen_eyes(), tokenizer(), chat_template=template(QWEN_MARK))


def llava() -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        text_config={**text_config(), "model_type": "llama"},
        vision_config={**tower(), "model_type": "clip_vision_model"},
        image_token_index=number("<image>"),
        vision_feature_layer=-1,
    )
    eyes = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, hf.LlavaProcessor(eyes, tokenizer(), chat_template=template("<image>"), **settings)


def llava_onevision() -> tuple[Any, Any]:
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = hf.LlavaOnevisionConfig(
        text_config={**text_config(), "model_type": "qwen2"},
        vision_config={**tower(), "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_grid_pinpoints=grid,
    )
    eyes = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    kind, mark = hf.LlavaOnevisionProcessor, template("<image>")
    return config, without_video(kind, eyes, tokenizer(), chat_template=mark, **settings)


def gemma3() -> tuple[Any, Any]:
    config = hf.Gemma3Config(
        text_config=text_config(query_pre_attn_scalar=8, sliding_window=64),
        vision_config={**tower(), "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=number("<boi>"),
        eoi_token_index=number("<eoi>"),
        image_token_index=number("<soft>"),
    )
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    eyes = hf.Gemma3ImageProcessorPil(size=SQUARE)
    return config, hf.Gemma3Processor(eyes, words, chat_template=template("<boi>"), image_seq_length=4)


def idefics3(config_of: Any = None) -> tuple[Any, Any]:
    config = (config_of or hf.Idefics3Config)(
        text_config={**text_config(), "model_type": "llama"},
        vision_config=tower(),
        image_token_id=number("<image>"),
        scale_factor=2,
        pad_token_id=number("<|pad|>"),
    )
    eyes = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return config, hf.Idefics3Processor(eyes, tokenizer(), image_seq_len=4, chat_template=template("<image>"))


def smolvlm() -> tuple[Any, Any]:
    # SmolVLM's own processor wants num2words, for videos; of pictures it makes what that of Idefics3 makes.
    return idefics3(hf.SmolVLMConfig)


def internvl() -> tuple[Any, Any]:
    config = hf.InternVLConfig(
        text_config={**text_config(), "model_type": "qwen2"},
        vision_config={**tower(image_size=[16, 16], patch_size=[PATCH, PATCH]), "layer_scale_init_value": 0.5},
        image_token_id=number("<|image_pad|>"),
        image_seq_length=4,
    )
    marks = {
        "start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>", "video_token": "<|video_pad|>",
        "context_image_token": "<|image_pad|>",
    }  # fmt: skip
    eyes = hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    kind, words = hf.InternVLProcessor, tokenizer(**marks)
    return config, without_video(kind, eyes, words, image_seq_length=4, chat_template=template("<|image_pad|>"))


def mllama() -> tuple[Any, Any]:
    config = hf.MllamaConfig(
        text_config=text_config(
            cross_attention_layers=[1], bos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 16, "patch_size": PATCH, "vision_output_dim": 32, "max_num_tiles": 4,
            "intermediate_layers_indices": [0], "initializer_range": 0.2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=number("<|image|>"),
    )  # fmt: skip
    eyes = hf.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    return config, hf.MllamaProcessor(eyes, tokenizer("<|system|>"), chat_template="<|system|>" + template("<|image|>"))


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "llava": llava,
    "llava-onevision": llava_onevision,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "mllama": mllama,
}


def template(mark: str) -> str:
    """The chat template of a family whose mark for a picture is this one."""
    return TEMPLATE.replace("MARK", mark)


def model(family: str = "qwen2-vl", seed: int = 0) -> Model:
    """A tiny vision-language model as ``safeneuron.load`` would return it."""
    config, processor = FAMILIES[family]()
    torch.manual_seed(seed)
    network = hf.AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in network.named_parameters():
        # What begins at zero would hide the picture from the decoder: gates (Mllama), a projection (Gemma 3).
        if not parameter.count_nonzero() and not name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return Model(network, processor.tokenizer, f"tiny-{family}", f"tiny-{family}", processor=processor)


def picture(width: int = 20, height: int = 14, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
