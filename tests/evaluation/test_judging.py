"""Verdicts by one judge or several, on lists and on files."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from safeneuron.errors import InputError
from safeneuron.evaluation.judge import RefusalPhrases
from safeneuron.evaluation.judging import judged, read_answers, verdict_lines

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
