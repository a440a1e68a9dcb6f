"""An object store that fails: a real S3-speaking server, behind a proxy that cuts connections and loses answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from caches import fill, groups, open_writer, write_shard
from faults import (
    FIRST,
    SECOND,
    Judge,
    fork_with_store,
    killed,
    small_spec,
    start,
    write_in_store,
)
from proxy import Proxy
from s3 import new_prefix, together

from ddk_pipe.pipeline.cache import CacheReader, Shard, all_shards, verify
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder, ObjectFolder

RETRY_SECONDS = 1.0


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands between obstore and the store."""
    proxy = Proxy(int(s3_environment["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: Proxy, judge: Judge) -> ObjectFolder:
    """The small cache, complete, reached through the proxy."""
    store = ObjectFolder(new_prefix(), retry_seconds=RETRY_SECONDS)
    assert isinstance(judge.undisturbed, LocalFolder)
    for name in judge.undisturbed.names():
        store.write(name, judge.undisturbed.read(name))
    return store


@pytest.fixture
def empty_store(proxy: Proxy) -> ObjectFolder:
    return ObjectFolder(new_prefix(), retry_seconds=RETRY_SECONDS)


@pytest.mark.slow
def test_two_processes_race_for_every_record(
    judge: Judge, s3_environment: dict[str, str], empty_store: ObjectFolder
) -> None:
    writers = [start(write_in_store, s3_environment, empty_store.name, small_spec()) for _ in range(2)]
    for process, connection in writers:
        assert connection.recv() == "done"
        process.join(60)
    judge.complete(empty_store)
    assert all(len(groups(empty_store, shard)) == 1 for shard in all_shards(small_spec()))


def test_a_race_for_one_record_at_the_same_moment(judge: Judge, empty_store: ObjectFolder) -> None:
    writers = [open_writer(ObjectFolder(empty_store.name), small_spec()) for _ in range(4)]
    records = together(*(lambda writer=writer: write_shard(writer, FIRST) for writer in writers))
    assert len({getattr(record, "group", record) for record in records}) == 1
    assert len(groups(empty_store, FIRST)) == 1
    assert judge.committed(empty_store) == 2


def test_an_answer_to_a_commit_that_gets_lost(judge: Judge, proxy: Proxy, empty_store: ObjectFolder) -> None:
    """The record is there, the writer does not know: it asks again, is refused, and finds that it was itself."""
    writer = open_writer(empty_store, small_spec())
    proxy.lose = b"00000.json HTTP/1.1"
    record = write_shard(writer, FIRST)
    assert proxy.lose is None, "the fault did not happen"
    known = read_record(empty_store, FIRST, writer.spec)
    assert known is not None and known.group == record.group
    assert groups(empty_store, FIRST) == {record.group}
    assert judge.committed(empty_store) == 2


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 10, 300, 600])
def test_connections_cut_while_reading(judge: Judge, proxy: Proxy, store: ObjectFolder, after: int) -> None:
    """In the head of an answer, in its body: asked again, and all is right."""
    proxy.cut_after, proxy.cuts = after, 3
    right, errors = judge.read(CacheReader(store, 1.0))
    assert proxy.cuts == 0, "the fault did not happen"
    assert right == len(judge.windows) and not errors


def test_connections_cut_while_writing(judge: Judge, proxy: Proxy, empty_store: ObjectFolder) -> None:
    proxy.cut_after, proxy.cuts = 0, 4
    fill(empty_store, small_spec())
    assert proxy.cuts == 0
    judge.complete(empty_store)
    assert all(len(groups(empty_store, shard)) == 1 for shard in all_shards(small_spec()))


@pytest.mark.slow
def test_a_store_that_goes_away_while_reading(judge: Judge, proxy: Proxy, store: ObjectFolder) -> None:
    """One line within the time allowed, which does not call it damage; nothing is taken for missing or bad."""
    reader = CacheReader(store, 1.0)
    reader.read("code", "train", 0)
    proxy.dead = True
    began = time.monotonic()
    for attempt in (
        lambda: reader.read("code", "train", 1),
        lambda: CacheReader(store, 1.0),
        lambda: verify(store, repair=True),
    ):
        with pytest.raises(DdkError, match=r"check network and endpoint") as caught:
            attempt()
        assert str(caught.value).startswith(store.name) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 3 * (RETRY_SECONDS + 5)
    proxy.dead = False
    assert judge.read(reader) == (len(judge.windows), [])
    judge.complete(store)


@pytest.mark.slow
def test_a_store_that_goes_away_while_writing(judge: Judge, proxy: Proxy, empty_store: ObjectFolder) -> None:
    """Right before the record: an error, nothing committed; the next run removes what was uploaded."""
    writer = open_writer(empty_store, small_spec())
    write_shard(writer, FIRST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(empty_store, "create", lambda *_: die(proxy, empty_store))
        with pytest.raises(DdkError, match="check network and endpoint"):
            write_shard(writer, SECOND)
    proxy.dead = False
    assert judge.committed(empty_store) == 2 and len(groups(empty_store, SECOND)) == 1
    fill(empty_store, small_spec())
    assert len(groups(empty_store, SECOND)) == 1
    judge.complete(empty_store)


def die(proxy: Proxy, store: ObjectFolder) -> None:
    """The connection is gone from here on."""
    proxy.dead = True
    ObjectFolder.create(store, SECOND.record, b"")


def test_kill_9_while_uploading(
    judge: Judge, s3_environment: dict[str, str], proxy: Proxy, empty_store: ObjectFolder
) -> None:
    """Half a group lies there and no record names it: invisible; the next writer of the shard removes it."""
    write_shard(open_writer(empty_store, small_spec()), FIRST)
    process, connection = start(write_in_store, s3_environment, empty_store.name, small_spec(), True)
    connection.recv()
    for _ in range(2000):
        if uploading(empty_store, SECOND):
            break
        time.sleep(0.002)
    process.kill()
    assert killed(process)
    assert judge.committed(empty_store) == len(judge.windows) - 2 * len(uncommitted(empty_store))
    fill(empty_store, small_spec())
    judge.complete(empty_store)
    assert all(len(groups(empty_store, shard)) == 1 for shard in all_shards(small_spec()))


def uploading(store: ObjectFolder, shard: Shard) -> bool:
    return bool(groups(store, shard))


def uncommitted(store: ObjectFolder) -> list[Shard]:
    return open_writer(store, small_spec()).pending()


def test_a_store_used_across_a_fork(s3_environment: dict[str, str], store: ObjectFolder) -> None:
    """The client of the store does not survive a fork; a child that uses it is told so instead of hanging."""
    process, connection = start(fork_with_store, s3_environment, store.name)
    assert connection.poll(30), "the child hangs"
    status, text = connection.recv()
    process.join(60)
    assert status == 0 and "start processes by spawn" in text


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "removed", "swapped"])
def test_damaged_objects(judge: Judge, store: ObjectFolder, damage: str) -> None:
    record, other = (read_record(store, shard, small_spec()) for shard in (FIRST, SECOND))
    assert record is not None and other is not None
    name = f"code/train/{record.group}/labels/c/0/0"
    content = store.read(name)
    if damage == "removed":
        store.remove(name)
    else:
        changed = {
            "truncated": content[:-1],
            "swapped": store.read(f"code/train/{other.group}/labels/c/0/0"),
        }
        store.write(name, changed[damage])
    assert all(name in line and "--repair" in line for line in judge.damaged(store))
    verify(store, repair=True)
    fill(store, small_spec())
    judge.complete(store)
