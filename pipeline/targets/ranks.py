"""Token ids by how often the teacher keeps them: small ranks for common tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ranks:
    """Token ids in falling order of frequency, id_of int32 [V], and the inverse, made when first asked for: only
    writers need it."""

    id_of: NDArray[np.int32]

    @classmethod
    def fit(cls, counts: NDArray[np.floating | np.integer]) -> Ranks:
        """From how often each id occurs, [V]; ties go by id, so equal counts give equal tables."""
        return cls.of(np.argsort(-counts, kind="stable").astype(np.int32))

    @classmethod
    def of(cls, id_of: NDArray[np.int32]) -> Ranks:
        """From the table itself; raises ValueError if it is no permutation."""
        if len(id_of) and (id_of.min() < 0 or id_of.max() >= len(id_of)):
            raise ValueError("the rank table names ids outside the vocabulary")
        named = np.zeros(len(id_of), np.bool_)
        named[id_of] = True
        if not named.all():
            raise ValueError("the rank table is not a permutation")
        return cls(id_of)

    @cached_property
    def rank_of(self) -> NDArray[np.int32]:
        """The rank of every id, int32 [V]."""
        ranks = np.empty(len(self.id_of), np.int32)
        ranks[self.id_of] = np.arange(len(self.id_of), dtype=np.int32)
        return ranks
