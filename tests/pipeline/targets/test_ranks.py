import numpy as np
import pytest

from ddk_pipe.pipeline.targets import Ranks


def test_rank_tables() -> None:
    table = Ranks.fit(np.array([3, 9, 3, 0]))
    assert table.id_of.tolist() == [1, 0, 2, 3] and table.rank_of.tolist() == [1, 0, 2, 3]
    with pytest.raises(ValueError, match="permutation"):
        Ranks.of(np.array([0, 0, 1], np.int32))
    with pytest.raises(ValueError, match="outside"):
        Ranks.of(np.array([0, 7], np.int32))
