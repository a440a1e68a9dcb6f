"""The rank table of each domain, and the codecs that are made of it."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from ddk_pipe.pipeline.cache.damage import RESTORE, unreadable
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LOCK, Folder, durable
from ddk_pipe.pipeline.targets import Codec, Ranks

KEPT_BYTES = 1 << 30  # of rank tables, 4 for every id: those of 1,000 domains of 262,144 ids


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


@dataclass(frozen=True)
class _Table:
    """A domain's rank table, its digest, and the codecs that share it, by slot."""

    ranks: Ranks
    digest: str
    codecs: dict[int, Codec] = field(default_factory=dict)


class Codecs:
    """The codecs of a cache, one for each domain and temperature.

    Rank tables are read when first needed; those used last are kept, KEPT_BYTES of them. May be used from several
    threads at once.
    """

    def __init__(self, folder: Folder, spec: CacheSpec) -> None:
        self.folder, self.spec = folder, spec
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._digests: dict[str, str] = {}  # of all tables that were ever read

    def of(self, domain: str, slot: int) -> tuple[Codec, str]:
        """The codec of the slot-th temperature, and its table's digest; raises DdkError without a table."""
        table = self._table(domain)
        codec = table.codecs.get(slot)
        if codec is None:
            temperature, label_rests = self.spec.plan.temperatures[slot], self.spec.schema_version > 2
            codec = Codec(self.spec.plan, table.ranks, temperature, label_rests=label_rests)
            table.codecs[slot] = codec
        return codec, table.digest

    def _table(self, domain: str) -> _Table:
        """Two threads may read the same one, the second of them in vain."""
        with LOCK:
            if domain in self._tables:
                self._tables.move_to_end(domain)
                return self._tables[domain]
        ranks = read_ranks(self.folder, domain, self.spec.vocab_size)
        table = _Table(ranks, ranks_digest(ranks))
        if self._digests.setdefault(domain, table.digest) != table.digest:
            name = f"{self.folder.name}/{ranks_name(domain)}"
            raise DdkError(f"{name}: another table than a moment ago", hint=RESTORE)
        with LOCK:
            self._tables[domain] = table
            while len(self._tables) > max(1, KEPT_BYTES // (4 * self.spec.vocab_size)):
                self._tables.popitem(last=False)
        return table
