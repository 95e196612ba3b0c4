"""Other prompts held against a run's own: the same requests in other words, and what fewer of them cost."""

from __future__ import annotations

import math
from dataclasses import astuple, replace

import pytest
import torch

from safeneuron.analysis.resampling import Resampled, Spread
from safeneuron.analysis.settings import finder
from safeneuron.analysis.stability import SetSimilarity, also_record, bootstrap_record
from safeneuron.config.toml import read_config
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.measurement import measure
from tests.helpers import planted

CONFIG = read_config("demo", ["select.density=0.0348"])
MODEL = planted.model()
CLASSES = planted.twins(24)
WHOLE = measure(MODEL, *CLASSES)


def test_the_same_requests_in_the_same_words_give_the_same_set():
    record = also_record(CONFIG, MODEL, CLASSES, WHOLE, "again", CLASSES)
    same = SetSimilarity(1, pytest.approx(1))
    assert SetSimilarity(record.jaccard, record.correlation) == record.wording == record.fewer
    assert record.wording == same
    assert (record.prompts_of, record.prompts, record.same_requests) == ("again", [24, 24], 24)


def test_other_words_for_some_of_the_requests_are_held_against_these_alone():
    """Ids 0 to 7 are worded anew; 90 and 91 are no requests of the run, and count only against the whole."""
    unsafe, safe = planted.twins(10, seed=5)
    ids = [*map(str, range(8)), "90", "91"]
    worded = [[replace(one, id=name) for one, name in zip(side, ids, strict=True)] for side in (unsafe, safe)]
    record = also_record(CONFIG, MODEL, CLASSES, WHOLE, "anew", worded)
    assert record.same_requests == 8
    find, count = finder(CONFIG), 8
    own = measure(MODEL, *(side[:count] for side in CLASSES))
    anew = measure(MODEL, *(side[:count] for side in worded))
    assert record.wording.jaccard == find(own).jaccard(find(anew))
    assert record.fewer.jaccard == find(WHOLE).jaccard(find(own))
    assert record.jaccard == find(WHOLE).jaccard(find(measure(MODEL, *worded)))
    assert record.wording.correlation < 1


def test_requests_of_one_class_alone_are_not_the_same_requests():
    unsafe, safe = CLASSES
    strangers = [replace(one, id=f"other {one.id}") for one in safe]
    record = also_record(CONFIG, MODEL, CLASSES, WHOLE, "half", (unsafe, strangers))
    assert record.same_requests == 0
    assert all(math.isnan(number) for number in (*astuple(record.wording), *astuple(record.fewer)))


def test_every_neuron_ever_found_is_in_one_tenth():
    """20 times 1/20 is a little more than 1, and is in the last tenth all the same."""
    times = torch.tensor([20, 19, 2, 1, 0, 20])
    frequency = torch.zeros(6, dtype=torch.float64)
    for sample in range(20):
        frequency[times > sample] += 1 / 20
    assert frequency.max() > 1
    always = NeuronSet(torch.tensor([0, 1, 5]), (6,), "x", "always in")
    spread = Spread(1.0, 1.0, 1.0, 20)
    record = bootstrap_record(Resampled(spread, spread, frequency, always, 5))
    assert record.frequencies == [2, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert sum(record.frequencies) == record.ever
