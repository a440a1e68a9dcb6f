"""A window at the codec's door: what both sides know of it beside its targets, and the planes that are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.quantisers import NO_LOG
from ddk_pipe.pipeline.targets.sparse import NO_LABEL

Planes = dict[str, NDArray[np.unsignedinteger]]


@dataclass(frozen=True)
class Context:
    """What writer and reader both know of a window of L positions beside its targets.

    labels int64 [L]: the true next token, NO_LABEL where there is none; label_codes u16 [L]: log codes of its
    probability at T = 1 (`encode_log`, NO_LOG without a label); key: the window's name, seeds the rounding.
    """

    labels: NDArray[np.int64]
    label_codes: NDArray[np.uint16]
    key: str = ""

    @classmethod
    def none(cls, positions: int) -> Context:
        """A window without labels."""
        return cls(np.full(positions, NO_LABEL, np.int64), np.full(positions, NO_LOG, np.uint16))


def used(plane: NDArray[np.unsignedinteger], count: int) -> NDArray[np.unsignedinteger]:
    """The part of a plane that is used. Raises ValueError if it is too short."""
    if len(plane) < count:
        raise ValueError("a plane is too short")
    return plane[:count]
