"""Where a cache lives: a local folder or a prefix of an object store, behind one small protocol.

Names are relative, parts joined by "/". No name leads out of its folder: "..", absolute names and (on a disk)
symbolic links that point elsewhere are refused. Object stores are reached through obstore; credentials and
endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, ...), as obstore reads them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
OPEN_FILES = 256  # a local folder keeps open for read_ranges, well below the usual limit of 1024 a process
PIECE_BYTES = 16 << 20  # read at once when a file is hashed
UPLOADS = 8  # files of a shard under way at once
REQUESTS = 32  # reads of one object store under way at once, of all threads together
CHECKED_NAMES = 1 << 17  # of files that a local folder remembers to lie inside of it
OUTSIDE = "do not use this cache, or make it again"
RETRY_SECONDS = "DDK_PIPE_RETRY_SECONDS"  # environment: how long a request to an object store is retried

LOCK = threading.Lock()  # of whatever folders and readers keep; one for all, so that a fork can wait for it
os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


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


def open_folder(place: str | Path) -> Folder:
    """A path or a URL such as s3://bucket/prefix; raises DdkError for a URL of another kind."""
    if isinstance(place, str) and "://" in place:
        return ObjectFolder(place)
    return LocalFolder(Path(place))


def is_url(text: str) -> bool:
    """True for what open_folder takes as a URL."""
    return "://" in text


def digest_of(folder: Folder, name: str) -> str:
    """durable.digest of a file of any size, read in pieces."""
    size = folder.size(name)
    hasher = hashlib.blake2b(digest_size=16)
    for start in range(0, size, PIECE_BYTES):
        hasher.update(folder.read_ranges(name, [(start, min(PIECE_BYTES, size - start))])[0])
    return hasher.hexdigest()


def _parts(folder: Folder, name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise _outside(folder, name)
    return parts


def _outside(folder: Folder, name: str) -> DdkError:
    return DdkError(f"{folder.name}: {name!r} leads outside of it", hint=OUTSIDE)


def is_inside(path: Path, folder: Path) -> bool:
    """True if `path`, with all links followed, lies in `folder`."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _check_size(folder: Folder, name: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise ValueError(f"{folder.name}/{name}: {size:,} bytes, at most {most:,} make sense")


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
        return self.path.joinpath(*_parts(self, name))

    def _existing(self, name: str) -> Path:
        """Raises DdkError for a symbolic link out of the folder."""
        path = self._path(name)
        if not is_inside(path, self.path):
            raise _outside(self, name)
        return path

    def _changeable(self, name: str) -> Path:
        """Raises DdkError where a stranger's link would make us write or remove outside of the folder."""
        path = self._path(name)
        if not is_inside(path.parent, self.path):
            raise _outside(self, name)
        return path

    def _open(self, name: str) -> _File:
        return self._open_inside(name, self._existing(name))

    def _reopen(self, name: str) -> _File:
        """A file of a shard, which never changes: following all its links once, the dearest part, is enough."""
        if name in self._open_files.checked:
            return self._open_inside(name, f"{self.name}/{name}")
        file = self._open(name)
        self._open_files.checked.add(name)
        return file

    def _open_inside(self, name: str, path: str | Path) -> _File:
        # O_NONBLOCK: a pipe among a stranger's files must not hang us
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = _File(os.open(path, flags))
        except OSError as problem:
            if problem.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._open_files.clear()  # too many are open, and these can be opened again
            file = _File(os.open(path, flags))
        if not stat.S_ISREG(os.fstat(file.handle).st_mode):
            raise FileNotFoundError(f"{self.name}/{name}: not a file")
        return file

    def read(self, name: str, *, most: int | None = None) -> bytes:
        file = self._open(name)  # never a kept one: small files may be replaced
        size = os.fstat(file.handle).st_size
        _check_size(self, name, size, most)
        return file.read(0, size)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many([(name, start, length) for start, length in ranges])

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self._read_part(*part) for part in parts]

    def each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(map(call, items))

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        files = self._open_files
        content = (files.get(name) or files.put(name, self._reopen(name))).read(start, length)
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

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the end of the file."""
        content = os.pread(self.handle, length, start)
        while len(content) < length and (
            more := os.pread(self.handle, length - len(content), start + len(content))
        ):
            content += more  # one pread returns at most 2 GB
        return content


class _OpenFiles:
    """The files used last, at most `limit` of them, and the names that were found to lie inside the folder."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.checked: set[str] = set()
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
            if len(self.checked) > CHECKED_NAMES:
                self.checked.clear()
        return file

    def clear(self) -> None:
        with LOCK:
            self._files.clear()
            self.checked.clear()


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


