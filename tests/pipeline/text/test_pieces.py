"""Documents with their tokens, on disk and back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.text import Encoded, Piece, read_pieces, write_pieces

PIECES = st.builds(
    lambda where, digest, ids, chat, size: Piece(
        where, digest, Encoded(np.array(ids, np.int64), (np.array(ids) % 2).astype(np.uint8), chat), size
    ),
    st.text(max_size=8),
    st.binary(min_size=16, max_size=16),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.booleans(),
    st.integers(0, 2**50),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PIECES, max_size=5), max_size=5))
def test_what_is_written_is_read(tmp_path: Path, batches: list[list[Piece]]) -> None:
    write_pieces(tmp_path / "a" / "part.arrow", batches)
    found = list(read_pieces(tmp_path / "a" / "part.arrow"))
    assert [len(batch) for batch in found] == [len(batch) for batch in batches]
    for one, other in zip(chain(*found), chain(*batches), strict=True):
        assert (one.where, one.digest, one.text_bytes) == (other.where, other.digest, other.text_bytes)
        assert one.encoded.is_chat == other.encoded.is_chat
        for name in ("ids", "is_label"):
            a, b = getattr(one.encoded, name), getattr(other.encoded, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
            assert a.base is None, "a document that is held long would hold its whole batch"


def test_whole_or_not_there(tmp_path: Path) -> None:
    def broken() -> Iterator[list[Piece]]:
        yield [Piece("a", b"x" * 16, Encoded(np.arange(3), np.ones(3, np.uint8)), 3)]
        raise ValueError("a bad document")

    with pytest.raises(ValueError, match="bad document"):
        write_pieces(tmp_path / "part.arrow", broken())
    assert not list(tmp_path.iterdir())


def test_a_cut_file(tmp_path: Path) -> None:
    piece = Piece("a", b"x" * 16, Encoded(np.arange(300), np.ones(300, np.uint8)), 3)
    write_pieces(tmp_path / "part.arrow", [[piece]] * 20)
    content = (tmp_path / "part.arrow").read_bytes()
    (tmp_path / "part.arrow").write_bytes(content[:-9])
    with pytest.raises(pa.ArrowException):
        list(read_pieces(tmp_path / "part.arrow"))
