"""The config of a large model, and nothing else."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig


def seventy_billion(folder: Path) -> Path:
    """A folder with the config of a model with 70 billion parameters, and nothing else."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder
