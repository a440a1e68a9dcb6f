"""File systems of a test's own, in memory, that can be filled up."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path


def mounted(path: Path, options: str) -> bool:
    """Mount a file system in memory of its own; False where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "ddk-pipe-test", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def remount(path: Path, options: str) -> None:
    """Change its options, such as its size."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def unmount(path: Path) -> None:
    """Let go of it, also while a file of it is open."""
    subprocess.run(["umount", "-l", str(path)], check=True)


def leave_bytes(disk: Path, free: int) -> None:
    """Fill the disk up with one file until `free` bytes are left, or none: what else writes there may be faster."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    try:
        filler.write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - free)))
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise


def leave_files(disk: Path, free: int) -> None:
    """The same with names: the disk has room for `free` more files."""
    fillers = disk / "fillers"
    fillers.mkdir(exist_ok=True)
    for path in fillers.iterdir():
        path.unlink()
    for number in range(os.statvfs(disk).f_favail - free):
        (fillers / str(number)).touch()
