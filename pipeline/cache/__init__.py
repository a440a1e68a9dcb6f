"""The cache on disk: what it says it is, its shards, and who writes, reads and verifies them.

Only committed shards exist for readers, and nothing doubtful is ever returned.
"""

from ddk_pipe.pipeline.cache.dataset import CachedWindows, DomainBatches, collate
from ddk_pipe.pipeline.cache.joining import planned, require_attention
from ddk_pipe.pipeline.cache.reader import CacheReader
from ddk_pipe.pipeline.cache.record import ShardRecord, committed, group_of, is_input, require_record
from ddk_pipe.pipeline.cache.report import Report, SplitReport
from ddk_pipe.pipeline.cache.shards import Shard, SplitSize, shards_of, split_size, uncommitted
from ddk_pipe.pipeline.cache.spec import SCHEMA_VERSIONS, CacheSpec, all_shards, read_spec
from ddk_pipe.pipeline.cache.verification import verify
from ddk_pipe.pipeline.cache.windows import CachedWindow
from ddk_pipe.pipeline.cache.writer import CacheWriter

__all__ = [
    "SCHEMA_VERSIONS",
    "CacheReader",
    "CacheSpec",
    "CacheWriter",
    "CachedWindow",
    "CachedWindows",
    "DomainBatches",
    "Report",
    "Shard",
    "ShardRecord",
    "SplitReport",
    "SplitSize",
    "all_shards",
    "collate",
    "committed",
    "group_of",
    "is_input",
    "planned",
    "read_spec",
    "require_attention",
    "require_record",
    "shards_of",
    "split_size",
    "uncommitted",
    "verify",
]
