"""Random windows of a cache by its number of shards, to a million: CPU a window, memory a shard, requests a window.

    PYTHONPATH=benchmarks python benchmarks/cache_shards.py [--json OUT] [--only PART] [--scratch DIR] [--rounds 5]

shards     a thousand to a million shards of one window, in a store in memory that answers as one with so many would
           (endless.py). What a reader knows of a shard that it opened before is put into it, not found by opening a million:
           a few are opened, and must give the same bytes
forgotten  ten thousand of these with the reader's bound lowered, so that it knows all, half or none of them; and shards
           that it never opened
disk       shards of hard links (their labels and records are their own), read in turn: up to 30,000
s3         moto's server in a process of its own, no real S3: requests of a window of a shard that is known, and of one
           that was forgotten
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from common import Row, alternate, fresh_process, goal, report

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from cache_read import FAR, HEAP, Counting, Load, cache_at, cpu_row, moto, resident, setup
from endless import GROUP, Endless
from read_material import DOMAIN, SPLIT

from ddk_pipe.pipeline.cache import CacheReader
from ddk_pipe.pipeline.cache import reader as reading
from ddk_pipe.pipeline.cache.shards import shard_of
from ddk_pipe.pipeline.storage import Folder, open_folder

PARTS = ("shards", "forgotten", "disk", "s3")
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
ON_DISK = (1_000, 10_000, 30_000)
REAL = (8, 1)  # shards and windows of each, that stand for all
TRIED = (0, 1, 7, 8, 501, 999)  # shards that are opened, to hold that they are known as they were put in
READS = 200  # of a round
FLAT = 0.2


class Known(Load):
    """A reader of so many shards, all of which it knows."""

    def __init__(self, scratch: Path, shards: int, *, known: int | None = None) -> None:
        self.store = Endless(cache_at(scratch, REAL), REAL[0], shards)
        super().__init__(cast(Folder, self.store), shards)
        self.size, self.limit = self.reader.size(DOMAIN, SPLIT), shards
        self.put_in(shards if known is None else known)

    def put_in(self, shards: int) -> None:
        opener = CacheReader(cast(Folder, self.store), 1.0)
        templates = [opener._windows(shard_of(DOMAIN, SPLIT, self.size, k))[1].arrays for k in range(REAL[0])]
        for number in range(shards):
            template = templates[number % REAL[0]]
            known = bytes.fromhex(GROUP) + self.store.learnt(template.learnt, template, number)
            self.reader._keep(shard_of(DOMAIN, SPLIT, self.size, number), known)
        for number in (number for number in TRIED if number < shards):
            shard = shard_of(DOMAIN, SPLIT, self.size, number)
            opener.read(DOMAIN, SPLIT, number)
            assert opener._known[shard.name] == self.reader._known[shard.name]


def shards_part(arguments: argparse.Namespace) -> None:
    loads = {count: Known(arguments.scratch, count) for count in COUNTS}
    before = {count: load.store.requests for count, load in loads.items()}
    calls: dict[str, Callable[[], Any]] = {
        str(count): partial(load.some, READS) for count, load in loads.items()
    }
    found = alternate(calls, arguments.rounds)
    rows = [cpu_row(f"{count} shards", seconds, READS) for count, seconds in found.items()]
    for row, (count, load) in zip(rows, loads.items(), strict=True):
        row["requests_per_window"] = (load.store.requests - before[count]) / (READS * (arguments.rounds + 1))
    memory = fresh_process(__file__, "--memory", str(COUNTS[-1]), "--scratch", str(arguments.scratch), **HEAP)
    rows.append({"name": f"memory of {COUNTS[-1]} shards of a window that are known", **memory})
    report(rows, [flat(rows[:-1], "shards")], arguments.json, part="shards", setup=setup(), reads=READS)


def memory(scratch: Path, shards: int) -> Row:
    """Bytes that a reader grows by; to be called in a process that has done nothing else."""
    load = Known(scratch, 1_000)
    load.some(READS)
    gc.collect()
    before = resident()
    grown = Known(scratch, shards)
    gc.collect()
    total = resident() - before
    return {
        "bytes_per_shard": total / shards,
        "megabytes": total * 1e-6,
        "counted_bytes": grown.reader._known_bytes,
    }


def flat(rows: list[Row], of: str) -> Row:
    costs = [row["cpu_microseconds_per_window_median"] for row in rows]
    rise = max(costs) / costs[0] - 1
    first, last = rows[0]["name"].split()[0], rows[-1]["name"].split()[0]
    return goal(f"cost per window, {first} to {last} {of}", "flat within 20%", f"{rise:.1%}", rise <= FLAT)


def forgotten_part(arguments: argparse.Namespace) -> None:
    count, rows = 10_000, []
    kinds = {
        "known": 1.0,
        "half of them known, all opened before": 0.5,
        "opened before": 0.0,
        "never opened": 0.0,
    }
    for kind, share in kinds.items():
        load = Known(arguments.scratch, count)
        for number in range(count if kind != "never opened" else 0):
            load.reader._opened.add(shard_of(DOMAIN, SPLIT, load.size, number), load.store.record(number))
        with bound(load.reader, int(load.reader._known_bytes * share)):
            load.some(READS)
            asked = load.store.requests
            found = alternate({"": partial(load.some, READS)}, arguments.rounds)
        row = cpu_row(f"{count} shards, {kind}", found[""], READS)
        row["requests_per_window"] = (load.store.requests - asked) / (READS * (arguments.rounds + 1))
        rows.append(row)
    known, _, before = (row["cpu_microseconds_per_window_median"] for row in rows[:3])
    rise = before / known - 1
    goals = [goal("cost per window, known to forgotten", "flat within 20%", f"{rise:.1%}", rise <= FLAT)]
    report(rows, goals, arguments.json, part="forgotten", setup=setup(), reads=READS)


@contextmanager
def bound(reader: CacheReader, kept_bytes: int) -> Iterator[None]:
    """The reader forgets what is beyond, and keeps to that."""
    before, reading.KEPT_BYTES = reading.KEPT_BYTES, kept_bytes
    name, known = next(iter(reader._known.items()))
    reader._keep(shard_of(DOMAIN, SPLIT, reader.size(DOMAIN, SPLIT), int(name.rsplit("/", 1)[1])), known)
    yield
    reading.KEPT_BYTES = before


def disk_part(arguments: argparse.Namespace) -> None:
    folder = cache_at(arguments.scratch, (ON_DISK[-1], 1), link=True)
    loads = {count: Load(folder, count) for count in ON_DISK}
    for load in loads.values():
        load.open_all()
    calls: dict[str, Callable[[], Any]] = {
        str(count): partial(load.some, READS) for count, load in loads.items()
    }
    found = alternate(calls, arguments.rounds)
    rows = [cpu_row(f"{count} shards on a disk", seconds, READS) for count, seconds in found.items()]
    goals = [flat(rows, "shards on a disk")]
    report(rows, goals, arguments.json, part="disk", setup=setup(), reads=READS, links="hard links")


def s3_part(arguments: argparse.Namespace) -> None:
    local = cache_at(arguments.scratch, FAR)
    rows: list[Row] = []
    shards, windows = FAR
    with moto() as url:
        far = open_folder(url)
        for name in local.names():
            far.write(name, local.read(name))
        for name, kept_bytes in (("known", reading.KEPT_BYTES), ("forgotten", 1)):
            folder, numbers = Counting(url), random.Random(0)
            load = Load(folder, shards * windows)
            load.open_all()
            with bound(load.reader, kept_bytes):
                before = folder.requests
                for turn in range(READS):  # never the shard of the window before
                    window = turn % shards * windows + numbers.randrange(windows)
                    load.reader.read(DOMAIN, SPLIT, window)
            row: Row = {"name": f"shards {name}", "requests_per_window": (folder.requests - before) / READS}
            rows.append(row)
    goals = [
        goal(
            f"S3 requests a window, {row['name']}",
            "<= 3",
            row["requests_per_window"],
            row["requests_per_window"] <= 3,
        )
        for row in rows
    ]
    report(rows, goals, arguments.json, part="s3", server="moto, a process of its own: no real S3")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/ddk-cache-read"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.memory:
        print(json.dumps(memory(arguments.scratch, arguments.memory)))
    else:
        for name in [arguments.only] if arguments.only else PARTS:
            globals()[f"{name}_part"](arguments)


if __name__ == "__main__":
    main()
