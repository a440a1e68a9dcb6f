"""Every single bit of a small cache is flipped: each flip is an error, or the decoded values are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from caches import fill, make_plan, make_spec
from faults import Judge

from ddk_pipe.pipeline.cache import CacheReader, CacheSpec, Shard, ShardRecord, SplitSize, group_of, read_spec
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.cache.windows import open_windows
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN

SHARD = Shard("code", TRAIN, 0, 0, 1)


class Memory(LocalFolder):
    """A folder whose files are held in memory, one of them damaged; reading goes through the same names."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.content = {
            file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
        }

    def read(self, name: str, *, most: int | None = None) -> bytes:
        if name not in self.content:
            raise FileNotFoundError(f"{self.name}/{name}: not there")
        return self.content[name]

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        content = self.read(name)
        if any(start + length > len(content) for start, length in ranges):
            raise ValueError(f"{self.name}/{name}: ends too early")
        return [content[start : start + length] for start, length in ranges]

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self.read_ranges(name, [(start, length)])[0] for name, start, length in parts]

    def size(self, name: str) -> int:
        return len(self.read(name))

    def flips(self, name: str) -> Iterator[None]:
        """Flip each bit of a file in turn; afterwards it is as before."""
        good = self.content[name]
        try:
            for at in range(len(good)):
                for bit in range(8):
                    damaged = bytearray(good)
                    damaged[at] ^= 1 << bit
                    self.content[name] = bytes(damaged)
                    yield
        finally:
            self.content[name] = good


class World:
    """A cache of one window of 8 tokens, its judge, and what a reader has parsed of it."""

    def __init__(self, path: Path) -> None:
        fill(LocalFolder(path), spec_of_one_window())
        self.judge = Judge(LocalFolder(path))
        self.folder = Memory(path)
        reader = CacheReader(self.folder, 1.0)
        self.spec, self.codecs = reader.spec, Codecs(self.folder, reader.spec)
        record = read_record(self.folder, SHARD, self.spec)
        assert record is not None
        self.record: ShardRecord = record
        self.group = group_of(SHARD, record)

    def whole_read_finds_it(self) -> bool:
        """True for an error, False for the right values; fails for any others."""
        try:
            right, errors = self.judge.read(CacheReader(self.folder, 1.0))
        except DdkError as problem:
            right, errors = 0, [problem]
        assert right + len(errors) == 1
        return not right

    def reading_the_shard_finds_it(self) -> bool:
        """The same where only files of the shard are damaged: nothing but them is read and parsed again."""
        try:
            open_windows(self.folder, SHARD, self.record, self.spec, self.codecs, 0).read(0)
        except (DdkError, ValueError):
            return True
        return self.whole_read_finds_it()

    def reading_the_record_finds_it(self) -> bool:
        """The same where only the commit record is damaged."""
        try:
            read_record(self.folder, SHARD, self.spec)
        except DdkError:
            return True
        return self.whole_read_finds_it()

    def reading_cache_json_finds_it(self) -> bool:
        """The same where only cache.json is damaged: it is not even opened."""
        try:
            read_spec(self.folder)
        except DdkError:
            return True
        return self.whole_read_finds_it()


def spec_of_one_window() -> CacheSpec:
    return make_spec(
        make_plan(temperatures=(1.0,), tau=0.1),
        vocab_size=16,
        seq_len=8,
        domains={"code": {TRAIN: SplitSize(1, 1, "digest")}},
    )


@pytest.fixture(scope="module")
def world(ram: Path) -> World:
    return World(ram / "bits")


@pytest.mark.slow
def test_every_bit_of_every_file_of_a_shard(world: World) -> None:
    files = [name for name in world.folder.content if name.startswith(f"{world.group}/")]
    assert len(files) == len(world.record.files) == 16
    for name in files:
        assert all(world.reading_the_shard_finds_it() for _ in world.folder.flips(name)), name
    assert not world.whole_read_finds_it()


def test_every_bit_of_a_commit_record(world: World) -> None:
    found = [world.reading_the_record_finds_it() for _ in world.folder.flips(SHARD.record)]
    assert len(found) > 10_000 and all(found)


def test_every_bit_of_cache_json(world: World) -> None:
    found = [world.reading_cache_json_finds_it() for _ in world.folder.flips("cache.json")]
    assert len(found) > 5_000 and all(found)


def test_every_bit_of_a_rank_table(world: World) -> None:
    found = [world.whole_read_finds_it() for _ in world.folder.flips("code/ranks.npy")]
    assert len(found) == 8 * (128 + 4 * world.spec.vocab_size) and all(found)
