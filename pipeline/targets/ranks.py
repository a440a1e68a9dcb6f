"""Token ids by how often the teacher keeps them: small ranks for common tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ranks:
    """Token ids in falling order of frequency: id_of int32 [V], and its inverse rank_of."""

    id_of: NDArray[np.int32]
    rank_of: NDArray[np.int32]

    @classmethod
    def fit(cls, counts: NDArray[np.floating | np.integer]) -> Ranks:
        """From how often each id occurs, [V]; ties go by id, so equal counts give equal tables."""
        return cls.of(np.argsort(-counts, kind="stable").astype(np.int32))

    @classmethod
    def of(cls, id_of: NDArray[np.int32]) -> Ranks:
        """From the table itself; raises ValueError if it is no permutation."""
        rank_of = np.full(len(id_of), -1, np.int32)
        if len(id_of) and (id_of.min() < 0 or id_of.max() >= len(id_of)):
            raise ValueError("the rank table names ids outside the vocabulary")
        rank_of[id_of] = np.arange(len(id_of), dtype=np.int32)
        if (rank_of < 0).any():
            raise ValueError("the rank table is not a permutation")
        return cls(id_of, rank_of)