class ObjectFolder:
    """A prefix of a bucket: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, abfs://container/prefix.

    Requests are retried for `retry_seconds` (default 30, or DDK_PIPE_RETRY_SECONDS). Any number of writers may
    race for create(): the store decides (a put that only succeeds where nothing is).
    """

    _process: int | None = None  # that has used obstore first

    def __init__(self, url: str, *, retry_seconds: float | None = None) -> None:
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise DdkError(
                f"{url}: unknown kind of address", hint=f"use a path, or one of {', '.join(SCHEMES)}://"
            )
        self.name = url.rstrip("/")
        self._retry_seconds = retry_seconds if retry_seconds is not None else _retry_seconds()
        self._store = self._connect()
        self._pool: ThreadPoolExecutor | None = None

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return _object_folder, (self.name, self._retry_seconds)

    def _check_process(self) -> None:
        """obstore's threads do not survive a fork: a child would wait for them without end."""
        if ObjectFolder._process not in (None, os.getpid()):
            raise DdkError(
                f"{self.name}: object stores cannot be used in a process that was forked off",
                hint="start processes by spawn or forkserver (multiprocessing.set_start_method)",
            )
        ObjectFolder._process = os.getpid()

    def _connect(self) -> Any:
        try:
            import obstore.store
        except ImportError:
            raise DdkError(
                f"{self.name}: obstore is not installed", hint='pip install "ddk-pipe[s3]"'
            ) from None
        retry: Any = {"retry_timeout": timedelta(seconds=self._retry_seconds)}
        # no client_options: they would replace what obstore reads from the environment (AWS_ALLOW_HTTP)
        with self._asking(""):
            return obstore.store.from_url(self.name, retry_config=retry)

    @contextmanager
    def _asking(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """Turns what obstore raises into FileNotFoundError, FileExistsError or a DdkError of one line."""
        from obstore import exceptions

        self._check_process()
        where = f"{self.name}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            if not writing:
                raise FileNotFoundError(f"{where}: not there") from None
            raise DdkError(f"{self.name}: no such bucket", hint="create it, or mend the address") from None
        except exceptions.AlreadyExistsError:
            raise FileExistsError(f"{where}: exists already") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as problem:
            raise DdkError(
                f"{where}: access refused ({_first_line(problem)})",
                hint="check the credentials in the environment, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ) from None
        except (exceptions.BaseError, OSError) as problem:
            raise DdkError(
                f"{where}: {_first_line(problem)}",
                hint="check network and endpoint (for S3 AWS_ENDPOINT_URL) and run the same command again",
            ) from None

    def read(self, name: str, *, most: int | None = None) -> bytes:
        import obstore

        _parts(self, name)
        with self._asking(name):
            answer = obstore.get(self._store, name)  # the content comes with bytes()
            _check_size(self, name, int(answer.meta["size"]), most)
            return bytes(answer.bytes())

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many([(name, start, length) for start, length in ranges])

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        for name in {name for name, _, _ in parts}:
            _parts(self, name)
        return self.each(lambda part: self._read_part(*part), parts)

    def each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        if len(items) == 1:
            return [call(items[0])]
        return list(self._requests().map(call, items))

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        import obstore

        try:
            with self._asking(name):  # not get_ranges: it panics where joined ranges end behind the object
                content = bytes(obstore.get_range(self._store, name, start=start, length=length))
        except DdkError:
            if start + length > self.size(name):  # stores answer 416, Range
                raise ValueError(f"{self.name}/{name}: ends too early") from None
            raise
        if len(content) != length:
            raise ValueError(f"{self.name}/{name}: ends too early")
        return content

    def _requests(self) -> ThreadPoolExecutor:
        """Threads that wait for the store, made when first needed."""
        self._check_process()
        with LOCK:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="requests")
            return self._pool

    def size(self, name: str) -> int:
        import obstore

        _parts(self, name)
        with self._asking(name):
            return int(obstore.head(self._store, name)["size"])

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, prefix: str = "") -> list[str]:
        import obstore

        above, _, start = prefix.rpartition("/")
        found = [prefix] if start and self.exists(prefix) else []  # an offset leaves out the name itself
        with self._asking(prefix, writing=True):
            pages = obstore.list(self._store, prefix=above or None, offset=prefix if start else None)
            for name in (item["path"] for page in pages for item in page):
                if not name.startswith(prefix):  # names come in order, so all that follow start otherwise too
                    break
                found.append(name)
        return sorted(found)

    def files(self, folder: str) -> list[str]:
        import obstore

        _parts(self, folder)
        with self._asking(folder, writing=True):
            listed = obstore.list_with_delimiter(self._store, folder)
        return sorted(item["path"] for item in listed["objects"])

    def write(self, name: str, content: bytes) -> None:
        import obstore

        _parts(self, name)
        with self._asking(name, writing=True):
            obstore.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> None:
        import obstore

        _parts(self, name)
        with self._asking(name, writing=True):
            obstore.put(self._store, name, content, mode="create")

    def publish(self, local_folder: Path, name: str) -> None:
        import obstore

        _parts(self, name)
        files = [path for path in local_folder.rglob("*") if path.is_file()]

        def upload(path: Path) -> None:
            target = f"{name}/{path.relative_to(local_folder).as_posix()}"
            with self._asking(target, writing=True):
                obstore.put(self._store, target, path)

        with ThreadPoolExecutor(UPLOADS) as pool:
            list(pool.map(upload, files))

    def remove(self, name: str) -> None:
        import obstore

        _parts(self, name)
        doomed = [name] * self.exists(name) + self.names(f"{name}/")
        if doomed:
            with self._asking(name, writing=True):
                obstore.delete(self._store, doomed)

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="ddk-pipe-"))


def _object_folder(url: str, retry_seconds: float) -> ObjectFolder:
    return ObjectFolder(url, retry_seconds=retry_seconds)


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_SECONDS, "30")
    try:
        return max(float(text), 0.0)
    except ValueError:
        raise DdkError(f"{RETRY_SECONDS}={text}: not a number of seconds", hint="set it to 30, say") from None


def _first_line(problem: Exception) -> str:
    """obstore's messages go on with pages of debug output."""
    line = (str(problem).splitlines() or [type(problem).__name__])[0].partition("<?xml")[0].rstrip(" :")
    return line if len(line) <= 300 else line[:297] + "..."
