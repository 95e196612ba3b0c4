"""Which pairs share a forward pass: those of like length, in an order that is a new one in every epoch.

TRL puts both sides of all pairs of a micro-batch into one batch, as long as its longest conversation, so one long
answer among short ones makes most of it padding. What an order cannot help is a pair whose own answers differ in
length. The order is drawn from the seed and the epoch alone: the same on every process, and in training that is
resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from math import ceil

from torch.utils.data import Sampler

POOL = 100
"""About so many micro-batches are sorted together. More gain next to nothing, and with fewer pairs to meet, the same
ones would meet in every epoch of a large data set."""


class LengthBuckets(Sampler[int]):
    """The places of a data set in an order whose every ``size`` neighbours, from the first on, are of like length.

    ``lengths`` is the padded length of each item. ``epoch`` is asked for when an epoch begins, rather than set from
    outside, because accelerate does not reach the sampler when training is resumed on several processes. There whole
    micro-batches are dealt to the processes in turn, the last ones filled up with the first items of the epoch.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Only the last micro-batch may be smaller, as it is for whoever cuts the order into micro-batches again.
        return chain.from_iterable(buckets(self.lengths, self.size, f"{self.seed} {self.epoch()}"))


def buckets(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """The places 0, 1, ... of ``lengths``, each once, in micro-batches of ``size`` of like length and random order.

    What does not fill a micro-batch is the last one; its length is any, so that no kind of pair is always there.
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches: list[list[int]] = []
    rest: list[int] = []
    for pool in _pools(order, size):
        # The sort is stable, so that equally long items meet others in the next epoch.
        pool.sort(key=lengths.__getitem__)
        over = len(pool) % size
        if over:
            start = size * generator.randint(0, len(pool) // size)
            rest, pool = pool[start : start + over], pool[:start] + pool[start + over :]
        batches += [pool[start : start + size] for start in range(0, len(pool), size)]
    generator.shuffle(batches)
    return [*batches, rest] if rest else batches


def _pools(order: list[int], size: int) -> Iterator[list[int]]:
    """Cut the order into pools of about as many whole micro-batches; only the last one has any that is not whole."""
    count = ceil(len(order) / size)
    each = size * max(1, ceil(count / max(1, round(count / POOL))))
    return (order[start : start + each] for start in range(0, len(order), each))
