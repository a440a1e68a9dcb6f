"""One shard of a cache: its commit record, its windows, and the checks that both hold what they say.

Commit records and arrays may come from a stranger. Whatever is wrong with them is a DdkError that names the file and
the repair; nothing in them can make code run, lead outside the cache, or ask for more memory than the cache's own
vocabulary and seq_len justify.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from ddk_pipe.pipeline.cache.arrays import Arrays, Expected, ShardReader, array_files
from ddk_pipe.pipeline.cache.spec import (
    MOST_SHARD_WINDOWS,
    RESTORE,
    CacheSpec,
    Shard,
    Strict,
    Text,
    all_shards,
    ranks_digest,
    ranks_name,
    read_json,
    read_ranks,
    repair,
    uncommitted,
    unreadable,
)
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, digest_of, durable
from ddk_pipe.pipeline.targets import (
    MOST_ENTRIES,
    NO_LABEL,
    NO_LOG,
    Codec,
    Context,
    Planes,
    SparseTargets,
    decode_log,
)

STAMP_WORDS = 4  # u16 words that hold the window number
GROUP = re.compile(r"(\d{5,})\.[0-9a-f]{8}\.zarr")
FOREIGN = "commit record of another cache"
MOST_METADATA_BYTES = 1 << 16  # of a zarr.json
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class FileFacts(Strict):
    """Size and BLAKE2b of one file of a shard."""

    bytes: Count
    blake2b: Text


class ShardRecord(Strict):
    """The commit record of a shard: it exists, and these are its content and its statistics."""

    model_config = pydantic.ConfigDict(extra="allow")  # more facts for people

    schema_version: int
    fingerprint: Text
    domain: Text
    split: Text
    number: Count
    first_window: Count
    windows: Annotated[int, Field(ge=1, le=MOST_SHARD_WINDOWS)]
    ranks_digest: Text  # of the table that the ids are coded with
    group: Text  # the folder beside the record that holds the arrays
    files: Annotated[dict[Text, FileFacts], Field(max_length=4096)]  # by name inside the group
    checks: dict[Text, str]  # by array: the crc32c of each window's chunk, eight hex digits each
    positions: Count  # with a label
    entries: Count
    label_nats: float  # minus the sum of the labels' log-probabilities
    target_bytes: Count
    input_bytes: Count  # tokens
    teacher: dict[str, Any] = Field(default_factory=dict)  # what predicted it
    seconds: float = 0.0

    def sealed(self) -> bytes:
        """The record as its file: canonical JSON that ends in a digest of itself."""
        return durable.sealed(self.model_dump(mode="json"))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name inside the group."""
        return {name: facts.bytes for name, facts in self.files.items()}


