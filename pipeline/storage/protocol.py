"""What a folder is to everything else in the project, the names of its files, and what goes for any kind of it.

Names are relative, parts joined by "/". No name leads out of its folder: "..", absolute names and (on a disk)
symbolic links that point elsewhere are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ddk_pipe.pipeline.errors import DdkError

PIECE_BYTES = 16 << 20  # read at once when a file is hashed
OUTSIDE = "do not use this cache, or make it again"


class Folder(Protocol):
    """What the cache needs of a place. Files are written whole or not at all.

    Raises FileNotFoundError for a name that is not there, DdkError for a name that leads outside and for a
    store that cannot be reached. All methods may be called from several threads at once.
    """

    name: str  # for messages: path or URL

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """The whole file; raises ValueError, before reading it, if it has more than `most` bytes."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (start, length); raises ValueError where the file ends before."""

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The same of several files: the bytes of each (name, start, length)."""

    def each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """call(item) of every item, in order; all at once where the files are far. `call` uses neither this nor
        read_many. Raises what the first item that fails raised."""

    def size(self, name: str) -> int:
        """Bytes of the file."""

    def exists(self, name: str) -> bool:
        """True if there is a file of this name."""

    def names(self, prefix: str = "") -> list[str]:
        """All files, at any depth, whose name starts with `prefix` (any text, not only a folder), sorted."""

    def files(self, folder: str) -> list[str]:
        """Names (with `folder` in front) of the files right in `folder`, not of those below it; sorted."""

    def write(self, name: str, content: bytes) -> None:
        """Put the file there, in place of an earlier one."""

    def create(self, name: str, content: bytes) -> None:
        """Put the file there; raises FileExistsError if somebody was first."""

    def publish(self, local_folder: Path, name: str) -> None:
        """Give a finished folder made by scratch() its name, durably; the local one may be gone afterwards."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""

    def scratch(self) -> Path:
        """A new, empty local folder to build in; the caller removes it."""


def digest_of(folder: Folder, name: str) -> str:
    """durable.digest of a file of any size, read in pieces."""
    size = folder.size(name)
    hasher = hashlib.blake2b(digest_size=16)
    for start in range(0, size, PIECE_BYTES):
        hasher.update(folder.read_ranges(name, [(start, min(PIECE_BYTES, size - start))])[0])
    return hasher.hexdigest()


def parts_of(folder: Folder, name: str) -> list[str]:
    """The parts of a name; raises DdkError for one that leads outside of the folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise leads_outside(folder, name)
    return parts


def leads_outside(folder: Folder, name: str) -> DdkError:
    """The error to raise."""
    return DdkError(f"{folder.name}: {name!r} leads outside of it", hint=OUTSIDE)


def check_size(folder: Folder, name: str, size: int, most: int | None) -> None:
    """Raises ValueError for a file of more than `most` bytes."""
    if most is not None and size > most:
        raise ValueError(f"{folder.name}/{name}: {size:,} bytes, at most {most:,} make sense")
