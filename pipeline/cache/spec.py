"""What a cache is, and what its cache.json says of it.

    cache.json                                    what made it: teacher, tokenizer, scheme, ... and its fingerprint
    <domain>/ranks.npy                            token ids by how often the teacher keeps them, int32 [vocab_size]
    <domain>/<split>/<shard>.<8 hex digits>.zarr  one group per shard, readable by plain zarr.open:
        tokens        u16 or u32 [windows, seq_len]
        labels        u16 [windows, 4 + seq_len]  window number (4 words, low first), label log-probability codes;
                                                  code 65535 at t: token t+1 is no label
        starts        u8 [windows, seq_len]       1 where a document begins (attention: document; else not there)
        t<i>/<plane>  [windows, widest]           the codec's planes of the i-th temperature, rows filled up with zeros
    <domain>/<split>/<shard>.json                 the commit record: names the group; digest of every file, checksum of
                                                  every window, statistics, fingerprint

Chunk = one window, one shard file per array, stock codecs that end in crc32c. The commit record is created last and
exclusively: only committed shards exist for readers, and writers who race cannot touch each other's files.

cache.json may come from a stranger: every value is checked for its type and size before it is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.cache.damage import RESTORE
from ddk_pipe.pipeline.cache.shards import Shard, SplitSize, shards_of
from ddk_pipe.pipeline.cache.strict_json import Strict, Text, read_json
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, durable
from ddk_pipe.pipeline.targets import LEVELS, LOG_STEPS, Plan
from ddk_pipe.pipeline.text import SPLITS

SCHEMA_VERSION = 3
# 4 is 3 with documents that do not see each other, which a reader of 3 must not take for whole windows
SCHEMA_VERSIONS = {"window": SCHEMA_VERSION, "document": 4}
# 2 had no codes of the rest in the rows of likely labels, and label codes to the nearest
READABLE = (2, *SCHEMA_VERSIONS.values())
QUANTISER = f"{LEVELS} cells uniform in p^(1/4); log codes of 1/{LOG_STEPS} nat"
MOST_SHARDS = 1 << 20  # of a cache
MOST_SHARD_WINDOWS = manifest.MOST_SHARD_WINDOWS
Size = Annotated[int, Field(ge=1, le=1 << 24)]


@dataclass(frozen=True)
class CacheSpec:
    """What cache.json says. Two specs with one fingerprint hold interchangeable targets."""

    teacher: dict[str, Any]  # weights digest and dtype
    tokenizer_digest: str
    vocab_size: int
    seq_len: int
    plan: Plan
    domains: dict[str, dict[str, SplitSize]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # for people: the model's name, versions
    attention: manifest.Attention = "window"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if (self.attention == "document") != (self.schema_version == SCHEMA_VERSIONS["document"]):
            raise ValueError(f"schema version {self.schema_version} of attention: {self.attention}")

    def identity(self) -> dict[str, Any]:
        """Everything that decides what a shard holds, without the list of domains (which may grow)."""
        return {
            "schema_version": self.schema_version,
            "teacher": self.teacher,
            "tokenizer_digest": self.tokenizer_digest,
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "selection": self.plan.settings(),
            "quantiser": QUANTISER,
            **(
                {"attention": self.attention} if self.attention != "window" else {}
            ),  # none: as in older caches
        }

    @property
    def fingerprint(self) -> str:
        return durable.digest(durable.to_json(self.identity()))

    def to_json(self) -> bytes:
        domains = {
            name: {split: vars(size) for split, size in splits.items()}
            for name, splits in self.domains.items()
        }
        body = {**self.identity(), "plan": self.plan.to_dict(), "domains": domains, "about": self.about}
        return durable.sealed({**body, "fingerprint": self.fingerprint})


class _SplitFile(Strict):
    windows: Annotated[int, Field(ge=0, le=MOST_SHARDS * MOST_SHARD_WINDOWS)]
    shard_windows: Annotated[int, Field(ge=1, le=MOST_SHARD_WINDOWS)]
    tokens_digest: Text


DomainName = Annotated[str, Field(pattern=f"^{manifest.DOMAIN_NAME.pattern}$")]


class _SpecFile(Strict):
    """cache.json."""

    schema_version: int
    teacher: dict[str, Any]
    tokenizer_digest: Text
    vocab_size: Size
    seq_len: Annotated[int, Field(ge=1, le=manifest.MOST_SEQ_LEN)]
    selection: dict[str, Any]
    quantiser: Text
    plan: dict[str, Any]
    domains: dict[DomainName, dict[str, _SplitFile]]
    about: dict[str, Any]
    fingerprint: Text
    attention: manifest.Attention = "window"
    seal: Text  # the fingerprint leaves out the domains: a flipped bit of a size would hide windows

    def spec(self) -> CacheSpec:
        """Raises ValueError for values that no writer writes."""
        if any(split not in SPLITS for splits in self.domains.values() for split in splits):
            raise ValueError("unknown split")
        spec = CacheSpec(
            teacher=self.teacher,
            tokenizer_digest=self.tokenizer_digest,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            plan=Plan.of(
                manifest.Cache.model_validate(self.plan)
            ),  # the bounds of the manifest hold here too
            domains={
                name: {split: SplitSize(**size.model_dump()) for split, size in splits.items()}
                for name, splits in self.domains.items()
            },
            about=self.about,
            attention=self.attention,
            schema_version=self.schema_version,
        )
        if count_shards(spec) > MOST_SHARDS:
            raise ValueError("too many shards")
        return spec


def read_spec(folder: Folder) -> CacheSpec:
    """Raises DdkError if `folder` holds no cache, one of another schema version, or an edited cache.json."""
    path = f"{folder.name}/cache.json"
    try:
        values = json.loads(read_json(folder, "cache.json"))
    except FileNotFoundError:
        raise DdkError(f"{folder.name}: no teacher cache", hint="run `ddk-pipe cache-teacher`") from None
    except (ValueError, RecursionError):
        raise DdkError(f"{path}: not JSON", hint=RESTORE) from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, bool) or version not in READABLE:
        listed = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
        raise DdkError(
            f"{path}: schema version {str(version)[:20]}, this program reads {listed}",
            hint="use the ddk-pipe that wrote it, or make the cache again",
        )
    try:
        spec = _SpecFile.model_validate(values).spec()
        intact = bool(json.loads(spec.to_json()) == values)
    except (ValueError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DdkError(f"{path}: damaged or edited by hand", hint=RESTORE)
    return spec


def all_shards(spec: CacheSpec) -> list[Shard]:
    """Every shard that the cache should have: validation first, then the domains in turn."""
    splits = [
        shards_of(domain, split, sizes[split])
        for split in reversed(SPLITS)
        for domain, sizes in spec.domains.items()
        if split in sizes
    ]
    return [shard for shards in splits for shard in shards]


def count_shards(spec: CacheSpec) -> int:
    return sum(size.shards for sizes in spec.domains.values() for size in sizes.values())
