"""One process at a time in a folder: a lock that the system frees when its holder is gone, however that ended."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common.progress import say

LOCK_FILE = "lock"
PATIENCE_SECONDS = 2.0  # for one that was killed a moment ago and still lets go of its memory


@contextmanager
def alone(folder: Path, *, what: str, hint: str) -> Iterator[None]:
    """Inside, no other process is in `alone` of this folder. Raises DdkError saying that another process `what`.

    By flock, on the file `lock`: where the file system has no locks, that is said, and nothing is locked.
    """
    durable.make_folder(folder)
    handle = _opened(folder / LOCK_FILE)
    try:
        if not _locked(handle, folder):
            raise DdkError(f"{folder}: another process {what}", hint=hint)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        if problem.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise DdkError(f"{path}: a link or a folder, where a lock is to be", hint="remove it") from None


def _locked(handle: int, folder: Path) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        except OSError as problem:
            say(
                f"{folder}: its file system has no locks ({problem.strerror}), so see to it that nobody else is here"
            )
            return True
        else:
            return True
