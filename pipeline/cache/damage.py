"""What counts as damage of a cache, and how it is said: which file, and the way back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import OUTSIDE, Folder

REPAIR = "run `ddk-pipe verify {cache} --repair`, then `ddk-pipe cache-teacher` again"
RESTORE = "restore it, or make the cache again"
# What a file system says of damage; anything else (no permission, too many files) is not the cache's fault.
DAMAGE_ERRNOS = (errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT)


def repair(folder: Folder) -> str:
    """The hint of every error about a damaged shard."""
    return REPAIR.format(cache=folder.name)


def unreadable(folder: Folder, name: str, problem: OSError, *, hint: str) -> Exception:
    """A system error as the DdkError of a damaged file; as it is where it says nothing about the file."""
    if problem.errno not in DAMAGE_ERRNOS:
        return problem
    where = problem.filename or f"{folder.name}/{name}"
    return DdkError(f"{where}: cannot be read ({problem.strerror})", hint=hint)


@contextmanager
def damage(folder: Folder, group: str) -> Iterator[None]:
    """What is wrong inside a shard becomes a DdkError that names it and the repair."""
    where = f"{folder.name}/{group}"
    try:
        yield
    except FileNotFoundError as problem:
        name = str(problem.filename or problem).removesuffix(": not there")
        raise DdkError(f"{name}: committed but missing", hint=repair(folder)) from None
    except KeyError as problem:
        raise DdkError(f"{where}: its commit record lacks {problem}", hint=repair(folder)) from None
    except ValueError as problem:
        text = str(problem) if str(problem).startswith(folder.name) else f"{where}: {problem}"
        raise DdkError(text, hint=repair(folder)) from None
    except OSError as problem:
        raise unreadable(folder, group, problem, hint=repair(folder)) from None


def blame(folder: Folder, problem: DdkError | OSError) -> str:
    """What damaged files are blamed for; raises `problem` where it says nothing about the cache itself."""
    if isinstance(problem, DdkError):
        if problem.hint not in (repair(folder), RESTORE, OUTSIDE):
            raise problem
        return problem.message
    if problem.errno not in DAMAGE_ERRNOS:
        raise problem
    return f"{problem.filename or folder.name}: cannot be read ({problem.strerror})"
