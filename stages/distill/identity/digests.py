"""Digests of model folders without reading gigabytes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.models import weights_digest, weights_files
from ddk_pipe.pipeline.storage import durable


class Digests:
    """`weights_digest`, remembered for as long as the files keep their names, sizes, times and places on the disk.

    The time of the last change to a file's entry (ctime) is among them, which copying with old times does not keep.
    """

    def __init__(self, known: dict[str, dict[str, str]] | None = None) -> None:
        self.known = dict(known or {})  # folder -> {"stamp": ..., "digest": ...}

    def of(self, folder: Path) -> str:
        """Digest of the model in a folder; read only if its files are others than those that are remembered."""
        folder = folder.resolve()
        stamp = _stamp(folder)
        found = self.known.get(str(folder), {})
        if found.get("stamp") != stamp:
            found = {"stamp": stamp, "digest": weights_digest(folder)}
            self.known[str(folder)] = found
        return found["digest"]


def _stamp(folder: Path) -> str:
    facts: list[Any] = []
    for path in weights_files(folder):
        about = path.stat()
        name = path.relative_to(folder).as_posix()
        facts.append([name, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    return durable.digest(durable.to_json(facts))
