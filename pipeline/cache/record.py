"""The commit record of a shard: that it exists, what its files are, and its statistics.

It may come from a stranger. Whatever is wrong with it is a DdkError that names the file and the repair; nothing in it
can lead outside the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from ddk_pipe.pipeline.cache.damage import repair
from ddk_pipe.pipeline.cache.shards import Shard, uncommitted
from ddk_pipe.pipeline.cache.spec import MOST_SHARD_WINDOWS, CacheSpec, all_shards
from ddk_pipe.pipeline.cache.strict_json import Strict, Text, read_json
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, durable

GROUP = re.compile(r"(\d{5,})\.[0-9a-f]{8}\.zarr")
FOREIGN = "commit record of another cache"
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class FileFacts(Strict):
    """Size and BLAKE2b of one file of a shard."""

    bytes: Count
    blake2b: Text


class ShardRecord(Strict):
    """The commit record of a shard: it exists, and these are its content and its statistics."""

    model_config = pydantic.ConfigDict(extra="allow")  # more facts for people

    schema_version: int
    fingerprint: Text
    domain: Text
    split: Text
    number: Count
    first_window: Count
    windows: Annotated[int, Field(ge=1, le=MOST_SHARD_WINDOWS)]
    ranks_digest: Text  # of the table that the ids are coded with
    group: Text  # the folder beside the record that holds the arrays
    files: Annotated[dict[Text, FileFacts], Field(max_length=4096)]  # by name inside the group
    checks: dict[Text, str]  # by array: the crc32c of each window's chunk, eight hex digits each
    # by array: its width and the bytes of each window's chunk, likewise; older records have none
    places: dict[Text, str] = Field(default_factory=dict)
    positions: Count  # with a label
    entries: Count
    label_nats: float  # minus the sum of the labels' log-probabilities
    target_bytes: Count
    input_bytes: Count  # tokens, and where documents begin
    teacher: dict[str, Any] = Field(default_factory=dict)  # what predicted it
    seconds: float = 0.0

    def sealed(self) -> bytes:
        """The record as its file: canonical JSON that ends in a digest of itself."""
        return durable.sealed(self.model_dump(mode="json"))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name inside the group."""
        return {name: facts.bytes for name, facts in self.files.items()}


def parse_record(content: bytes, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """Raises ValueError saying what is wrong with it."""
    try:
        values = json.loads(content)
        seal = values.pop("seal")
        intact = seal == durable.digest(durable.to_json(values))
        record = ShardRecord.model_validate(values)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError("damaged commit record") from None
    if not intact:
        raise ValueError("damaged commit record")
    if record.fingerprint != spec.fingerprint:
        raise ValueError(FOREIGN)
    named = GROUP.fullmatch(record.group)
    if any(getattr(record, name) != value for name, value in vars(shard).items()):
        raise ValueError("commit record of another shard")
    if named is None or named[1] != f"{shard.number:05d}":
        raise ValueError("commit record names the group of another shard")
    positions = shard.windows * spec.seq_len
    most_entries = positions * spec.vocab_size * len(spec.plan.temperatures)
    if record.positions > positions or record.entries > most_entries:
        raise ValueError("commit record with impossible numbers")
    if any(name.startswith("/") or ".." in name.split("/") for name in record.files):
        raise ValueError("commit record that leads outside")
    return record


def record_bytes(folder: Folder, shard: Shard) -> bytes:
    """The file of the commit record, unread; raises DdkError if there is none or none that makes sense."""
    try:
        return read_json(folder, shard.record, hint=repair(folder))
    except FileNotFoundError:
        raise DdkError(
            f"{folder.name}/{shard.record}: not committed", hint="run `ddk-pipe cache-teacher`"
        ) from None


def record_of(content: bytes, folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """The commit record whose file has this content; raises DdkError if it is damaged or foreign."""
    try:
        return parse_record(content, shard, spec)
    except ValueError as problem:
        raise DdkError(f"{folder.name}/{shard.record}: {problem}", hint=repair(folder)) from None


def read_record(folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord | None:
    """The commit record of a shard, None if it is not committed; raises DdkError if it is damaged or foreign."""
    try:
        content = read_json(folder, shard.record, hint=repair(folder))
    except FileNotFoundError:
        return None
    return record_of(content, folder, shard, spec)


def require_record(folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """The commit record; raises DdkError if there is none."""
    return record_of(record_bytes(folder, shard), folder, shard, spec)


def committed(folder: Folder, spec: CacheSpec) -> Iterator[tuple[Shard, ShardRecord]]:
    """Committed shards and their records."""
    shards = all_shards(spec)
    missing = set(uncommitted(folder, shards))
    for shard in shards:
        record = None if shard in missing else read_record(folder, shard, spec)
        if record is not None:
            yield shard, record


def is_input(name: str) -> bool:
    """True of a file in a shard's group that says what the teacher saw, and nothing of what it said."""
    return name.startswith(("tokens/", "starts/"))


def group_of(shard: Shard, record: ShardRecord) -> str:
    """Name of a committed shard's group inside the cache."""
    return f"{shard.domain}/{shard.split}/{record.group}"


def random_part(group: str) -> bytes:
    """The four bytes that a group's name has beside its shard's number."""
    return bytes.fromhex(group.split(".")[1])


def group_named(shard: Shard, part: bytes) -> str:
    """The inverse: name of the shard's group inside the cache."""
    return f"{shard.name}.{part.hex()}.zarr"


def group_in(name: str) -> str:
    """The first three parts of a name: the group, if it is a file of one."""
    return "/".join(name.split("/", 3)[:3])


def checks_text(checks: NDArray[np.uint32]) -> str:
    """Eight hex digits a value, as the commit record holds checks and places."""
    return checks.astype(">u4").tobytes().hex()


def parse_checks(text: str, windows: int) -> NDArray[np.uint32]:
    """The inverse, uint32 [windows]; raises ValueError for another number of windows."""
    if len(text) != 8 * windows:
        raise ValueError("commit record without a checksum for every window")
    return parse_values(text)


def parse_values(text: str) -> NDArray[np.uint32]:
    """The inverse of checks_text of any number of values."""
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)
