"""Judges together: the rules are logic with three values, each judge's verdicts stay, and kappa is Cohen's."""

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.evaluation.judge import VERDICTS
from safeneuron.evaluation.judging import RULES, Panel, agreement, combined
from safeneuron.evaluation.rates import kappa


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
