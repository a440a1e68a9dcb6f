"""A store in memory that answers as one with any number of shards of one window, for cache_shards.py.

A few real shards (read_material.py) stand for all: shard k has the files of template k mod their number, but for its
commit record and its `labels` array, which holds the window's number and lies uncompressed. Both are made when they are
asked for, which costs some microseconds of the time measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
from read_material import DOMAIN, SPLIT, spec_of

from ddk_pipe.pipeline.cache import Shard, ShardRecord, SplitSize, group_of, require_record, shards_of
from ddk_pipe.pipeline.cache.arrays import BLOSC_HEADER, CHUNK, ShardReader
from ddk_pipe.pipeline.cache.layout import STAMP_WORDS, input_arrays
from ddk_pipe.pipeline.cache.record import FileFacts, checks_text
from ddk_pipe.pipeline.storage import LocalFolder, durable

GROUP = "00000000"  # the random part of every group's name
LABELS = "labels/c/0/0"
NAME = re.compile(rf"{DOMAIN}/{SPLIT}/(\d+)(?:\.{GROUP}\.zarr/(.*)|\.json)")


class Endless:
    """A Folder to read from."""

    name = "memory"

    def __init__(self, folder: LocalFolder, templates: int, shards: int) -> None:
        """`folder`: a cache of that many real shards of one window."""
        self.requests = 0
        self.made: dict[int, bytes] = {}
        spec = spec_of(templates, 1)
        real = shards_of(DOMAIN, SPLIT, spec.domains[DOMAIN][SPLIT])
        self.records = [require_record(folder, shard, spec) for shard in real]
        groups = [group_of(shard, record) for shard, record in zip(real, self.records, strict=True)]
        self.files = [
            {name: folder.read(f"{group}/{name}") for name in record.files}
            for group, record in zip(groups, self.records, strict=True)
        ]
        self.labels = [
            ShardReader(
                folder,
                group,
                windows=1,
                files=record.sizes,
                expected={"labels": input_arrays(spec)["labels"]},
            ).read(0)["labels"]
            for group, record in zip(groups, self.records, strict=True)
        ]
        whole = replace(spec, domains={DOMAIN: {SPLIT: SplitSize(shards, 1, "drawn")}})
        self.small = {
            "cache.json": whole.to_json(),
            f"{DOMAIN}/ranks.npy": folder.read(f"{DOMAIN}/ranks.npy"),
        }

    def chunk(self, number: int) -> bytes:
        """The one chunk of a shard's `labels`: copied by blosc as it is, and its checksum."""
        values = self.labels[number % len(self.labels)].copy()
        values[:STAMP_WORDS] = np.array([number], "<u8").view("<u2")
        size = values.nbytes
        body = BLOSC_HEADER.pack(2, 1, 0x93, 2, size, size, size + BLOSC_HEADER.size) + values.tobytes()
        return body + _check(body)

    def learnt(self, known: bytes, template: ShardReader, number: int) -> bytes:
        """What a reader learns of the shard, made of what it `known` of the template's."""
        chunk = self.chunk(number)
        names = [array.name for array in template._arrays]
        chunks = np.frombuffer(known, CHUNK, len(names)).copy()
        check = int.from_bytes(chunk[-4:], "little")
        chunks[names.index("labels")] = (0, len(chunk), check)
        return chunks.tobytes() + known[chunks.nbytes :]

    def record(self, number: int) -> bytes:
        """The sealed commit record, made once."""
        if number not in self.made:
            self.made[number] = self._record(number)
        return self.made[number]

    def _record(self, number: int) -> bytes:
        known, content = self.records[number % len(self.records)], self._content(number, LABELS)
        facts = FileFacts(bytes=len(content), blake2b=durable.digest(content))
        chunk = self.chunk(number)
        place = np.array([len(self.labels[0]), len(chunk)])
        values = {
            **known.model_dump(),
            **vars(Shard(DOMAIN, SPLIT, number, number, 1)),
            "group": f"{number:05d}.{GROUP}.zarr",
            "files": {**known.model_dump()["files"], LABELS: facts.model_dump()},
            "checks": {**known.checks, "labels": checks_text(np.frombuffer(chunk[-4:], "<u4"))},
            "places": {**known.places, "labels": checks_text(place)},
        }
        return ShardRecord.model_validate(values).sealed()

    def _content(self, number: int, name: str) -> bytes:
        if name != LABELS:
            return self.files[number % len(self.files)][name]
        chunk = self.chunk(number)
        index = np.array([0, len(chunk)], "<u8").tobytes()
        return chunk + index + _check(index)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        self.requests += 1
        found = NAME.fullmatch(name)
        if found is None:
            return self.small[name]
        return self.record(int(found[1])) if found[2] is None else self._content(int(found[1]), found[2])

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        self.requests += len(parts)
        out = []
        for name, start, length in parts:
            number, _, file = name[len(DOMAIN) + len(SPLIT) + 2 :].partition(f".{GROUP}.zarr/")
            out.append(self._content(int(number), file)[start : start + length])
        return out

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many([(name, start, length) for start, length in ranges])

    def each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(map(call, items))


def _check(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")
