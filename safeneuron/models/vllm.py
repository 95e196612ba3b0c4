"""Greedy answers of a checkpoint folder by vLLM, on GPUs: the same prompts, token ids and ends as ``models.generate``.

vLLM (the extra ``vllm``) runs weights from a folder in compiled graphs that know no hooks. So what is pruned must be
pruned in the folder: a live model within ``pruned`` cannot be served.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from safeneuron.data.rows import Message
from safeneuron.errors import InputError
from safeneuron.models.model import by_length, encode_chat, end_tokens


@dataclass
class Server:
    """A checkpoint that vLLM has loaded; ``ends`` are the token ids that end an answer."""

    engine: Any
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    name: str

    def encode(self, messages: Sequence[Message], picture: Any = None) -> list[int]:
        """Token ids of a conversation through the chat template, as ``Model.encode`` gives them.

        Args:
            messages: Each with a ``role`` and ``content``.
            picture: None; others are not answered here.

        Returns:
            Token ids, with the generation prompt at the end.

        Raises:
            InputError: For a picture.
        """
        if picture is not None:
            raise InputError('prompts with images are not answered by vLLM here; use attack.backend = "transformers"')
        return encode_chat(self.tokenizer, messages)


@contextmanager
def served(folder: Path | str, dtype: str = "auto", gpus: int = 1, memory_share: float = 0.9) -> Iterator[Server]:
    """Within the block, the checkpoint in the folder answers through vLLM; afterwards the GPU's memory is free again.

    Args:
        folder: In Hugging Face form.
        dtype: vLLM's: ``auto`` takes the precision of the weights as stored, except float32, which it makes float16;
            name one to compare with another backend.
        gpus: So many share the weights between them.
        memory_share: How much of the memory of each is taken, between 0 and 1.

    Yields:
        What answers, like a ``Model``.

    Raises:
        InputError: If vLLM is not installed, the folder holds no checkpoint, or vLLM cannot load it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"{folder} holds no checkpoint (config.json is missing); give a folder in Hugging Face form, such as "
            "T1/align/model of a run"
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be loaded ({error}); on a machine with a GPU install it with: pip install "
            "'safeneuron[vllm]', elsewhere load the model with transformers"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Without "vllm" here, the sampling settings in the checkpoint would become vLLM's defaults.
    options = {"generation_config": "vllm", "seed": 0, "enable_prefix_caching": False}
    try:
        engine = LLM(
            model=str(folder), dtype=dtype, tensor_parallel_size=gpus, gpu_memory_utilization=memory_share, **options
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"vLLM cannot load {folder} ({reason}); load it with transformers") from error
    server = Server(engine, tokenizer, end_tokens(_settings_of(Path(folder)), tokenizer) or [], str(folder))
    try:
        yield server
    finally:
        # The caller still holds the server; without an engine it holds no memory.
        del engine
        server.engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def server_generate(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    skip: int = 0,
    opening: int = 0,
) -> Iterator[list[tuple[int, str]]]:
    """Greedy answers to encoded prompts, batch by batch, in the order and form of ``models.generate``.

    vLLM fills the GPU on its own; a batch only says how many answers are handed over at once, so large ones are faster.
    """
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=server.ends)
    for batch in by_length(prompts, batch_size, skip):
        asked = [{"prompt_token_ids": list(prompts[index])} for index in batch]
        found = server.engine.generate(asked, settings, use_tqdm=False)
        # Decoded as by the other backend, so that the same tokens are the same text.
        tokens = [
            list(prompts[index])[len(prompts[index]) - opening :] + list(request.outputs[0].token_ids)
            for index, request in zip(batch, found, strict=True)
        ]
        texts = server.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        yield [(index, text.strip()) for index, text in zip(batch, texts, strict=True)]


def _settings_of(folder: Path) -> GenerationConfig:
    """The generation settings of a checkpoint, with those of its model's config where it has no file of them."""
    from transformers import AutoConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
