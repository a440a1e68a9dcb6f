"""One shard's arrays as a plain Zarr v3 group: written by zarr-python, read by a small reader of our own.

Every array is [windows, width], little-endian unsigned, chunk = one window, one shard file, stock codecs: blosc (zstd,
byte shuffle), then crc32c; the index of the shard lies at its end with its own crc32c. `zarr.open_group` reads it.

Our reader takes exactly this shape and nothing else. It is several times cheaper than zarr's (which pays per array and
call), and it trusts nobody: sizes are compared with what the caller expects before anything is allocated, an absent
chunk is an error and not zeros, every chunk is compared with its checksum, and no file but the named ones is opened.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.storage import Folder

numcodecs.blosc.use_threads = (
    False  # as zarr sets it too: chunks are small, and readers have threads of their own
)

DATA_TYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MOST_CHUNK_BYTES = 1 << 28  # of one window and array, unpacked
MISSING = (1 << 64) - 1  # index entry of a chunk that is not there, by the Zarr v3 specification
CHECK_BYTES = 4
BLOSC_HEADER = struct.Struct(
    "<BBBBIII"
)  # version, version of zstd, flags, typesize, nbytes, blocksize, cbytes
BLOSC_STORED, BLOSC_ZSTD = 0x02, 4  # flag: copied as it is; number of zstd in the upper three bits
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Expected:
    """What an array must look like: its dtype, and the least and most values of one window."""

    dtype: np.dtype[Any]
    least: int
    most: int


def array_files(array: str) -> tuple[str, str]:
    """Names of an array's metadata and of its shard inside the group."""
    return f"{array}/zarr.json", f"{array}/c/0/0"


def write_group(folder: Path, attributes: Mapping[str, Mapping[str, Any]], arrays: Arrays) -> None:
    """Write the group `folder` of arrays [windows, width] named "x" or "group/x".

    `attributes` of every group, "" being the outer one. Raises ValueError for an array that ShardReader would refuse.
    """
    import zarr

    for name, values in arrays.items():
        if values.dtype not in DATA_TYPES.values() or values.ndim != 2 or not values.size:
            raise ValueError(f"{name}: {values.dtype} {values.shape} cannot be written")
        if values[0].nbytes > MOST_CHUNK_BYTES:
            raise ValueError(
                f"{name}: a window of {values[0].nbytes:,} bytes is more than {MOST_CHUNK_BYTES:,}"
            )
    outer = zarr.open_group(folder, mode="a", zarr_format=3, attributes=dict(attributes[""]))
    for group, about in attributes.items():
        if group:
            outer.create_group(group, attributes=dict(about))
    for name, values in arrays.items():
        _write_array(outer, name, values)


def _write_array(group: Any, name: str, values: NDArray[Any]) -> None:
    from zarr.codecs import BloscCodec, Crc32cCodec

    # level 1 shrinks the codes best (5 finds matches that are none) and is the fastest
    compressor = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=values.dtype.itemsize)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, values.shape[1]),
        shards=values.shape,
        compressors=[compressor, Crc32cCodec()],
        fill_value=0,
        # without this zarr leaves out chunks that are all zeros, and a missing chunk would be silence
        config={"write_empty_chunks": True},
    )
    array[...] = values


class ShardReader:
    """The arrays `expected` of the group `group` in `folder`, read window by window.

    `files` are the bytes of each file of the group by name, `windows` the rows that every array must have, `checks`
    (optional) the crc32c that each window of each array was committed with, uint32 [windows].
    Raises ValueError naming the file for anything that is not as expected, FileNotFoundError for a missing file.
    May be used from several threads at once.
    """

    def __init__(
        self,
        folder: Folder,
        group: str,
        *,
        windows: int,
        files: Mapping[str, int],
        expected: Mapping[str, Expected],
        checks: Mapping[str, NDArray[np.uint32]] | None = None,
    ) -> None:
        self._arrays = {
            name: _Array.open(folder, f"{group}/{name}", windows, files[array_files(name)[1]], wanted)
            for name, wanted in expected.items()
        }
        self._folder, self._checks = folder, checks
        self.windows = windows

    def read(self, row: int) -> Arrays:
        """The arrays of one window, each [width]."""
        if not 0 <= row < self.windows:
            raise IndexError(f"row {row} of {self.windows}")
        checks = self._checks
        return {
            name: array.read(self._folder, row, None if checks is None else int(checks[name][row]))
            for name, array in self._arrays.items()
        }

    def checks(self) -> dict[str, NDArray[np.uint32]]:
        """The crc32c of every window as it stands in the files, uint32 [windows] by array (not computed anew)."""
        return {name: array.stored_checks(self._folder) for name, array in self._arrays.items()}


