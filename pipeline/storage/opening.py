"""From an address, a path or a URL, to the folder behind it."""

from __future__ import annotations

from pathlib import Path

from ddk_pipe.pipeline.storage.local import LocalFolder
from ddk_pipe.pipeline.storage.object_store import ObjectFolder
from ddk_pipe.pipeline.storage.protocol import Folder


def open_folder(place: str | Path) -> Folder:
    """A path or a URL such as s3://bucket/prefix; raises DdkError for a URL of another kind."""
    if isinstance(place, str) and "://" in place:
        return ObjectFolder(place)
    return LocalFolder(Path(place))


def is_url(text: str) -> bool:
    """True for what open_folder takes as a URL."""
    return "://" in text
