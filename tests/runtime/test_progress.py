"""Progress of parts as progress of a whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from safeneuron.runtime.progress import progress_of_part, progress_of_section


def test_nobody_watches_the_parts_where_nobody_watches_the_whole():
    assert progress_of_part(None, 0, 2) is None
    assert progress_of_section(None, 0, 2) is None


def test_a_part_counts_on_from_the_parts_before_it():
    calls: list[tuple[int, int]] = []
    second = progress_of_part(lambda done, total: calls.append((done, total)), 1, 3)
    assert second is not None
    for done in (1, 4):
        second(done, 4)
    assert calls == [(5, 12), (8, 12)]


def test_a_section_counts_on_from_the_items_before_it_whatever_its_own_total():
    calls: list[tuple[int, int]] = []
    section = progress_of_section(lambda done, total: calls.append((done, total)), 7, 10)
    assert section is not None
    section(1, 3)
    section(3, 3)
    assert calls == [(8, 10), (10, 10)]


@given(st.integers(1, 6), st.integers(1, 9))
def test_parts_in_turn_never_go_back_and_end_at_the_whole(count, size):
    calls: list[tuple[int, int]] = []
    for index in range(count):
        part = progress_of_part(lambda done, total: calls.append((done, total)), index, count)
        assert part is not None
        for done in range(1, size + 1):
            part(done, size)
    assert [done for done, _ in calls] == list(range(1, count * size + 1))
    assert {total for _, total in calls} == {count * size}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_parts_within_parts(outer, inner, size):
    calls: list[int] = []
    for first in range(outer):
        whole = progress_of_part(lambda done, total: calls.append(done), first, outer)
        for second in range(inner):
            part = progress_of_part(whole, second, inner)
            assert part is not None
            part(size, size)
    assert calls == [size * number for number in range(1, outer * inner + 1)]