@dataclass(frozen=True)
class _Array:
    file: str
    dtype: np.dtype[Any]
    width: int
    index: NDArray[np.uint64]  # [windows, 2]: where each chunk starts, and its bytes

    @classmethod
    def open(cls, folder: Folder, name: str, windows: int, file_bytes: int, expected: Expected) -> _Array:
        metadata, file = array_files(name)
        content = folder.read(metadata)
        width = parse_width(content, windows, expected.dtype, name=f"{folder.name}/{metadata}")
        if not expected.least <= width <= expected.most or width * expected.dtype.itemsize > MOST_CHUNK_BYTES:
            raise ValueError(
                f"{folder.name}/{metadata}: {width} values a window, expected {expected.least} to {expected.most}"
            )
        index = _read_index(folder, file, windows, file_bytes, width * expected.dtype.itemsize)
        return cls(file, expected.dtype, width, index)

    def read(self, folder: Folder, row: int, check: int | None) -> NDArray[Any]:
        start, length = self.index[row].tolist()
        (content,) = folder.read_ranges(self.file, [(start, length)])
        body, stored = content[:-CHECK_BYTES], int.from_bytes(content[-CHECK_BYTES:], "little")
        if google_crc32c.value(body) != stored or check not in (None, stored):
            raise ValueError(f"{folder.name}/{self.file}: row {row} fails its checksum")
        out = np.empty(self.width, self.dtype)
        try:
            _check_blosc(body, out)
            numcodecs.blosc.decompress(body, out)
        except (ValueError, RuntimeError) as problem:
            raise ValueError(f"{folder.name}/{self.file}: row {row}: {problem}") from None
        return out

    def stored_checks(self, folder: Folder) -> NDArray[np.uint32]:
        ends = self.index.sum(1).tolist()
        parts = folder.read_ranges(self.file, [(end - CHECK_BYTES, CHECK_BYTES) for end in ends])
        return np.frombuffer(b"".join(parts), "<u4").astype(np.uint32)


def _check_blosc(body: bytes, out: NDArray[Any]) -> None:
    """What blosc says about itself, before it unpacks anything."""
    version, _, flags, typesize, unpacked, _, packed = BLOSC_HEADER.unpack_from(body)
    if (version, typesize, unpacked, packed) != (2, out.dtype.itemsize, out.nbytes, len(body)):
        raise ValueError(f"unpacks to {unpacked} bytes, expected {out.nbytes}")
    if flags >> 5 != BLOSC_ZSTD and not flags & BLOSC_STORED:
        raise ValueError("not compressed by zstd")


def _read_index(
    folder: Folder, file: str, windows: int, file_bytes: int, unpacked: int
) -> NDArray[np.uint64]:
    """The shard's index, every entry inside the file and of a size that can be right."""
    end = file_bytes - windows * 16 - CHECK_BYTES
    if end < 0:
        raise ValueError(f"{folder.name}/{file}: too short for an index of {windows} windows")
    (content,) = folder.read_ranges(file, [(end, file_bytes - end)])
    if google_crc32c.value(content[:-CHECK_BYTES]) != int.from_bytes(content[-CHECK_BYTES:], "little"):
        raise ValueError(f"{folder.name}/{file}: the index fails its checksum")
    index = np.frombuffer(content[:-CHECK_BYTES], "<u8").reshape(windows, 2)
    starts, lengths = index.T
    if (starts == MISSING).any():
        raise ValueError(f"{folder.name}/{file}: row {int((starts == MISSING).argmax())} is missing")
    most = unpacked + BLOSC_HEADER.size + CHECK_BYTES  # blosc stores what it cannot shrink
    least = BLOSC_HEADER.size + CHECK_BYTES
    if ((lengths < least) | (lengths > most) | (starts > end) | (starts + lengths > end)).any():
        raise ValueError(f"{folder.name}/{file}: the index points outside the file")
    return index


def parse_width(content: bytes, windows: int, dtype: np.dtype[Any], *, name: str) -> int:
    """Width of the array that a zarr.json describes.

    Raises ValueError unless it is one of `windows` rows and of `dtype`, stored exactly as the module's docstring says.
    """
    try:
        found = json.loads(content)
        width = found["shape"][1]
        blosc = found["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        free = {"clevel": blosc["clevel"], "blocksize": blosc["blocksize"]}  # the writer's choice
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{name}: not the metadata of a sharded array") from None
    if type(width) is not int or any(type(value) is not int for value in free.values()):
        raise ValueError(f"{name}: not the metadata of a sharded array")
    wanted = _metadata(windows, width, dtype, free)
    found = {"attributes": {}, "storage_transformers": [], **found}
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        raise ValueError(f"{name}: {', '.join(different)} not as this program writes it")
    return width


def _metadata(windows: int, width: int, dtype: np.dtype[Any], free: dict[str, int]) -> dict[str, Any]:
    """The zarr.json of an array; `free` are the blosc settings that do not matter to a reader."""
    little, crc32c = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    values = little if dtype.itemsize > 1 else {"name": "bytes"}  # a byte has no order
    blosc = {"typesize": dtype.itemsize, "cname": "zstd", "shuffle": "shuffle", **free}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [windows, width],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [windows, width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, width],
                    "codecs": [values, {"name": "blosc", "configuration": blosc}, crc32c],
                    "index_codecs": [little, crc32c],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "storage_transformers": [],
    }
