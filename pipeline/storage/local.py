"""A folder on a disk, with the files that were read last kept open."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.storage.locks import LOCK
from ddk_pipe.pipeline.storage.protocol import check_size, leads_outside, parts_of

OPEN_FILES = 256  # a local folder keeps open for read_ranges, well below the usual limit of 1024 a process
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe among a stranger's files must not hang us
FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


def is_inside(path: Path, folder: Path) -> bool:
    """True if `path`, with all links followed, lies in `folder`."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._open_files = _OpenFiles(OPEN_FILES)

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay behind
        return LocalFolder, (self.path,)

    def _path(self, name: str) -> Path:
        return self.path.joinpath(*parts_of(self, name))

    def _existing(self, name: str) -> Path:
        """Raises DdkError for a symbolic link out of the folder."""
        path = self._path(name)
        if not is_inside(path, self.path):
            raise leads_outside(self, name)
        return path

    def _changeable(self, name: str) -> Path:
        """Raises DdkError where a stranger's link would make us write or remove outside of the folder."""
        path = self._path(name)
        if not is_inside(path.parent, self.path):
            raise leads_outside(self, name)
        return path

    def _open(self, name: str) -> _File:
        path = self._existing(name)
        try:
            file = _File(os.open(path, FILE))
        except OSError as problem:
            if problem.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._open_files.clear()  # too many are open, and these can be opened again
            file = _File(os.open(path, FILE))
        if not file.is_regular():
            raise FileNotFoundError(f"{self.name}/{name}: not a file")
        return file

    def _open_quickly(self, name: str) -> _File:
        """The same at a fifth of the cost where no link is on the way, as in a shard: windows at random open seven each."""
        try:
            file = _File(_open_without_links(self.name, parts_of(self, name)))
        except OSError:
            return self._open(name)  # which follows a link that stays inside, or says what is wrong
        return file if file.is_regular() else self._open(name)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        file = self._open(name)  # never a kept one: small files may be replaced
        size = os.fstat(file.handle).st_size
        check_size(self, name, size, most)
        return file.read(0, size)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many([(name, start, length) for start, length in ranges])

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self._read_part(*part) for part in parts]

    def each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(map(call, items))

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        files = self._open_files
        content = (files.get(name) or files.put(name, self._open_quickly(name))).read(start, length)
        if len(content) != length:
            raise ValueError(f"{self.name}/{name}: ends too early")
        return content

    def size(self, name: str) -> int:
        return self._existing(name).stat().st_size

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self, prefix: str = "") -> list[str]:
        above, _, start = prefix.rpartition("/")
        base = self._path(above) if above else self.path
        found = []
        for entry in sorted(base.iterdir()) if base.is_dir() else []:
            if not entry.name.startswith(start) or entry.name.endswith(".partial"):
                continue
            if entry.is_dir() and not entry.is_symlink():  # a link is listed as it stands, never followed
                found += _below(entry)
            else:
                found.append(entry)
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def files(self, folder: str) -> list[str]:
        base = self._path(folder)
        with os.scandir(base) if base.is_dir() else _nothing() as entries:
            return sorted(f"{folder}/{entry.name}" for entry in entries if entry.is_file())

    def write(self, name: str, content: bytes) -> None:
        durable.write_file(self._changeable(name), content)
        self._open_files.clear()

    def create(self, name: str, content: bytes) -> None:
        durable.write_file(self._changeable(name), content, exclusive=True)

    def publish(self, local_folder: Path, name: str) -> None:
        final = self._changeable(name)
        durable.make_folder(final.parent)
        durable.publish_folder(local_folder, final)

    def remove(self, name: str) -> None:
        path = self._changeable(name)
        self._open_files.clear()
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # another writer may be removing the same leftovers
        else:
            path.unlink(missing_ok=True)

    def scratch(self) -> Path:
        durable.make_folder(self.path)
        folder = self.path / f".scratch.{uuid.uuid4().hex[:8]}.partial"  # same disk: publish is a rename
        folder.mkdir()
        return folder


class _File:
    """An open file that closes itself when the last thread lets go of it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)

    def is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self.handle).st_mode)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the end of the file."""
        content = os.pread(self.handle, length, start)
        while len(content) < length and (
            more := os.pread(self.handle, length - len(content), start + len(content))
        ):
            content += more  # one pread returns at most 2 GB
        return content


def _open_without_links(folder: str, parts: list[str]) -> int:
    """A handle of the file at these parts of a path below the folder; raises OSError where one of them is a link."""
    at = os.open(folder, FOLDER)
    for part, flags in zip(parts, [FOLDER] * (len(parts) - 1) + [FILE], strict=True):
        try:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    return at


class _OpenFiles:
    """The files used last, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _File] = OrderedDict()

    def get(self, name: str) -> _File | None:
        with LOCK:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)

    def put(self, name: str, file: _File) -> _File:
        with LOCK:
            self._files[name] = file
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file

    def clear(self) -> None:
        with LOCK:
            self._files.clear()


def _below(folder: Path) -> list[Path]:
    """Files and links at any depth; what another writer removes meanwhile is left out."""
    return [
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(place, name)))]
    ]


@contextmanager
def _nothing() -> Iterator[list[os.DirEntry[str]]]:
    yield []
