"""A folder in an object store, reached through obstore.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, ...), as
obstore reads them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.storage.locks import LOCK
from ddk_pipe.pipeline.storage.protocol import check_size, parts_of

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
UPLOADS = 8  # files of a shard under way at once
REQUESTS = 32  # reads of one object store under way at once, of all threads together
RETRY_SECONDS = "DDK_PIPE_RETRY_SECONDS"  # environment: how long a request to an object store is retried


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
            raise DdkError(f"{self.name}: obstore is not installed", hint=install_hint("s3")) from None
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

        parts_of(self, name)
        with self._asking(name):
            answer = obstore.get(self._store, name)  # the content comes with bytes()
            check_size(self, name, int(answer.meta["size"]), most)
            return bytes(answer.bytes())

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many([(name, start, length) for start, length in ranges])

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        for name in {name for name, _, _ in parts}:
            parts_of(self, name)
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

        parts_of(self, name)
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

        parts_of(self, folder)
        with self._asking(folder, writing=True):
            listed = obstore.list_with_delimiter(self._store, folder)
        return sorted(item["path"] for item in listed["objects"])

    def write(self, name: str, content: bytes) -> None:
        import obstore

        parts_of(self, name)
        with self._asking(name, writing=True):
            obstore.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> None:
        import obstore

        parts_of(self, name)
        with self._asking(name, writing=True):
            obstore.put(self._store, name, content, mode="create")

    def publish(self, local_folder: Path, name: str) -> None:
        import obstore

        parts_of(self, name)
        files = [path for path in local_folder.rglob("*") if path.is_file()]

        def upload(path: Path) -> None:
            target = f"{name}/{path.relative_to(local_folder).as_posix()}"
            with self._asking(target, writing=True):
                obstore.put(self._store, target, path)

        with ThreadPoolExecutor(UPLOADS) as pool:
            list(pool.map(upload, files))

    def remove(self, name: str) -> None:
        import obstore

        parts_of(self, name)
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
