"""Batches of pairs of like length: nothing lost, little padding, a new order every epoch, the same on resume."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from safeneuron.training.dpo import POOL, LengthBuckets, buckets
from tests import ROOT

PAIRS = ROOT.parent / "shared/data/pairs/safety_pairs.jsonl"
LENGTHS = st.lists(st.integers(1, 1024), max_size=300)


def sampler(lengths: list[int], size: int, epoch: int = 0, seed: int = 0) -> LengthBuckets:
    return LengthBuckets(lengths, size, seed, lambda: epoch)


def padding(lengths: list[int], order: list[int], size: int) -> float:
    """Share of a batch's places that no token fills, over all batches."""
    batches = [[lengths[place] for place in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)


def drawn(kind: str, count: int) -> list[int]:
    """Lengths as data sets have them."""
    generator = random.Random(kind)
    draw = {
        "short and even": lambda: generator.randint(20, 120),
        "long tail": lambda: min(1024, round(generator.lognormvariate(5, 0.8))),
        "cut at the end": lambda: min(512, round(generator.lognormvariate(6, 1))),
        "two kinds": lambda: round(generator.gauss(60, 8)) if generator.random() < 0.3 else generator.randint(200, 900),
        "all the same": lambda: 100,
    }[kind]
    return [max(1, draw()) for _ in range(count)]


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_every_pair_once_and_only_the_last_batch_is_small(lengths, size, epoch):
    batches = buckets(lengths, size, f"0 {epoch}")
    assert Counter(place for batch in batches for place in batch) == Counter(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches[-1:])
    order = list(sampler(lengths, size, epoch))
    assert order == [place for batch in batches for place in batch]
    assert len(sampler(lengths, size, epoch)) == len(order)


@given(LENGTHS, st.integers(2, 9))
def test_no_two_whole_batches_overlap_in_length_within_a_pool(lengths, size):
    lengths = lengths[: POOL * size]
    whole = [sorted(lengths[place] for place in batch) for batch in buckets(lengths, size, "0 0") if len(batch) == size]
    whole.sort()
    assert all(lower[-1] <= upper[0] for lower, upper in pairwise(whole))


@pytest.mark.parametrize("kind", ["short and even", "long tail", "cut at the end", "two kinds", "all the same"])
@pytest.mark.parametrize("count", [203, 1000, 3000])
@pytest.mark.parametrize("size", [4, 8])
def test_less_than_a_tenth_is_padding(kind, count, size):
    lengths = drawn(kind, count)
    shares = [padding(lengths, list(sampler(lengths, size, epoch)), size) for epoch in range(3)]
    assert sum(shares) / len(shares) < 0.1
    as_it_comes = padding(lengths, list(range(count)), size)
    assert as_it_comes > 0.2 or kind == "all the same"


@pytest.mark.skipif(not PAIRS.exists(), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize("size", [4, 8])
def test_less_than_a_tenth_of_real_pairs_is_padding(size):
    """Words stand for tokens; each side of a pair is padded to the longer one, as TRL does."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    sides = [[len((pair["prompt"] + " " + pair[side]).split()) for side in ("chosen", "rejected")] for pair in pairs]
    lengths = [max(side) for side in sides]
    order = list(sampler(lengths, size))
    places = sum(lengths) / (1 - padding(lengths, order, size))
    assert 1 - sum(map(sum, sides)) / (2 * places) < 0.1


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_the_order_depends_on_seed_and_epoch_alone(lengths, size, epoch, seed):
    random.seed(epoch)
    first = list(sampler(lengths, size, epoch, seed))
    random.seed(7)
    assert list(sampler(lengths, size, epoch, seed)) == first


def test_every_epoch_and_every_seed_has_its_own_order():
    lengths = drawn("long tail", 200)
    orders = [tuple(sampler(lengths, 4, epoch, seed)) for epoch in range(4) for seed in range(3)]
    assert len(set(orders)) == len(orders)


def test_batches_do_not_come_sorted():
    lengths = drawn("long tail", 400)
    means = [sum(lengths[place] for place in batch) / 4 for batch in buckets(lengths, 4, "0 0")]
    rising = sum(after > before for before, after in pairwise(means))
    assert 0.35 < rising / (len(means) - 1) < 0.65


def test_pairs_meet_others_in_the_next_epoch_of_a_large_data_set():
    lengths = drawn("long tail", 3000)
    together = [{frozenset(batch) for batch in buckets(lengths, 4, f"0 {epoch}")} for epoch in range(2)]
    assert len(together[0] & together[1]) < 0.01 * len(together[0])


def test_the_small_batch_is_not_always_of_the_same_length():
    lengths = list(range(1, 104))
    last = {buckets(lengths, 4, f"0 {epoch}")[-1][0] for epoch in range(40)}
    assert min(last) < 30
    assert max(last) > 70


def test_the_epoch_is_asked_for_when_it_begins():
    lengths, epoch = drawn("long tail", 50), [0]
    order = LengthBuckets(lengths, 4, 0, lambda: epoch[0])
    first = list(order)
    epoch[0] = 1
    assert list(order) == list(sampler(lengths, 4, 1)) != first


@given(st.lists(st.integers(1, 99), min_size=24, max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_processes_share_an_epoch_without_loss_and_go_on_where_they_stopped(lengths, size, processes):
    """As accelerate deals the batches, and as the trainer skips those of before an interruption."""
    whole = BatchSampler(sampler(lengths, size), size, drop_last=False)
    shards = [BatchSamplerShard(whole, processes, rank) for rank in range(processes)]
    seen = [list(shard) for shard in shards]
    assert len({len(batches) for batches in seen}) == 1
    counts = Counter(place for batches in seen for batch in batches for place in batch)
    assert counts.keys() == set(range(len(lengths)))
    # The last batches are filled up, so that every process has as much to do.
    assert sum(counts.values()) - len(lengths) < processes * size
    for shard, batches in zip(shards, seen, strict=True):
        assert list(SkipBatchSampler(shard, 2)) == batches[2:]
