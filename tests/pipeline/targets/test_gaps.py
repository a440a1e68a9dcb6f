import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets.gaps import _pack, _unpack


@given(st.lists(st.integers(1, 2**24), max_size=40))
@settings(deadline=None)
def test_packed_gaps_come_back(gaps: list[int]) -> None:
    values = np.array(gaps, np.int64)
    octaves = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    assert _unpack(_pack(values - (1 << octaves), octaves), octaves).tolist() == gaps
