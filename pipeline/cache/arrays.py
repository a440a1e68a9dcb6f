"""One shard's arrays as a plain Zarr v3 group: written by zarr-python, read by a small reader of our own.

Every array is [windows, width], little-endian unsigned, chunk = one window, one shard file, stock codecs: blosc (zstd,
byte shuffle), then crc32c; the index of the shard lies at its end with its own crc32c. `zarr.open_group` reads it.

Our reader takes exactly this shape and nothing else. It is several times cheaper than zarr's (which pays per array and
call), and it trusts nobody: sizes are compared with what the caller expects before anything is allocated, an absent
chunk is an error and not zeros, every chunk is compared with its checksum, and no file but the named ones is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.metadata import parse_width
from ddk_pipe.pipeline.storage import LOCK, Folder, settle_writes

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
CHUNK = np.dtype([("start", "<u8"), ("length", "<u4"), ("check", "<u4")])  # of one window and array
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
    try:
        outer = zarr.open_group(folder, mode="a", zarr_format=3, attributes=dict(attributes[""]))
        for group, about in attributes.items():
            if group:
                outer.create_group(group, attributes=dict(about))
        for name, values in arrays.items():
            _write_array(outer, name, values)
    except BaseException:
        settle_writes()
        raise


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
    (optional) the crc32c that each window of each array was committed with, uint32 [windows], `metadata` (optional) the
    content of every zarr.json by name, where the caller has read them. `learnt`: what another reader of the same files
    had `learnt`, in place of all these; nothing is read then.
    Raises ValueError naming the file for anything that is not as expected, FileNotFoundError for a missing file.
    May be used from several threads at once.
    """

    def __init__(
        self,
        folder: Folder,
        group: str,
        *,
        windows: int,
        expected: Mapping[str, Expected],
        files: Mapping[str, int] | None = None,
        checks: Mapping[str, NDArray[np.uint32]] | None = None,
        metadata: Mapping[str, bytes] | None = None,
        learnt: bytes | None = None,
    ) -> None:
        with LOCK:  # numcodecs makes its lock at the first use; a process forked in that moment would hang
            getattr(numcodecs.blosc, "get_mutex", lambda: None)()
        self._folder, self._checked, self.windows = folder, checks is not None or learnt is not None, windows
        widths = (
            _widths(folder, group, windows, expected, metadata)
            if learnt is None
            else _learnt_widths(learnt, len(expected))
        )
        self._arrays = [
            _Array(name, f"{group}/{array_files(name)[1]}", wanted.dtype, width)
            for (name, wanted), width in zip(expected.items(), widths, strict=True)
        ]
        if learnt is None:
            sizes = [(files or {})[array_files(name)[1]] for name in expected]
            indexes = _read_indexes(folder, self._arrays, windows, sizes)
            self._chunks = _chunks(self._arrays, indexes, checks)
        else:
            self._chunks = np.frombuffer(learnt, CHUNK, windows * len(expected)).reshape(windows, -1)

    @property
    def learnt(self) -> bytes:
        """All that was read to open it: 16 bytes a window and array, and 4 an array."""
        widths = np.array([array.width for array in self._arrays], "<u4")
        return self._chunks.tobytes() + widths.tobytes()

    def places(self) -> dict[str, NDArray[np.uint32]]:
        """The width of each array, then the bytes of each window's chunk, [1 + windows]: with the checks all that
        `learnt` is made of, where chunks lie one after the other as zarr writes them. Empty where they do not."""
        ends = np.cumsum(self._chunks["length"], axis=0, dtype=np.uint64)
        if (self._chunks["start"] != ends - self._chunks["length"]).any():
            return {}
        return {
            array.name: np.concatenate([[array.width], lengths]).astype(np.uint32)
            for array, lengths in zip(self._arrays, self._chunks["length"].T, strict=True)
        }

    def read(self, row: int) -> Arrays:
        """The arrays of one window, each [width]."""
        if not 0 <= row < self.windows:
            raise IndexError(f"row {row} of {self.windows}")
        chunks = self._chunks[row].tolist()
        files = [
            (array.file, start, length)
            for array, (start, length, _) in zip(self._arrays, chunks, strict=True)
        ]
        out = {}
        contents = self._folder.read_many(files)
        for array, content, (_, _, check) in zip(self._arrays, contents, chunks, strict=True):
            try:
                out[array.name] = array.unpack(content, row, check if self._checked else None)
            except ValueError as problem:
                raise ValueError(f"{self._folder.name}/{array.file}: {problem}") from None
        return out

    def checks(self) -> dict[str, NDArray[np.uint32]]:
        """The crc32c of every window as it stands in the files, uint32 [windows] by array (not computed anew)."""
        out = {}
        for array, chunks in zip(self._arrays, self._chunks.T, strict=True):
            ends = (chunks["start"] + chunks["length"]).tolist()
            parts = self._folder.read_ranges(array.file, [(end - CHECK_BYTES, CHECK_BYTES) for end in ends])
            out[array.name] = np.frombuffer(b"".join(parts), "<u4").astype(np.uint32)
        return out


