"""Files that are either whole or not there, also after a power loss."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError


def partial_name(path: Path) -> Path:
    """A hidden name beside `path` under which it is written before it gets its own."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a system error that names no file (a full disk says so only when bytes are written) names `path`.

    So does one of a library in Rust (safetensors, tokenizers), which is an exception of its own with words such as
    "No space left on device (os error 28)".
    """
    try:
        yield
    except OSError as problem:
        if problem.filename is None:
            problem.filename = str(path)
        raise
    except Exception as problem:
        number = re.search(r"\(os error (\d+)\)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """mkdir -p whose new entries survive a power loss."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_file(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Write `path` whole; with `exclusive` raise FileExistsError if somebody was first."""
    make_folder(path.parent)
    partial = partial_name(path)
    try:
        with naming(path), open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def publish_file(partial: Path, final: Path) -> None:
    """Give a finished file its name, in place of one that has it."""
    _sync(partial)
    os.replace(partial, final)
    sync_folder(final.parent)


def publish_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its name; raises OSError if a non-empty folder of that name exists."""
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    os.rename(partial, final)
    sync_folder(final.parent)


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, so equal values have equal digests."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def sealed(values: dict[str, Any]) -> bytes:
    """Canonical JSON of `values` and of "seal", a digest of all the rest."""
    return to_json({**values, "seal": digest(to_json(values))})


def digest(content: bytes) -> str:
    """BLAKE2b of 128 bits, as hexadecimal text."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """digest() of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds `folder`, or will hold it."""
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    return shutil.disk_usage(existing).free


def need_space(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Raise DdkError if the disk that will hold `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DdkError(
            f"{folder}: {what} needs about {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            hint="free some space, or set another folder",
        )


def explain(problem: OSError) -> DdkError | None:
    """The user's view of a system error that is theirs to mend (no space, no permission), else None."""
    path = problem.filename or "the output folder"
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return DdkError(f"{path}: no space left on the disk", hint="free some and run the same command again")
    if problem.errno == errno.EFBIG:
        return DdkError(
            f"{path}: larger than a file may be there", hint="raise `ulimit -f`, or set another folder"
        )
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DdkError(
            f"{path}: no permission to write there", hint="change its mode, or set another folder"
        )
    if problem.errno in (errno.ENOTDIR, errno.EEXIST):
        return DdkError(f"{path}: a file stands where a folder is needed", hint="set another folder")
    return None
