from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_pipe.pipeline.models import check_starts, positions_from, spans_from
from ddk_pipe.pipeline.models.starts import documents_from

WINDOWS = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda rest: np.array([True, *rest[1:]]))


@given(WINDOWS)
def test_documents_tile_their_window_and_count_from_zero(starts: np.ndarray) -> None:
    spans, positions, documents = spans_from(starts), positions_from(starts), documents_from(starts)
    assert [token for span in spans for token in range(span.start, span.stop)] == list(range(len(starts)))
    for number, span in enumerate(spans):
        assert positions[span].tolist() == list(range(span.stop - span.start))
        assert set(documents[span].tolist()) == {number}


@given(st.lists(WINDOWS.map(lambda starts: np.resize(starts, 9)), min_size=1, max_size=4))
def test_windows_together_are_what_each_is_alone(windows: list[np.ndarray]) -> None:
    for window in windows:
        window[0] = True
    together = np.stack(windows)
    assert positions_from(together).tolist() == [positions_from(window).tolist() for window in windows]
    assert documents_from(together).tolist() == [documents_from(window).tolist() for window in windows]


def test_starts_that_cannot_be_are_refused() -> None:
    starts = np.array([True, False, True, False])
    check_starts(starts, np.array([5, -100, 6, -100]), no_label=-100)
    with pytest.raises(ValueError, match="a label in another document"):
        check_starts(starts, np.array([5, 7, 6, -100]), no_label=-100)
    with pytest.raises(ValueError, match="begins with no document"):
        check_starts(~starts, np.full(4, -100), no_label=-100)
