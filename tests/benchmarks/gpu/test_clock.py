"""Time in which a GPU was busy, from intervals that overlap."""

from __future__ import annotations

import pytest
from gpu.clock import attempt, covered
from hypothesis import given
from hypothesis import strategies as st

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda p: (p[0], p[0] + p[1])))


def test_nothing_is_counted_twice() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@given(spans)
def test_it_is_the_number_of_moments_covered(found: list[tuple[int, int]]) -> None:
    assert covered(found) == len({moment for start, end in found for moment in range(start, end)})


def test_what_fails_is_a_row_with_its_reason() -> None:
    def fails() -> dict[str, object]:
        raise RuntimeError("out of memory\nand much more")

    assert attempt({"name": "x"}, fails) == {"name": "x", "not run": "RuntimeError: out of memory"}
    assert attempt({"name": "x"}, lambda: {"seconds": 1}) == {"name": "x", "seconds": 1}


def test_it_does_not_swallow_a_stop() -> None:
    def stopped() -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt({"name": "x"}, stopped)
