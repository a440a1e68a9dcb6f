"""What a cache says it is: cache.json, the rank tables, and how domains are cut into shards.

cache.json may come from a stranger: every value is checked for its type and size before it is used.
"""

from __future__ import annotations

import errno
import io
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, durable
from ddk_pipe.pipeline.targets import LEVELS, LOG_STEPS, Plan, Ranks
from ddk_pipe.pipeline.text import SPLITS, Split

SCHEMA_VERSION = 2
QUANTISER = f"{LEVELS} cells uniform in p^(1/4); log codes of 1/{LOG_STEPS} nat"
REPAIR = "run `ddk-pipe verify {cache} --repair`, then `ddk-pipe cache-teacher` again"
RESTORE = "restore it, or make the cache again"
# What a file system says of damage; anything else (no permission, too many files) is not the cache's fault.
DAMAGE_ERRNOS = (errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT)
MOST_JSON_BYTES = 16 << 20  # parsed, JSON may take 24 times its bytes
MOST_SHARDS = 1 << 20  # of a cache
MOST_SHARD_WINDOWS = manifest.MOST_SHARD_WINDOWS
Text = Annotated[str, Field(max_length=256)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]


def repair(folder: Folder) -> str:
    """The hint of every error about a damaged shard."""
    return REPAIR.format(cache=folder.name)


def read_json(folder: Folder, name: str, *, hint: str = RESTORE) -> bytes:
    """A small file; raises DdkError if it is suspiciously large or damaged, FileNotFoundError if it is not there."""
    try:
        return folder.read(name, most=MOST_JSON_BYTES)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise unreadable(folder, name, problem, hint=hint) from None
    except ValueError as problem:
        raise DdkError(str(problem), hint=hint) from None


def unreadable(folder: Folder, name: str, problem: OSError, *, hint: str) -> Exception:
    """A system error as the DdkError of a damaged file; as it is where it says nothing about the file."""
    if problem.errno not in DAMAGE_ERRNOS:
        return problem
    where = problem.filename or f"{folder.name}/{name}"
    return DdkError(f"{where}: cannot be read ({problem.strerror})", hint=hint)


@dataclass(frozen=True)
class SplitSize:
    """How one split is cut: `windows` in shards of `shard_windows`; `tokens_digest` fixes their content."""

    windows: int
    shard_windows: int
    tokens_digest: str

    @property
    def shards(self) -> int:
        return -(-self.windows // self.shard_windows)


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

    def identity(self) -> dict[str, Any]:
        """Everything that decides what a shard holds, without the list of domains (which may grow)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "teacher": self.teacher,
            "tokenizer_digest": self.tokenizer_digest,
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "selection": self.plan.settings(),
            "quantiser": QUANTISER,
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


class Strict(pydantic.BaseModel):
    """JSON from a stranger: exact types, finite numbers."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


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
    if version != SCHEMA_VERSION:
        raise DdkError(
            f"{path}: schema version {str(version)[:20]}, this program reads {SCHEMA_VERSION}",
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
class Shard:
    """A run of windows of one domain and split: the unit of teacher work, of commit and of retry."""

    domain: str
    split: str
    number: int
    first_window: int
    windows: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.split}/{self.number:05d}"

    @property
    def record(self) -> str:
        """Name of its commit record."""
        return f"{self.name}.json"

    def key(self, window: int) -> str:
        """Names a window for the draws of the selection."""
        return f"{self.domain}/{self.split}/{self.number}/{window}"


def shard_of(domain: str, split: str, size: SplitSize, number: int) -> Shard:
    """Shard `number` of a split; the last may be short."""
    start = number * size.shard_windows
    return Shard(domain, split, number, start, min(size.shard_windows, size.windows - start))


def shards_of(domain: str, split: str, size: SplitSize) -> list[Shard]:
    """The shards of a split in order."""
    return [shard_of(domain, split, size, number) for number in range(size.shards)]


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


def split_size(split: Split, shard_windows: int) -> SplitSize:
    """How a prepared split is cut into shards."""
    return SplitSize(split.facts.windows, shard_windows, split.facts.digest)


def uncommitted(folder: Folder, shards: list[Shard]) -> list[Shard]:
    """Those without a commit record, in order; one listing per split."""
    there = {
        name
        for place in {f"{shard.domain}/{shard.split}" for shard in shards}
        for name in folder.files(place)
    }
    return [shard for shard in shards if shard.record not in there]
