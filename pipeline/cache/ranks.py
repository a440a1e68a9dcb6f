"""The rank table of each domain, and the codecs that are made of it."""

from __future__ import annotations

import io

import numpy as np

from ddk_pipe.pipeline.cache.damage import RESTORE, unreadable
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, durable
from ddk_pipe.pipeline.targets import Codec, Ranks


def ranks_digest(ranks: Ranks) -> str:
    """Of a rank table; every commit record holds that of the table its shard was coded with."""
    return durable.digest(ranks.id_of.astype("<i4").tobytes())


def ranks_bytes(ranks: Ranks) -> bytes:
    """Content of ranks.npy."""
    return _npy_header(len(ranks.id_of)) + ranks.id_of.astype("<i4").tobytes()


def _npy_header(length: int) -> bytes:
    """What numpy.save puts before an array int32 [length]."""
    buffer = io.BytesIO()
    about = {"descr": "<i4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, about)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def ranks_name(domain: str) -> str:
    """Name of a domain's rank table in the cache."""
    return f"{domain}/ranks.npy"


def read_ranks(folder: Folder, domain: str, vocab_size: int) -> Ranks:
    """A domain's table; raises DdkError if it is missing or no table for this vocabulary. Shards name its digest."""
    name = ranks_name(domain)
    path = f"{folder.name}/{name}"
    header = _npy_header(vocab_size)  # compared, never parsed: numpy evaluates a stranger's header
    try:
        content = folder.read(name, most=len(header) + 4 * vocab_size)
        if not content.startswith(header) or len(content) != len(header) + 4 * vocab_size:
            raise ValueError(f"not {vocab_size} ids")
        return Ranks.of(np.frombuffer(content, "<i4", offset=len(header)).astype(np.int32))
    except FileNotFoundError:
        raise DdkError(f"{path}: missing", hint=RESTORE) from None
    except OSError as problem:
        raise unreadable(folder, name, problem, hint=RESTORE) from None
    except ValueError as problem:
        raise DdkError(f"{path}: not the table of this cache ({problem})", hint=RESTORE) from None


class Codecs:
    """The codecs of a cache, one for each domain and temperature; rank tables are read once, when first needed."""

    def __init__(self, folder: Folder, spec: CacheSpec) -> None:
        self.folder, self.spec = folder, spec
        self._codecs: dict[tuple[str, int], tuple[Codec, str]] = {}

    def of(self, domain: str, slot: int) -> tuple[Codec, str]:
        """The codec of the slot-th temperature, and its table's digest; raises DdkError without a table."""
        if (domain, slot) not in self._codecs:
            ranks = read_ranks(self.folder, domain, self.spec.vocab_size)
            temperature, label_rests = self.spec.plan.temperatures[slot], self.spec.schema_version > 2
            codec = Codec(self.spec.plan, ranks, temperature, label_rests=label_rests)
            self._codecs[domain, slot] = codec, ranks_digest(ranks)
        return self._codecs[domain, slot]
