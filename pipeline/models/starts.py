"""Where documents begin in a window: each sees only itself, and its positions count from its own first token.

`starts`, bool [..., seq_len], is true at the first token of each document, or of a piece of one that windows cut, and so
at the first token of every window. Filling is a document of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Starts = NDArray[np.bool_]


def positions_from(starts: Starts) -> NDArray[np.int64]:
    """The place of each token in its document, counted from 0: int64, of the same shape."""
    places = np.broadcast_to(np.arange(starts.shape[-1], dtype=np.int64), starts.shape)
    begins: NDArray[np.int64] = np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
    return places - begins


def documents_from(starts: Starts) -> NDArray[np.int64]:
    """The number of each token's document in its window, counted from 0: int64, of the same shape."""
    return np.cumsum(starts, axis=-1, dtype=np.int64) - 1


def spans_from(starts: Starts) -> list[slice]:
    """The documents of one window, starts [seq_len], in order."""
    begins = np.flatnonzero(starts).tolist()
    return [slice(*ends) for ends in zip(begins, [*begins[1:], len(starts)], strict=True)]


def stack_starts(windows: Sequence[Starts | None], seq_len: int) -> Starts | None:
    """Those of several windows, bool [windows, seq_len]; None where all of them are seen whole."""
    if all(starts is None for starts in windows):
        return None
    whole = np.arange(seq_len) == 0
    return np.stack([whole if starts is None else starts for starts in windows])


def check_starts(starts: Starts, labels: NDArray[np.int64], *, no_label: int) -> None:
    """Raises ValueError for a window [seq_len] whose first token begins no document, or where a document is to predict
    another one's first token."""
    if not starts[0]:
        raise ValueError("a window that begins with no document")
    if (labels[:-1][starts[1:]] != no_label).any():
        raise ValueError("a label in another document")
