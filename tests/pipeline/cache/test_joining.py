from __future__ import annotations

from typing import Any

import pytest
from caches import make_plan, make_spec, open_writer

from ddk_pipe.pipeline.cache import CacheReader, SplitSize, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def test_a_new_domain_joins_and_nothing_else_may_change(folder: LocalFolder) -> None:
    more = {"new": {TRAIN: SplitSize(2, 4, "n")}}
    writer = open_writer(folder, make_spec(make_plan(), domains=more))
    assert [shard.name for shard in writer.pending()] == ["new/train/00000"]
    assert set(read_spec(folder).domains) == {"code", "plays", "new"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": {"weights_digest": "other", "dtype": "float32"}}, "weights_digest w there, other here"),
        ({"tokenizer_digest": "other"}, "another tokenizer_digest"),
        ({"seq_len": 99}, "another seq_len"),
        ({"plan": make_plan(tau=0.05)}, "tau 0.02 there, 0.05 here"),
        (
            {"domains": {"code": {TRAIN: SplitSize(10, 4, "edited text")}}},
            "code/train was cached from other tokens",
        ),
    ]
    for changes, expected in cases:
        with pytest.raises(DdkError, match=expected):
            open_writer(folder, make_spec(changes.pop("plan", make_plan()), **changes))


def test_one_temperature_more_is_another_cache(folder: LocalFolder) -> None:
    with pytest.raises(DdkError, match="temperatures"):
        open_writer(folder, make_spec(make_plan(temperatures=(1.0, 2.0, 4.0))))
    with pytest.raises(DdkError, match=r"temperature 4.0 is not in the cache \(it has 1.0, 2.0\)"):
        CacheReader(folder, 4.0)
