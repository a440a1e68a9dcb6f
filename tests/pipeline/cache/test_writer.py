from __future__ import annotations

from pathlib import Path

import pytest
from caches import FIRST, SECOND, SEQ_LEN, group_path, groups, make_plan, make_spec, open_writer, write_shard
from s3 import together

from ddk_pipe.pipeline.cache import CacheReader, CacheWriter, ShardRecord
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.soundness import verify_shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def test_computing_a_shard_twice_gives_the_same_bytes(folder: LocalFolder, tmp_path: Path) -> None:
    again = LocalFolder(tmp_path / "again")
    write_shard(open_writer(again, make_spec(make_plan())), FIRST)
    one, other = (group_path(cache, FIRST) for cache in (folder, again))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_a_crash_before_the_record_leaves_the_shard_pending_and_is_cleaned_up(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shard(writer, FIRST)
    assert FIRST in writer.pending() and len(groups(place, FIRST)) == 1
    reader = CacheReader(place, 1.0)
    with pytest.raises(DdkError, match="not committed"):
        reader.read("code", TRAIN, 0)
    record = write_shard(open_writer(place, make_spec(make_plan())), FIRST)
    assert FIRST not in writer.pending() and groups(place, FIRST) == {record.group}
    assert reader.read("code", TRAIN, 0).tokens.shape == (SEQ_LEN,)


@pytest.mark.slow
def test_of_two_writers_of_one_shard_one_wins_and_nothing_of_the_other_stays(place: Folder) -> None:
    writers = [open_writer(place, make_spec(make_plan())) for _ in range(3)]
    for shard in (FIRST, SECOND):
        records = together(
            *(lambda writer=writer, shard=shard: write_shard(writer, shard) for writer in writers)
        )
        assert all(isinstance(record, ShardRecord) for record in records), records
        (group,) = {record.group for record in records if isinstance(record, ShardRecord)}
        assert groups(place, shard) == {group}
        verify_shard(place, shard, writers[0].spec, Codecs(place, writers[0].spec))
    assert not any("partial" in name for name in place.names())


def test_a_writer_whose_own_commit_is_reported_as_someone_elses(place: Folder) -> None:
    """A store may lose the answer to a put and refuse the second try: the record is ours all the same."""
    writer = open_writer(place, make_spec(make_plan()))
    create = place.create

    def twice(name: str, content: bytes) -> None:
        create(name, content)
        create(name, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "create", twice)
        record = write_shard(writer, FIRST)
    assert groups(place, FIRST) == {record.group}
    verify_shard(place, FIRST, writer.spec, Codecs(place, writer.spec))
