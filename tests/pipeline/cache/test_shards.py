from __future__ import annotations

from ddk_pipe.pipeline.cache import SplitSize, shards_of
from ddk_pipe.pipeline.text import TRAIN


def test_shards_cover_every_window_once() -> None:
    shards = shards_of("d", TRAIN, SplitSize(10, 4, "x"))
    assert [(shard.first_window, shard.windows) for shard in shards] == [(0, 4), (4, 4), (8, 2)]
