"""Is one shard what its commit record says: its files, its windows, its statistics?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ddk_pipe.pipeline.cache.damage import damage, repair
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import ShardRecord, group_of, require_record
from ddk_pipe.pipeline.cache.shards import Shard
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.cache.windows import ShardWindows, open_windows
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, digest_of
from ddk_pipe.pipeline.targets import NO_LABEL


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
