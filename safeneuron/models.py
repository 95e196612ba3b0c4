"""Loading a chat model, turning prompts into tokens, and generating answers in batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from safeneuron import embedded
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, feed_forwards, fingerprint

Message = dict[str, str]


@dataclass
class Model:
    """A causal language model with its tokenizer.

    ``name`` is what reports call it, ``source`` where it was loaded from, ``stored_dtype`` the precision of its weights
    there, which may be another than the one it computes in now.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    stored_dtype: torch.dtype = torch.float32

    @property
    def fingerprint(self) -> str:
        """Whose neurons these are; the same for all models trained from one (see ``ffn.fingerprint``)."""
        return fingerprint(self.network)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(block.width for block in feed_forwards(self.network))

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return self.network.device

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation through the chat template, with the generation prompt at the end.

        A model without a chat template gets the bare text of the messages, with its own special tokens.
        """
        if not self.tokenizer.chat_template:
            return list(self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder; its config remembers whose neurons the model has."""
        setattr(self.network.config, LINEAGE, self.fingerprint)
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
) -> Model:
    """Load a chat model from the Hub, from a folder, or the embedded one (``"embedded"``).

    ``dtype`` is ``float32``, ``bfloat16``, ``float16`` or ``auto``: bfloat16 where the device computes in it, else
    float32. ``device`` is a torch device or ``auto``: a GPU if there is one. Raises ``InputError`` when the model cannot
    be found, has no FFN that safeneuron knows, or holds weights that are not finite.
    """
    quiet()
    source = str(embedded.embedded_folder()) if str(name) == embedded.NAME else str(name)
    place = _device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        stored = AutoConfig.from_pretrained(source, **options).dtype or torch.float32
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=_dtype(dtype, place), use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the model {str(name)!r} cannot be loaded ({reason}); expected 'embedded', a folder in Hugging Face form with "
            "safetensors, or a name on the Hub that this machine can reach"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    feed_forwards(network)
    _check_finite(network, str(name))
    network.eval().to(place)
    label = embedded.LABEL if str(name) == embedded.NAME else str(name)
    return Model(network, tokenizer, label, source, stored)


def quiet() -> None:
    """Keep the libraries' own progress bars and remarks off the terminal; errors still come through."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for library in ("datasets", "trl", "accelerate", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|torch)\..*")


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself; elsewhere bfloat16 is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


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
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, skip: int = 0
) -> Iterator[list[tuple[int, str]]]:
    """Greedy answers to encoded prompts, batch by batch, as (index of the prompt, text).

    Batches are formed by length, always in the same way, and padded on the left; the first ``skip`` prompts in that
    order, always whole batches, are left out, so that interrupted work continues with the same batches.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    assert skip % batch_size == 0 or skip >= len(order), "only whole batches can be skipped"
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.network.generation_config.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        use_cache=True,
    )
    for start in range(skip, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad([prompts[i] for i in batch], int(model.tokenizer.pad_token_id), "left", model.device)
        with torch.inference_mode():
            out = model.network.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        texts = model.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        yield [(index, text.strip()) for index, text in zip(batch, texts, strict=True)]


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"device {wanted!r} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {wanted!r} was asked for, but torch {torch.__version__} sees no GPU; use device = 'auto'")
    return place


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted == "auto":
        return torch.bfloat16 if bfloat16_pays(device) else torch.float32
    if wanted not in known:
        raise InputError(f"dtype {wanted!r} is unknown; expected auto, {', '.join(known)}")
    return known[wanted]


def _check_finite(network: PreTrainedModel, name: str) -> None:
    for parameter_name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"the model {name!r} holds values that are not finite in {parameter_name}; the file is damaged or the "
                "training diverged, use another checkpoint"
            )
