"""How much of training's batches is padding, with buckets and without: python benchmarks/padding.py FILE.jsonl ...

The pairs are laid out by TRL's own tokenisation with the embedded model's tokenizer and template, cut at 1,024 tokens.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from safeneuron.data.pairs import read_pairs
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.training.dpo import buckets

EPOCHS = 3
LIMIT = 1024


def lengths_of(model: Model, path: str) -> list[tuple[int, int]]:
    """The tokens of each pair's conversation with the chosen and with the rejected answer."""
    found = []
    for pair in read_pairs(path):
        sides = [[*pair.prompt, {"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)]
        texts = [model.tokenizer.apply_chat_template(side, tokenize=False) for side in sides]
        chosen, rejected = (len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"])
        found.append((min(LIMIT, chosen), min(LIMIT, rejected)))
    return found


def padding(lengths: Sequence[tuple[int, int]], batches: Sequence[Sequence[int]]) -> float:
    """The share of places that no token fills: both sides of all pairs of a batch are as long as its longest."""
    filled = sum(sum(lengths[place]) for batch in batches for place in batch)
    places = sum(2 * len(batch) * max(max(lengths[place]) for place in batch) for batch in batches)
    return 1 - filled / places


def at_random(count: int, size: int, seed: str) -> list[list[int]]:
    """Micro-batches in the order in which the trainer would take the pairs by itself."""
    order = random.Random(seed).sample(range(count), count)
    return [order[start : start + size] for start in range(0, count, size)]


def main(paths: Sequence[str]) -> None:
    """Print one row for each file and size of a micro-batch."""
    model = load("embedded")
    print("| pairs | micro-batch | at random | in buckets | a pair alone |\n|---|---|---|---|---|")
    for path in paths:
        lengths = lengths_of(model, path)
        longest = [max(both) for both in lengths]
        alone = padding(lengths, [[place] for place in range(len(lengths))])
        for size in (4, 8, 16):
            plain = [padding(lengths, at_random(len(lengths), size, f"0 {epoch}")) for epoch in range(EPOCHS)]
            ours = [padding(lengths, buckets(longest, size, f"0 {epoch}")) for epoch in range(EPOCHS)]
            shares = [f"{sum(each) / EPOCHS:.1%}" for each in (plain, ours)]
            print(f"| {path.rsplit('/', 1)[-1]}, {len(lengths):,} | {size} | {' | '.join(shares)} | {alone:.1%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
