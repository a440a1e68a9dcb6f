"""Where bytes lie: files that are whole or not there, local folders and object stores behind one protocol.

Everything else in the project reads and writes through these; `durable` is the part that knows disks alone.
"""

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.storage.local import LocalFolder, is_inside
from ddk_pipe.pipeline.storage.locks import LOCK
from ddk_pipe.pipeline.storage.object_store import ObjectFolder
from ddk_pipe.pipeline.storage.opening import is_url, open_folder
from ddk_pipe.pipeline.storage.protocol import OUTSIDE, Folder, digest_of
from ddk_pipe.pipeline.storage.read_ahead import prefetch
from ddk_pipe.pipeline.storage.settling import settle_writes

__all__ = [
    "LOCK",
    "OUTSIDE",
    "Folder",
    "LocalFolder",
    "ObjectFolder",
    "digest_of",
    "durable",
    "is_inside",
    "is_url",
    "open_folder",
    "prefetch",
    "settle_writes",
]
