"""The filters, each on texts that only it should take away."""

from __future__ import annotations

import torch

from safeneuron.data.types import Prompt
from safeneuron.evaluation.embeddings import WordLikeness
from safeneuron.runs.redteam_filters import KEPT, LOSSES, filter_answers, filter_prompts


class Planted:
    """A likeness that looks vectors up."""

    name = "planted"
    repeated = 0.9
    meaning = True

    def __init__(self, **vectors: list[float]) -> None:
        self.vectors = vectors

    def __call__(self, texts):
        rows = torch.tensor([self.vectors[text.split()[0].strip(".,'")] for text in texts], dtype=torch.float32)
        return torch.nn.functional.normalize(rows, dim=1)


# Axes: five topics, harm, and two to tell texts apart.
TOPICS = {name: [float(name == other) for other in "pqrst"] for name in "pqrst"}
LIKE = Planted(
    **{f"bad{name}": [*axis, 1, 0, 0] for name, axis in TOPICS.items()},
    **{f"good{name}": [*axis, -1, 0, 0] for name, axis in TOPICS.items()},
    fine=[1, 0, 0, 0, 0, 0.5, 1, 0],
    again=[1, 0, 0, 0, 0, 0.5, 1.1, 0],
    other=[0, 0, 0.2, 0.1, 0.3, 0.5, 1, 0.4],
    mild=[1, 0, 0, 0, 0, -0.5, 0, 1],
    plain=[1, 0, 0, 0, 0, 0.5, 0, 1],
)
BAD = [Prompt(f"bad{name} thing", name) for name in TOPICS]
GOOD = [Prompt(f"good{name} thing", name) for name in TOPICS]


def test_each_filter_takes_its_own_prompts():
    texts = [
        "fine way to do it",
        "again way to do it",
        "other way to do it",
        "mild way to do it",
        "badp thing again",
        "plain",
        "plain, I'm sorry, but I can't help with that.",
        "plain way to do something else",
    ]
    found = filter_prompts(texts, ["p"] * len(texts), BAD, GOOD, LIKE)
    assert found.fates == [KEPT, "repeated", "off topic", "harmless", "repeated", "incoherent", "refused", KEPT]
    assert found.counts() == {loss: found.fates.count(loss) for loss in (*LOSSES, KEPT)}
    assert found.distance > 0.1
    assert 0 < found.self_bleu < 1


def test_topics_are_not_read_without_meaning():
    texts = ["Describe the thing nobody asked for", "badp thing in every word", "badp thing in every word"]
    found = filter_prompts(texts, ["p", "q", "q"], BAD, GOOD, WordLikeness())
    assert found.fates == [KEPT, KEPT, "repeated"]


def test_each_filter_takes_its_own_answers():
    requests = [Prompt("badp", "p"), Prompt("goodp", "p"), Prompt("badq"), Prompt("badr")]
    texts = [f"bad{name} {number}." for number, name in enumerate("pprqqrr")]
    texts[1] = "goodp two."
    verdicts = ["complied"] * 5 + ["harmless", "refused", "complied"]
    asked = [0, 0, 2, 2, 2, 3, 3, 3]
    texts.append("badr " * 30)
    found = filter_answers(texts, asked, requests, verdicts, LIKE)
    assert found.fates == [KEPT, KEPT, "off topic", KEPT, "repeated", "harmless", "refused", "incoherent"]


def test_verdicts_of_other_judges_are_kept_apart():
    found = filter_answers(["badp x"] * 2, [0, 0], [Prompt("badp", "p")], ["cannot say", "incoherent"], LIKE)
    assert found.fates == ["cannot say", "incoherent"]
    assert (found.self_bleu, found.distance) == (None, None)
