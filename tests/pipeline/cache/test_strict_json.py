from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from caches import FIRST, make_plan, make_spec, read_all, reseal, resealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.cache import CacheReader, read_spec
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.soundness import verify_shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.pipeline.text import TRAIN


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{}", b"[]", b"null"])
def test_cache_json_that_is_something_else(folder: LocalFolder, content: bytes) -> None:
    for name in ("cache.json", FIRST.record):
        good = (folder.path / name).read_bytes()
        (folder.path / name).write_bytes(content)
        with pytest.raises(DdkError, match=name):
            read_all(folder)
        (folder.path / name).write_bytes(good)


def test_a_json_file_too_large_to_be_one(folder: LocalFolder) -> None:
    for name in ("cache.json", FIRST.record):
        good = (folder.path / name).read_bytes()
        os.truncate(folder.path / name, 1 << 40)  # a hole: costs nothing to make
        with pytest.raises(DdkError, match="at most 16,777,216 make sense"):
            read_all(folder)
        (folder.path / name).write_bytes(good)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cache_json_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    values = json.loads(make_spec(make_plan()).to_json())
    name = data.draw(st.sampled_from(sorted(set(values) - {"seal"})))
    values[name] = data.draw(JSON)
    (tmp_path / "cache.json").write_bytes(resealed(values))
    try:
        read_spec(LocalFolder(tmp_path))
    except DdkError:
        return
    same = resealed(values) == make_spec(make_plan()).to_json()
    assert name in ("plan", "about", "domains") or same
    assert name != "plan" or Plan.from_dict(values["plan"]).settings() == make_plan().settings()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sealed_record_is_read_or_refused(data: st.DataObject, folder: LocalFolder) -> None:
    path = folder.path / FIRST.record
    content = path.read_bytes()
    name = data.draw(st.sampled_from(sorted(set(json.loads(content)) - {"seal"})))
    reseal(folder, **{name: data.draw(JSON)})
    try:
        reader = CacheReader(folder, 1.0)
        reader.read("code", TRAIN, 0)
        verify_shard(folder, FIRST, reader.spec, Codecs(folder, reader.spec))
    except DdkError:
        pass
    finally:
        path.write_bytes(content)
