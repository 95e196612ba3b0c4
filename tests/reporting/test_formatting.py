"""How numbers are written."""

from __future__ import annotations

import pytest

from safeneuron.evaluation.rates import Rate
from safeneuron.reporting.formatting import (
    attack_title,
    decimal,
    in_words,
    interval,
    joined_words,
    number,
    p_value,
    with_interval,
)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0"), (1 / 313, "0.3"), (0.0999, "10.0"), (0.5, "50"), (312 / 313, "99.7"), (1.0, "100")],
)
def test_one_of_many_does_not_round_to_none_or_all(rate: float, text: str) -> None:
    assert number(rate) == text


def test_a_rate_in_a_sentence_a_cell_and_a_tip() -> None:
    rate = Rate(15, 47, 15 / 47, 0.204, 0.462)
    assert in_words(rate) == "32\u00a0% (20 to\u00a046\u00a0%)"
    assert interval(rate) == "20\u201346\u00a0%"
    assert with_interval(rate.rate, rate.low, rate.high) == "32\u00a0% (20\u00a0% to 46\u00a0%)"


def test_attacks_have_titles_and_lists_their_and() -> None:
    assert attack_title("ORI", "none") == "ORI"
    assert attack_title("FULL", "adaptive") == "FULL adaptive"
    assert attack_title("0.025", "curve") == "2.5 % pruned"
    assert "probe" in attack_title("probe", "rival")
    assert [joined_words("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert (decimal(12.34), decimal(1234.5), p_value(0.0004), p_value(0.0301)) == ("12.3", "1,234", "< 0.001", "0.030")
