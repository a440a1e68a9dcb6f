from __future__ import annotations

import numpy as np
import pytest
from caches import (
    FIRST,
    SECOND,
    group_path,
    make_plan,
    make_spec,
    open_writer,
    read_all,
    reseal,
    verify_all,
    write_shard,
)

from ddk_pipe.pipeline.cache import CacheReader, committed, read_spec
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.soundness import check_shard, verify_shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder
from ddk_pipe.pipeline.text import TRAIN


@pytest.mark.slow
def test_verifying_finds_the_statistics_of_the_record(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    for shard in (FIRST, SECOND):
        write_shard(writer, shard)
    for shard, record in committed(place, writer.spec):
        facts = verify_shard(place, shard, writer.spec, Codecs(place, writer.spec))
        assert (facts.positions, facts.entries) == (record.positions, record.entries)
        assert facts.label_nats == record.label_nats
    assert [shard for shard, _ in committed(place, writer.spec)] == [FIRST, SECOND]


def test_any_flipped_byte_of_a_shard_is_noticed(folder: LocalFolder) -> None:
    """Verifying finds all of them; reading finds those it meets, and never returns other values."""
    group = group_path(folder, FIRST)
    rng = np.random.default_rng(3)
    right = [CacheReader(folder, 1.0).read("code", TRAIN, number) for number in range(4)]
    for path in sorted(path for path in group.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 3):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(DdkError, match=r"not what was committed; run `ddk-pipe verify .* --repair`"):
                check_shard(folder, FIRST, read_spec(folder))
            found = 0
            for number in range(4):
                try:
                    got = CacheReader(folder, 1.0).read("code", TRAIN, number)
                except DdkError as problem:
                    assert group.name in str(problem) and "verify" in problem.hint
                    found += 1
                else:
                    assert np.array_equal(got.tokens, right[number].tokens)
                    assert np.array_equal(got.labels, right[number].labels)
                    assert got.targets.logprobs.equal(right[number].targets.logprobs)
            assert found >= (0 if "t1" in path.parts else 1)
        path.write_bytes(content)
    read_all(folder)
    verify_all(folder)


def test_files_that_were_never_committed(folder: LocalFolder) -> None:
    (group_path(folder, FIRST) / "extra").write_text("x")
    with pytest.raises(DdkError, match="was never committed"):
        verify_all(folder)


@pytest.mark.parametrize("field", ["positions", "entries", "label_nats"])
def test_statistics_that_are_not_those_of_the_windows(folder: LocalFolder, field: str) -> None:
    reseal(folder, **{field: 1})
    with pytest.raises(DdkError, match=f"{field} is .*, its commit record says 1"):
        verify_all(folder)
