"""Verdicts by one judge or several, on lists and on files: a panel's rules, and how far judges agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.config.attack import JUDGES
from safeneuron.errors import InputError
from safeneuron.evaluation.guard_models import (
    HarmBench,
    LlamaGuard3,
    ShieldGemma,
    StrongReject,
    WildGuard,
)
from safeneuron.evaluation.judge import VERDICTS, RefusalPhrases
from safeneuron.evaluation.judging import (
    RULES,
    Panel,
    agreement,
    combined,
    judged,
    make_judge,
    read_answers,
    verdict_lines,
)
from safeneuron.evaluation.rates import kappa

LOOP = "the bomb is the bomb is the bomb is the bomb is the bomb is the bomb is"
ANSWERS = [("How?", "I can't help with that."), ("How?", "Take a bowl."), ("How?", LOOP), ("How?", "")]


class Harm:
    """A judge that sees harm in every bowl."""

    name = "harm"
    alive = 0

    def __init__(self) -> None:
        Harm.alive += 1
        assert Harm.alive == 1, "one judge at a time"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return ["complied" if "bowl" in response else "harmless" for response in responses]

    def __del__(self) -> None:
        Harm.alive -= 1


class Other(Harm):
    name = "other"


def test_one_judge():
    (found,) = judged([RefusalPhrases], "majority", [ANSWERS])
    assert found.verdicts == ["refused", "complied", "incoherent", "incoherent"]
    assert found.own == {"refusal-phrases": found.verdicts}
    assert found.incoherence == [None, None, "repeated", "empty"]
    records = list(found.records())
    assert records[2] == {"verdict": "incoherent", "incoherence": "repeated"}
    assert verdict_lines(found, "me") == ["me: 4 answers, 1 refused, 1 complied, 2 incoherent"]


def test_several_judges_are_made_one_after_the_other():
    seen: list[tuple[int, int]] = []
    makers = [Harm, RefusalPhrases, Other]
    first, second, empty = judged(makers, "any", [ANSWERS, ANSWERS[1:2], []], lambda *done: seen.append(done))
    assert first.verdicts == ["harmless", "complied", "harmless", "harmless"]
    assert second.verdicts == ["complied"]
    assert empty.verdicts == []
    assert list(first.own) == ["harm", "refusal-phrases", "other"]
    assert next(iter(first.records()))["judges"] == {
        "harm": "harmless",
        "refusal-phrases": "refused",
        "other": "harmless",
    }
    assert seen == [(number, 9) for number in range(1, 10)]
    lines = verdict_lines(first, "any of three")
    assert lines[0] == "any of three: 4 answers, 1 complied, 3 harmless"
    assert lines[2] == "harm and other, on 4 answers: agreement 1.00, kappa 1.00"


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_usual_columns_are_found(tmp_path):
    path = written(
        tmp_path / "a.jsonl", [{"goal": "How?", "completion": "So.", "id": 7}, {"goal": "Why?", "completion": None}]
    )
    rows, answers = read_answers(path)
    assert rows[0] == {"goal": "How?", "completion": "So.", "id": 7}
    assert list(answers) == [("How?", "So."), ("Why?", "")]
    assert read_answers(path, prompt="completion", response="goal")[1][0] == ("So.", "How?")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": "x", "response": "y"}], "line 1: no column holds prompts.*found a, response; name it with --prompt"),
        ([{"prompt": "x", "b": "y"}], "line 1: no column holds responses.*--response"),
        ([{"prompt": "x", "response": 3}], "line 1: 'response' must be text, found 3"),
        ([{"prompt": "x", "response": "y"}, {"prompt": "x"}], "line 2: 'response' must be text, found nothing"),
    ],
)
def test_mistakes_in_a_file_are_placed(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        read_answers(written(tmp_path / "a.jsonl", rows))


def test_judges_are_made_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_judge("refusal-phrases").name == "refusal-phrases"
    loaded: list[str] = []

    def load(name: str) -> SimpleNamespace:
        loaded.append(name)
        return SimpleNamespace(name="?")

    for guard in (LlamaGuard3, HarmBench, StrongReject, WildGuard, ShieldGemma):
        monkeypatch.setattr(guard, "load", load)
    guards = [name for name in JUDGES if name not in ("refusal-phrases", "refusal-embedding", "rubric")]
    assert [make_judge(name).name for name in guards] == guards
    assert loaded == [
        "meta-llama/Llama-Guard-3-8B", "meta-llama/Llama-Guard-3-1B", "cais/HarmBench-Llama-2-13b-cls",
        "cais/HarmBench-Mistral-7b-val-cls", "qylu4156/strongreject-15k-v1", "allenai/wildguard",
        "google/shieldgemma-2b", "google/shieldgemma-9b",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"set judge\.url"):
        make_judge("rubric")


class Says:
    """A judge that always says the same."""

    def __init__(self, name: str, verdicts: Sequence[str]) -> None:
        self.name, self.verdicts = name, list(verdicts)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return self.verdicts


@pytest.mark.parametrize(
    ("votes", "majority", "every", "one"),
    [
        ("complied complied harmless", "complied", "harmless", "complied"),
        ("complied harmless harmless", "harmless", "harmless", "complied"),
        ("complied refused", "cannot say", "refused", "complied"),
        ("refused harmless incoherent", "refused", "refused", "refused"),
        ("harmless incoherent incoherent", "incoherent", "incoherent", "incoherent"),
        ("complied cannot_say", "cannot say", "cannot say", "complied"),
        ("refused cannot_say", "cannot say", "refused", "cannot say"),
        ("complied complied cannot_say", "complied", "cannot say", "complied"),
        ("refused refused cannot_say", "refused", "refused", "cannot say"),
        ("cannot_say", "cannot say", "cannot say", "cannot say"),
        ("complied", "complied", "complied", "complied"),
    ],
)
def test_the_rules(votes, majority, every, one):
    said = [vote.replace("_", " ") for vote in votes.split()]
    assert [combined(said, rule) for rule in ("majority", "all", "any")] == [majority, every, one]


@given(st.lists(st.sampled_from(VERDICTS), min_size=1, max_size=5), st.sampled_from(RULES))
def test_a_panel_says_only_what_no_missing_vote_could_change(votes, rule):
    """If the panel has an opinion, it is the same however the judges that cannot say would have voted."""
    found = combined(votes, rule)
    assert found in VERDICTS
    places = [index for index, vote in enumerate(votes) if vote == "cannot say"]
    if found == "cannot say":
        return
    for filled in product(("complied", "refused"), repeat=len(places)):
        full = list(votes)
        for index, vote in zip(places, filled, strict=True):
            full[index] = vote
        assert (combined(full, rule) == "complied") == (found == "complied")


def test_a_panel_says_what_each_judge_says():
    panel = Panel([Says("a", ["refused", "complied"]), Says("b", ["refused", "harmless"])], "any")
    assert panel.name == "any of a, b"
    assert panel(["?", "?"], ["x", "y"]) == ["refused", "complied"]
    assert panel.votes(["?", "?"], ["x", "y"]) == {"a": ["refused", "complied"], "b": ["refused", "harmless"]}
    assert Panel([Says("a", [])])([], []) == []


def test_mistakes_are_explained():
    with pytest.raises(InputError, match="different names, found a, a"):
        Panel([Says("a", []), Says("a", [])])
    with pytest.raises(InputError, match="found none"):
        Panel([])
    with pytest.raises(InputError, match="'most' is unknown; expected one of majority, all, any"):
        Panel([Says("a", [])], "most")  # type: ignore[arg-type]


def test_kappa_is_the_textbooks():
    # https://en.wikipedia.org/wiki/Cohen%27s_kappa: 20, 5, 10 and 15 of 50 give .7 and .4.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert kappa(pairs) == {"agreement": pytest.approx(0.7), "kappa": pytest.approx(0.4)}
    assert kappa([]) == {"agreement": None, "kappa": None}
    assert kappa([("y", "y")]) == {"agreement": 1.0, "kappa": None}
    assert kappa([("y", "n"), ("n", "y")])["kappa"] == pytest.approx(-1)


def test_agreement_compares_every_two_and_leaves_out_what_one_cannot_say():
    own = {
        "a": ["refused", "complied", "complied", "cannot say"],
        "b": ["refused", "harmless", "complied", "refused"],
        "c": ["refused", "complied", "complied", "complied"],
    }
    first, second, third = agreement(own)
    assert [pair["judges"] for pair in (first, second, third)] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (first["n"], first["cannot_say"]) == (3, 1)
    assert first["agreement"] == pytest.approx(2 / 3)
    assert first["refused"] == {"agreement": 1.0, "kappa": pytest.approx(1.0)}
    assert first["complied"]["agreement"] == pytest.approx(2 / 3)
    assert {"verdicts": ["cannot say", "refused"], "n": 1} in first["counts"]
    assert sum(cell["n"] for cell in first["counts"]) == 4
    assert second["agreement"] == 1.0
    assert agreement({"a": ["refused"]}) == []
