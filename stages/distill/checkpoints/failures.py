"""What a user is told of a checkpoint that cannot be written or read."""

from __future__ import annotations

import errno
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable

FULL_BYTES = 1 << 20  # a write that failed for want of space has taken all but this


def not_written(final: Path, problem: BaseException) -> DdkError:
    """Of a checkpoint: a full disk in the system's words, or else torch's, with the room that is left."""
    problem, told = cause(problem), None
    if isinstance(problem, DdkError):
        return problem
    free = durable.free_bytes(final.parent)
    if isinstance(problem, RuntimeError) and free < FULL_BYTES:  # "unexpected pos" of torch's own writer
        problem = OSError(errno.ENOSPC, "No space left on device")
    if isinstance(problem, OSError):
        problem.filename = str(final)
        told = durable.explain(problem)
    return told or DdkError(
        f"{final}: the checkpoint cannot be written ({last_line(problem)}; {free / 1e6:,.1f} MB free there)",
        hint="free some space or mend the disk, and run the same command again; earlier checkpoints are kept",
    )


def cause(problem: BaseException) -> BaseException:
    """What went wrong on the first rank that failed: DCP's own exception is no Exception, and wraps it."""
    if isinstance(problem, CheckpointException):
        for wrapped, _ in problem.failures.values():
            return wrapped
    return problem


def damaged(folder: Path, problem: BaseException) -> DdkError:
    return DdkError(
        f"{folder}: the checkpoint cannot be read ({last_line(problem)})",
        hint="delete that folder to go on from the checkpoint before it, or from the start",
    )


def last_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[-1][:200] if lines else type(problem).__name__
