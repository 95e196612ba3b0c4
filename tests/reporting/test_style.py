"""The look of figures: the same text for the same figure, in colours that a page can exchange."""

from __future__ import annotations

from matplotlib.figure import Figure

from safeneuron.reporting.style import BLUE, COLOURS, FAINT, INK, as_percent, as_text, colour, opacity, stroke, themed


def test_a_figure_is_one_element_with_its_own_names() -> None:
    figure = Figure()
    as_percent(figure.subplots())
    text = as_text(figure, "mine")
    assert text.startswith("<svg")
    assert 'id="mine-' in text
    assert "<metadata>" not in text


def test_a_page_exchanges_the_colours_of_lines() -> None:
    text = str(themed(f'<svg stroke="{INK}" fill="{FAINT}" color="{BLUE}"/>'))
    assert not any(tint in text for tint in (INK, FAINT, BLUE))
    assert text.count("var(--") == 3


def test_states_beyond_the_colours_are_told_apart() -> None:
    looks = [(colour(index), opacity(index), stroke(index)) for index in range(2 * len(COLOURS))]
    assert len(set(looks)) == len(looks)
