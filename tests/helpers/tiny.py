"""Tiny random models of every supported family, with a tiny tokenizer, built from configs: no network, no files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from safeneuron.models.model import Model

LAYERS, HIDDEN, WIDTH = 3, 32, 48

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "phi3": Phi3Config,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and a few special tokens; padding is the end-of-text token, as in SmolLM2."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def network(family: str = "llama", seed: int = 0, layers: int = LAYERS, **changes: object) -> torch.nn.Module:
    """A random causal language model of the family, float32, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 260,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        **changes,
    }
    return AutoModelForCausalLM.from_config(CONFIGS[family](**settings)).eval()


def model(family: str = "llama", seed: int = 0, **changes: object) -> Model:
    """A tiny chat model as ``safeneuron.load`` would return it."""
    return Model(network(family, seed, **changes), tokenizer(), f"tiny-{family}", f"tiny-{family}")