def parse_record(content: bytes, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """Raises ValueError saying what is wrong with it."""
    try:
        values = json.loads(content)
        seal = values.pop("seal")
        intact = seal == durable.digest(durable.to_json(values))
        record = ShardRecord.model_validate(values)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError("damaged commit record") from None
    if not intact:
        raise ValueError("damaged commit record")
    if record.fingerprint != spec.fingerprint:
        raise ValueError(FOREIGN)
    named = GROUP.fullmatch(record.group)
    if any(getattr(record, name) != value for name, value in vars(shard).items()):
        raise ValueError("commit record of another shard")
    if named is None or int(named[1]) != shard.number:
        raise ValueError("commit record names the group of another shard")
    positions = shard.windows * spec.seq_len
    most_entries = positions * spec.vocab_size * len(spec.plan.temperatures)
    if record.positions > positions or record.entries > most_entries:
        raise ValueError("commit record with impossible numbers")
    if any(name.startswith("/") or ".." in name.split("/") for name in record.files):
        raise ValueError("commit record that leads outside")
    return record


def read_record(folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord | None:
    """The commit record of a shard, None if it is not committed; raises DdkError if it is damaged or foreign."""
    try:
        return parse_record(read_json(folder, shard.record, hint=repair(folder)), shard, spec)
    except FileNotFoundError:
        return None
    except ValueError as problem:
        raise DdkError(f"{folder.name}/{shard.record}: {problem}", hint=repair(folder)) from None


def require_record(folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """The commit record; raises DdkError if there is none."""
    record = read_record(folder, shard, spec)
    if record is None:
        raise DdkError(f"{folder.name}/{shard.record}: not committed", hint="run `ddk-pipe cache-teacher`")
    return record


def committed(folder: Folder, spec: CacheSpec) -> Iterator[tuple[Shard, ShardRecord]]:
    """Committed shards and their records."""
    shards = all_shards(spec)
    missing = set(uncommitted(folder, shards))
    for shard in shards:
        record = None if shard in missing else read_record(folder, shard, spec)
        if record is not None:
            yield shard, record


def group_of(shard: Shard, record: ShardRecord) -> str:
    """Name of a committed shard's group inside the cache."""
    return f"{shard.domain}/{shard.split}/{record.group}"


# --- windows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedWindow:
    """One window as a student needs it: tokens, labels int64 [seq_len] (-100: none), label_logprobs float32
    [seq_len] in nats (NaN without a label), targets of seq_len positions at one temperature."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_logprobs: NDArray[np.float32]
    targets: SparseTargets


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def input_arrays(spec: CacheSpec) -> dict[str, Expected]:
    """The arrays of a shard that do not depend on a temperature."""
    tokens, labels = spec.seq_len, STAMP_WORDS + spec.seq_len
    return {
        "tokens": Expected(token_dtype(spec.vocab_size), tokens, tokens),
        "labels": Expected(np.dtype("u2"), labels, labels),
    }


def target_arrays(spec: CacheSpec, codec: Codec, slot: int) -> dict[str, Expected]:
    """The codec's planes of the slot-th temperature."""
    most = max(min(spec.seq_len * spec.vocab_size, MOST_ENTRIES), spec.seq_len)
    return {f"t{slot}/{name}": Expected(dtype, 1, most) for name, dtype in codec.planes.items()}


class ShardWindows:
    """Reads the windows of one shard at one temperature (the slot-th); raises ValueError, FileNotFoundError."""

    def __init__(
        self,
        folder: Folder,
        group: str,
        shard: Shard,
        spec: CacheSpec,
        codec: Codec,
        slot: int,
        sizes: Mapping[str, int],
        checks: Mapping[str, NDArray[np.uint32]] | None = None,
        metadata: Mapping[str, bytes] | None = None,
    ) -> None:
        self.shard, self._spec, self._codec, self._slot = shard, spec, codec, slot
        self.arrays = ShardReader(
            folder,
            group,
            windows=shard.windows,
            files=sizes,
            expected={**input_arrays(spec), **target_arrays(spec, codec, slot)},
            checks=checks,
            metadata=metadata,
        )

    def read(self, window: int) -> CachedWindow:
        """`window` counts within the split."""
        arrays = self.arrays.read(window - self.shard.first_window)
        if int(arrays["labels"][:STAMP_WORDS].astype("<u2").view("<u8")[0]) != window:
            raise ValueError(f"window {window} holds another window")
        tokens, codes = arrays["tokens"].astype(np.int64), arrays["labels"][STAMP_WORDS:]
        if int(tokens.max()) >= self._spec.vocab_size:
            raise ValueError(f"window {window} holds a token outside the vocabulary")
        labels = _labels(tokens, codes)
        return CachedWindow(
            tokens=tokens,
            labels=labels,
            label_logprobs=decode_log(codes, none=np.nan),
            targets=self._targets(arrays, Context(labels, codes, self.shard.key(window))),
        )

    def _targets(self, arrays: Arrays, context: Context) -> SparseTargets:
        prefix = f"t{self._slot}/"
        planes: Planes = {
            name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)
        }
        targets = self._codec.decode(planes, context)
        if targets.positions != self._spec.seq_len:
            raise ValueError(f"targets of {targets.positions} positions")
        return targets


def _labels(tokens: NDArray[np.int64], codes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Position t is to predict token t+1 where its log-probability was stored."""
    if codes[-1] != NO_LOG:
        raise ValueError("a label behind the last token")
    return np.where(codes == NO_LOG, NO_LABEL, np.roll(tokens, -1))


class Codecs:
    """The codecs of a cache, one for each domain and temperature; rank tables are read once, when first needed."""

    def __init__(self, folder: Folder, spec: CacheSpec) -> None:
        self.folder, self.spec = folder, spec
        self._codecs: dict[tuple[str, int], tuple[Codec, str]] = {}

    def of(self, domain: str, slot: int) -> tuple[Codec, str]:
        """The codec of the slot-th temperature, and its table's digest; raises DdkError without a table."""
        if (domain, slot) not in self._codecs:
            ranks = read_ranks(self.folder, domain, self.spec.vocab_size)
            codec = Codec(self.spec.plan, ranks, self.spec.plan.temperatures[slot])
            self._codecs[domain, slot] = codec, ranks_digest(ranks)
        return self._codecs[domain, slot]


def open_windows(
    folder: Folder, shard: Shard, record: ShardRecord, spec: CacheSpec, codecs: Codecs, slot: int
) -> ShardWindows:
    """A committed shard at one temperature, its metadata files compared with the record; raises DdkError."""
    group = group_of(shard, record)
    codec, digest = codecs.of(shard.domain, slot)
    if digest != record.ranks_digest:
        raise DdkError(
            f"{folder.name}/{ranks_name(shard.domain)}: not the table that {shard.name} was coded with",
            hint=RESTORE,
        )
    with damage(folder, group):
        names = [*input_arrays(spec), *target_arrays(spec, codec, slot)]
        small = ["zarr.json", f"t{slot}/zarr.json", *(array_files(array)[0] for array in names)]
        contents = folder.each(lambda name: _read_small(folder, f"{group}/{name}", record.files[name]), small)
        checks = {name: _checks(record.checks[name], shard.windows) for name in names}
        return ShardWindows(
            folder,
            group,
            shard,
            spec,
            codec,
            slot,
            record.sizes,
            checks,
            dict(zip(small, contents, strict=True)),
        )


def _read_small(folder: Folder, name: str, facts: FileFacts) -> bytes:
    content = folder.read(name, most=MOST_METADATA_BYTES)
    if durable.digest(content) != facts.blake2b:
        raise ValueError(f"{folder.name}/{name}: not what was committed")
    return content


def _checks(text: str, windows: int) -> NDArray[np.uint32]:
    if len(text) != 8 * windows:
        raise ValueError("commit record without a checksum for every window")
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)


def checks_text(checks: NDArray[np.uint32]) -> str:
    """Eight hex digits a window, as the commit record holds them."""
    return checks.astype(">u4").tobytes().hex()


@contextmanager
def damage(folder: Folder, group: str) -> Iterator[None]:
    """What is wrong inside a shard becomes a DdkError that names it and the repair."""
    where = f"{folder.name}/{group}"
    try:
        yield
    except FileNotFoundError as problem:
        name = str(problem.filename or problem).removesuffix(": not there")
        raise DdkError(f"{name}: committed but missing", hint=repair(folder)) from None
    except KeyError as problem:
        raise DdkError(f"{where}: its commit record lacks {problem}", hint=repair(folder)) from None
    except ValueError as problem:
        text = str(problem) if str(problem).startswith(folder.name) else f"{where}: {problem}"
        raise DdkError(text, hint=repair(folder)) from None
    except OSError as problem:
        raise unreadable(folder, group, problem, hint=repair(folder)) from None


# --- checks of a whole shard ----------------------------------------------------------------------


def check_shard(folder: Folder, shard: Shard, spec: CacheSpec) -> ShardRecord:
    """Compare every file of a shard with its commit record; returns the record. Raises DdkError."""
    record = require_record(folder, shard, spec)
    group = group_of(shard, record)
    found = set(folder.names(f"{group}/"))
    for name, facts in record.files.items():
        path = f"{group}/{name}"
        with damage(folder, group):
            if path not in found:
                raise FileNotFoundError(f"{folder.name}/{path}")
            if folder.size(path) != facts.bytes or digest_of(folder, path) != facts.blake2b:
                raise ValueError(f"{folder.name}/{path}: not what was committed")
    unexpected = found - {f"{group}/{name}" for name in record.files}
    if unexpected:
        raise DdkError(f"{folder.name}/{min(unexpected)}: was never committed", hint=repair(folder))
    return record


@dataclass(frozen=True)
class ShardFacts:
    """Statistics of a shard: labelled positions, entries over all temperatures, -sum of label log-probabilities.

    They are taken from what readers decode, so that they can be taken again: label_nats is a multiple of 1/2048.
    """

    positions: int
    entries: int
    label_nats: float


def measure(slots: list[ShardWindows], spec: CacheSpec) -> ShardFacts:
    """Decode every window of a shard at every temperature; raises ValueError for one that breaks an invariant."""
    positions, entries, label_nats = 0, 0, 0.0
    for slot, windows in enumerate(slots):
        first = windows.shard.first_window
        for number in range(first, first + windows.shard.windows):
            window = windows.read(number)
            window.targets.validate(spec.vocab_size)
            entries += int((window.targets.ids >= 0).sum())
            if slot == 0:
                positions += int((window.labels != NO_LABEL).sum())
                label_nats -= float(np.nansum(window.label_logprobs, dtype=np.float64))
    return ShardFacts(positions, entries, label_nats)


def verify_shard(folder: Folder, shard: Shard, spec: CacheSpec, codecs: Codecs) -> ShardFacts:
    """Everything that can be known about a committed shard: digests of all files, every window decoded, its number
    and the invariants of SparseTargets, and the record's statistics, taken again. Raises DdkError."""
    record = check_shard(folder, shard, spec)
    slots = [
        open_windows(folder, shard, record, spec, codecs, slot) for slot in range(len(spec.plan.temperatures))
    ]
    with damage(folder, group_of(shard, record)):
        facts = measure(slots, spec)
        for name, value in vars(facts).items():
            stated = getattr(record, name)
            if stated != value and not (name == "label_nats" and math.isclose(stated, value, abs_tol=1e-9)):
                raise ValueError(f"{name} is {value}, its commit record says {stated}")
    return facts
