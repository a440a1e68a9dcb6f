from __future__ import annotations

import pytest
from caches import FIRST, SECOND, group_path

from ddk_pipe.pipeline.cache import CacheReader, read_spec
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def test_window_number_inside_the_data_is_compared(folder: LocalFolder) -> None:
    """Even under a record that was made up for it, a window never passes for another."""
    record = read_record(folder, SECOND, read_spec(folder))
    assert record is not None
    group = group_path(folder, SECOND)
    group.rename(group.with_name("00000.01234567.zarr"))
    made_up = record.model_copy(update={**vars(FIRST), "group": "00000.01234567.zarr"})
    (folder.path / FIRST.record).write_bytes(made_up.sealed())
    with pytest.raises(DdkError, match="window 0 holds another window"):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)
