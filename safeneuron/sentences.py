"""Sentence embeddings with the encoder all-MiniLM-L6-v2, which an installable package carries: no hub is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safeneuron.embedded import encoder_folder
from safeneuron.halving import Halving
from safeneuron.models import quiet

_REMEMBERED = 4096  # embeddings, of 1.5 kB each
MAX_TOKENS = 256
"""Longer texts are cut: the encoder was trained on no more tokens than that."""


class SentenceEncoder:
    """Texts to unit vectors whose cosine tells how near they are in meaning.

    Mean over the last hidden states of all tokens, then scaled to length 1, as the model's authors do
    (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2).
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 4096) -> None:
        self.network = network
        self.network.train(False)
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(cls) -> SentenceEncoder:
        """The encoder in its installed package, in float32 on the CPU. Raises ``InputError`` if it is not installed."""
        folder = encoder_folder()
        quiet()
        network = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, add_pooling_layer=False)
        return cls(network, AutoTokenizer.from_pretrained(folder))

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        return int(self.network.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One embedding a text, ``[text, width]``, float32, in order; texts of like length are run together.

        The last few thousand are remembered: a short answer is its own opening and ending, and is asked for again.
        """
        if not texts:
            return torch.zeros(0, self.width)
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, self._computed(new), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def _computed(self, distinct: list[str]) -> Tensor:
        if not distinct:
            return torch.zeros(0, self.width)
        # Text that looks like a special token is text here, and nothing else.
        rows = self.tokenizer(distinct, truncation=True, max_length=MAX_TOKENS, split_special_tokens=True)["input_ids"]
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
        found = torch.zeros(len(rows), self.width)
        halving: Halving[int] = Halving("embedding texts", "use a device with more memory")
        while order:
            batch = order[: max(1, self.batch_tokens // len(rows[order[0]]))]
            found[batch] = torch.cat(halving.over(batch, lambda part: self._embed([rows[i] for i in part])))
            order = order[len(batch) :]
        return found

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.network.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.network.device)
        with torch.inference_mode():
            states = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1).float().cpu()