@dataclass(frozen=True, slots=True)
class _Array:
    name: str
    file: str
    dtype: np.dtype[Any]
    width: int

    def unpack(self, content: bytes, row: int, check: int | None) -> NDArray[Any]:
        """The values of a chunk."""
        body, stored = content[:-CHECK_BYTES], int.from_bytes(content[-CHECK_BYTES:], "little")
        if google_crc32c.value(body) != stored or check not in (None, stored):
            raise ValueError(f"row {row} fails its checksum")
        out = np.empty(self.width, self.dtype)
        try:
            _check_blosc(body, out)
            numcodecs.blosc.decompress(body, out)
        except (ValueError, RuntimeError) as problem:
            raise ValueError(f"row {row}: {problem}") from None
        return out


def _check_blosc(body: bytes, out: NDArray[Any]) -> None:
    """What blosc says about itself, before it unpacks anything."""
    version, _, flags, typesize, unpacked, _, packed = BLOSC_HEADER.unpack_from(body)
    if (version, typesize, unpacked, packed) != (2, out.dtype.itemsize, out.nbytes, len(body)):
        raise ValueError(f"unpacks to {unpacked} bytes, expected {out.nbytes}")
    if flags >> 5 != BLOSC_ZSTD and not flags & BLOSC_STORED:
        raise ValueError("not compressed by zstd")


def _widths(
    folder: Folder,
    group: str,
    windows: int,
    expected: Mapping[str, Expected],
    metadata: Mapping[str, bytes] | None,
) -> list[int]:
    """Values a window of each array, as its zarr.json says."""
    widths = []
    for name, wanted in expected.items():
        described = array_files(name)[0]
        where = f"{group}/{described}"
        content = folder.read(where) if metadata is None else metadata[described]
        widths.append(_width(content, windows, wanted, name=f"{folder.name}/{where}"))
    return widths


def learnt_of(places: list[NDArray[np.uint32]], checks: list[NDArray[np.uint32]]) -> bytes:
    """What a ShardReader of these arrays has `learnt`, from its `places` and the checks it was given."""
    widths, *lengths = np.stack(places, axis=1)
    chunks = np.zeros((len(lengths), len(places)), CHUNK)
    chunks["length"], chunks["check"] = lengths, np.stack(checks, axis=1)
    chunks["start"] = np.cumsum(chunks["length"], axis=0, dtype=np.uint64) - chunks["length"]
    return bytes(chunks.tobytes() + widths.astype("<u4").tobytes())


def _learnt_widths(learnt: bytes, arrays: int) -> list[int]:
    widths: list[int] = np.frombuffer(learnt[-4 * arrays :], "<u4").tolist()
    return widths


def _chunks(
    arrays: list[_Array],
    indexes: list[NDArray[np.uint64]],
    checks: Mapping[str, NDArray[np.uint32]] | None,
) -> NDArray[Any]:
    """CHUNK [windows, arrays]: where each lies, and what it was committed with."""
    chunks = np.zeros((len(indexes[0]), len(arrays)), CHUNK)
    for column, (array, index) in enumerate(zip(arrays, indexes, strict=True)):
        chunks["start"][:, column], chunks["length"][:, column] = index.T
        if checks is not None:
            chunks["check"][:, column] = checks[array.name]
    return chunks


def _width(content: bytes, windows: int, expected: Expected, *, name: str) -> int:
    width = parse_width(content, windows, expected.dtype, name=name)
    if not expected.least <= width <= expected.most or width * expected.dtype.itemsize > MOST_CHUNK_BYTES:
        raise ValueError(f"{name}: {width} values a window, expected {expected.least} to {expected.most}")
    return width


def _read_indexes(
    folder: Folder, arrays: list[_Array], windows: int, sizes: list[int]
) -> list[NDArray[np.uint64]]:
    """The index at the end of each array's shard file, of which `sizes` are the bytes."""
    index_bytes = windows * 16 + CHECK_BYTES
    for array, size in zip(arrays, sizes, strict=True):
        if size < index_bytes:
            raise ValueError(f"{folder.name}/{array.file}: too short for an index of {windows} windows")
    places = zip(arrays, sizes, strict=True)
    contents = folder.read_many([(array.file, size - index_bytes, index_bytes) for array, size in places])
    return [
        _parse_index(content, windows, size - index_bytes, array, name=f"{folder.name}/{array.file}")
        for content, array, size in zip(contents, arrays, sizes, strict=True)
    ]


def _parse_index(content: bytes, windows: int, end: int, array: _Array, *, name: str) -> NDArray[np.uint64]:
    """uint64 [windows, 2]: start and bytes of every chunk, before `end` and of a size that can be right."""
    if google_crc32c.value(content[:-CHECK_BYTES]) != int.from_bytes(content[-CHECK_BYTES:], "little"):
        raise ValueError(f"{name}: the index fails its checksum")
    index = np.frombuffer(content[:-CHECK_BYTES], "<u8").reshape(windows, 2)
    starts, lengths = index.T
    if (starts == MISSING).any():
        raise ValueError(f"{name}: row {int((starts == MISSING).argmax())} is missing")
    most = (
        array.width * array.dtype.itemsize + BLOSC_HEADER.size + CHECK_BYTES
    )  # blosc stores what it cannot shrink
    least = BLOSC_HEADER.size + CHECK_BYTES
    if ((lengths < least) | (lengths > most) | (starts > end) | (starts + lengths > end)).any():
        raise ValueError(f"{name}: the index points outside the file")
    return index
