"""Pages and Markdown: what is masked, what is cut, and what cannot be broken out of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safeneuron.reporting import rendering
from safeneuron.reporting.rendering import compressed, escaped, masked
from tests.helpers.sample_results import rendered, sample_examples, sample_results, sample_state


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("one two three four five six seven", "one two three"),
        ("Yes.", "Ye"),
        ("", ""),
        ("x" * 500, "x" * 24),
        ("  I  can\nhelp with that, of course ", "I can help"),
    ],
)
def test_mask_shows_three_words_and_at_most_half(text: str, opening: str) -> None:
    assert masked(text) == (opening, len(text.strip()) - len(opening))


def test_answers_are_cut_where_there_is_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [replace(sample_examples()[0], response="ä" * size) for size in (400, 800)]
    assert compressed(answers, True)["rows"][1][5:] == ["ä" * 800, 0]
    monkeypatch.setattr(rendering, "ROOM", 600)
    rows = compressed(answers, True)["rows"]
    assert [(len(row[5]), row[6]) for row in rows] == [(150, 250), (150, 650)]


def test_markdown_cells_and_lines_cannot_be_broken_out_of() -> None:
    assert escaped("a|b\n# c *d* [e](f) <g> & `h`") == "a\\|b \\# c \\*d\\* \\[e\\](f) &lt;g&gt; &amp; \\`h\\`"
    state = sample_state("T0", 40)
    state["name"] = "T0 | x\n| y"
    rows = [line for line in rendered(sample_results(state))["report.md"].splitlines() if line.startswith("| T0 ")]
    assert rows
    assert all(line.startswith("| T0 \\| x \\| y |") for line in rows)
