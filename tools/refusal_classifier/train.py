"""Train the judge ``refusal-embedding`` on the examples of this folder, and say how well it does on unseen ones.

    python tools/refusal_classifier/train.py            # some minutes on one core; the same weights every time
    python tools/refusal_classifier/train.py --check    # only the figures, without writing the weights

The figures are of five-fold cross-validation in which all variants of a text are in one fold.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from making import Example, all_examples
from safetensors.torch import save_file
from torch import Tensor

from safeneuron.evaluation.embeddings import SentenceEncoder
from safeneuron.evaluation.judge import readable
from safeneuron.evaluation.refusal_classifier import CLASSES, Classifier, text_features

WEIGHTS = Path(__file__).parents[2] / "safeneuron" / "evaluation" / "weights" / "refusal-embedding.safetensors"
COLUMN = {"refused": CLASSES.index("refused"), "answer": CLASSES.index("complied"), "incoherent": 2}
FOLDS = 5
PENALTY = 0.1
"""Strength of the L2 penalty on the weights; chosen by the cross-validated loss among 0.1, 0.3 and 1."""


def main() -> None:
    """Cross-validate, train on everything, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="do not write the weights")
    parser.add_argument("--penalty", type=float, default=PENALTY)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would change the last bits
    examples = all_examples()
    features = text_features(SentenceEncoder.load(), [readable(example.text) for example in examples])
    labels = torch.tensor([COLUMN[example.label] for example in examples])
    print_figures(examples, labels, cross_validated(examples, features, labels, options.penalty))
    if not options.check:
        classifier = fit(features, labels, options.penalty)
        WEIGHTS.parent.mkdir(exist_ok=True)
        save_file({"weight": classifier.weight, "bias": classifier.bias}, WEIGHTS)
        print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size:,} bytes)")


def fit(features: Tensor, labels: Tensor, penalty: float) -> Classifier:
    """Multinomial logistic regression: least mean cross-entropy, classes weighted evenly, plus an L2 penalty.

    ``loss = mean(weight_of_class * cross_entropy) + penalty / examples * sum(weight ** 2)``, by L-BFGS in float64 from
    zero, so that there is one minimum and it is found every time.
    """
    x = features.double()
    counts = torch.bincount(labels, minlength=len(CLASSES)).double()
    per_class = len(labels) / (len(CLASSES) * counts)
    weight = torch.zeros(x.shape[1], len(CLASSES), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(CLASSES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, labels, per_class)
        loss = loss + penalty / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Classifier(weight.detach().float().contiguous(), bias.detach().float().contiguous())


def cross_validated(examples: Sequence[Example], features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Probabilities of each example by the classifier that was trained without its fold, ``[example, class]``."""
    fold = torch.tensor([int(hashlib.sha256(example.group.encode()).hexdigest(), 16) % FOLDS for example in examples])
    found = torch.zeros(len(examples), len(CLASSES))
    for number in range(FOLDS):
        classifier = fit(features[fold != number], labels[fold != number], penalty)
        found[fold == number] = classifier.probabilities(features[fold == number])
    return found


def print_figures(examples: Sequence[Example], labels: Tensor, probabilities: Tensor) -> None:
    """Loss, precision and recall over all examples, the hand-made and the short model-made ones; and the mistakes."""
    loss = torch.nn.functional.nll_loss(probabilities.clamp_min(1e-9).log(), labels)
    said = probabilities.argmax(dim=1)
    hand = torch.tensor([example.text == example.group for example in examples])
    print(f"{len(examples)} examples, held-out loss {loss:.4f}")
    short = torch.tensor([example.style.endswith("24 tokens") for example in examples])
    for name, which in (("all", torch.ones_like(hand)), ("hand-made", hand), ("of 24 tokens", short)):
        print(f"{name}: {int(which.sum())} examples, right {(said == labels)[which].float().mean():.3f}")
        for column, label in enumerate(CLASSES):
            true, found = (labels == column) & which, (said == column) & which
            both = int((true & found).sum())
            precision, recall = both / max(1, int(found.sum())), both / max(1, int(true.sum()))
            print(f"  {label:10} {int(true.sum()):5}  precision {precision:.3f}  recall {recall:.3f}")
    print("mistakes on hand-made examples:")
    for index in (hand & (said != labels)).nonzero().flatten().tolist():
        print(f"  {CLASSES[labels[index]]} -> {CLASSES[said[index]]}: {examples[index].text[:110]!r}")


if __name__ == "__main__":
    main()
