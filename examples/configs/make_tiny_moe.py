"""A tiny random mixture of experts with a byte tokenizer, and some pairs, for ``examples/configs/tiny-moe.toml``.

It can say nothing; it shows that all stages of a run work on experts, on a CPU in about a minute:

    python examples/configs/make_tiny_moe.py runs/tiny-moe-world
    safeneuron run examples/configs/tiny-moe.toml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import safeneuron as sn

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the marks of a chat."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def network() -> Qwen3MoeForCausalLM:
    """Two layers of eight experts with 32 neurons each, two of which a token goes to."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        initializer_range=0.2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def write(folder: Path) -> None:
    """The model into ``folder/model``, pairs into ``folder/pairs.jsonl``."""
    sn.Model(network(), tokenizer(), "tiny-moe", "tiny-moe").save(folder / "model")
    prompts = sn.read_prompts("twins:unsafe", split="training", count=24)
    pairs = [{"prompt": prompt.text, "chosen": "I cannot help with that.", "rejected": "Sure."} for prompt in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-moe-world"))
