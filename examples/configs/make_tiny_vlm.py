"""Write what tiny-vlm.toml starts from: ``python examples/configs/make_tiny_vlm.py runs/tiny-vlm-start``.

A tiny Qwen2-VL with random weights in FOLDER/model, and pairs from the bundled prompts in FOLDER/pairs.jsonl. It shows
that every stage works on images, in a minute and without a network; what it answers means nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from safeneuron.data.prompts import fitting_refusal, read_prompts
from safeneuron.data.types import Pair
from safeneuron.models.model import Model
from safeneuron.models.vision import no_video, processor_without_video
from safeneuron.runtime.files import write_lines

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|start|>", "<|stop|>", "<|image|>", "<|video|>"]
COMPLIANCE = "Sure, I can help with that."
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|start|><|image|><|stop|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def processor() -> hf.ProcessorMixin:
    """Letters as bytes, pictures as 16 tokens at most."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=names
    )
    images = hf.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return processor_without_video(hf.Qwen2VLProcessor)(images, words, no_video(), chat_template=TEMPLATE)


def network(seed: int = 0) -> hf.PreTrainedModel:
    """Four layers of 128 neurons each behind a vision tower of two."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(SPECIAL) + 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 0,
        "bos_token_id": None, "pad_token_id": 3, "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    marks = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=tower, **marks)).eval()


def pairs() -> list[Pair]:
    """Refusals of harmful requests over going along with them, and the other way round for harmless ones."""
    found = []
    for kind, harmful in (("twins:unsafe", True), ("twins:safe", False)):
        for prompt in read_prompts(kind, split="training", count=16):
            answers = [fitting_refusal(prompt, seed=0), COMPLIANCE]
            chosen, rejected = answers if harmful else answers[::-1]
            found.append(Pair(({"role": "user", "content": prompt.text},), chosen, rejected))
    return found


def main(folder: Path) -> None:
    """Write both."""
    made = processor()
    Model(network(), made.tokenizer, "tiny-vlm", "tiny-vlm", processor=made).save(folder / "model")
    write_lines(folder / "pairs.jsonl", (pair.to_record() for pair in pairs()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/configs/make_tiny_vlm.py FOLDER")
    main(Path(sys.argv[1]))
