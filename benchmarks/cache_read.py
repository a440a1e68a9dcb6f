"""Reading windows of a teacher cache at random: CPU a position, by the number of shards, threads and processes, and S3.

    PYTHONPATH=benchmarks python benchmarks/cache_read.py [--json OUT] [--only PART] [--scratch DIR] [--rounds 7]

The caches are drawn (read_material.py), kept in --scratch (2 GB) and made once: 10,000 shards of one window, all of
them files of their own, and 64 shards of 128 windows. "n shards" reads from the first n of the 10,000 in random order;
one window a shard is the worst case for what a reader keeps open. Everything lies in the page cache. CPU seconds are
the process's, page faults and system calls included; a core share is CPU seconds a position x 160,000.

shards   random windows of 10 to 10,000 shards that were opened before, in turn; what it costs to open a shard; memory
parts    128 windows a shard: the same, without decoding, and the same arrays by zarr itself
host     several threads, and several processes
s3       moto's server in a process of its own, which is no real S3: its latency is none, and its own speed (some 400
         requests/s) is the limit; so the same again with 20 ms added to each request before it is sent
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Row, alternate, fresh_process, goal, report, spread

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import s3
import torch
import zarr
from read_material import DOMAIN, SEQ_LEN, SPLIT, make_cache

from ddk_pipe.pipeline.cache import CacheReader, group_of, require_record, shards_of
from ddk_pipe.pipeline.storage import Folder, LocalFolder, ObjectFolder, open_folder

PARTS = ("shards", "parts", "host", "s3")
COUNTS = (10, 100, 1_000, 10_000)  # shards
MANY, DEEP, FAR = (10_000, 1), (64, 128), (8, 4)  # shards, windows in each
WANTED = 160_000  # positions a second and host
READS = 400  # of a round
# what prepare_cpu sets, for fresh_process (where it sets nothing)
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}
FAR_SECONDS = 0.02  # added to every request to be like a store that is far


def cache_at(scratch: Path, size: tuple[int, int], *, link: bool = False) -> LocalFolder:
    """The cache of that size, made if it is not there."""
    folder = LocalFolder(scratch / "{}x{}".format(*size))
    if not (folder.path / "made").exists():
        make_cache(folder, *size, link=link)
        (folder.path / "made").touch()
    return folder


class Load:
    """Reads random windows of the first `limit`."""

    def __init__(self, folder: Folder, limit: int, seed: int = 0) -> None:
        self.reader = CacheReader(folder, 1.0)
        self.size = self.reader.size(DOMAIN, SPLIT)
        self.limit = min(limit, self.size.windows)
        self.random = random.Random(seed)

    def some(self, reads: int = READS) -> None:
        for _ in range(reads):
            self.reader.read(DOMAIN, SPLIT, self.random.randrange(self.limit))

    def open_all(self) -> None:
        for window in range(0, self.limit, self.size.shard_windows):
            self.reader.read(DOMAIN, SPLIT, window)

    def in_threads(self, threads: int, reads: int = READS) -> None:
        numbers = [self.random.randrange(self.limit) for _ in range(reads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda number: self.reader.read(DOMAIN, SPLIT, number), numbers))


def cpu_row(name: str, seconds: list[float], reads: int = READS) -> Row:
    """CPU of rounds of `reads` windows."""
    micro = spread([1e6 * value / reads for value in seconds])
    row: Row = {"name": name, **{f"cpu_microseconds_per_window_{key}": value for key, value in micro.items()}}
    row["core_share_at_160k"] = micro["median"] * 1e-6 / SEQ_LEN * WANTED
    row["positions_per_cpu_second"] = SEQ_LEN / (micro["median"] * 1e-6)
    return row


# --- shards ---------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opened(folder: LocalFolder, shards: int) -> Row:
    """CPU and memory of opening shards; to be called in a process that has done nothing else."""
    Load(folder, 2).some(200)  # imports, heap and tables are there
    load = Load(folder, shards)
    load.some(1)
    before, began = resident(), time.process_time()
    load.open_all()
    total = time.process_time() - began
    grown, began = resident() - before, time.process_time()
    load.open_all()  # the same windows without opening
    opening = total - (time.process_time() - began)
    return {"microseconds": 1e6 * opening / shards, "bytes": grown / shards}


def shards_part(arguments: argparse.Namespace) -> None:
    folder = cache_at(arguments.scratch, MANY)
    loads = {count: Load(folder, count) for count in COUNTS}
    for load in loads.values():
        load.open_all()
    found = alternate({str(count): load.some for count, load in loads.items()}, arguments.rounds)
    rows = [cpu_row(f"{count} shards", seconds) for count, seconds in found.items()]
    costs = [
        fresh_process(__file__, "--opened", str(COUNTS[-1]), "--scratch", str(arguments.scratch), **HEAP)
        for _ in "123"
    ]
    rows.append(
        {
            "name": "opening a shard",
            **{
                f"cpu_microseconds_{k}": v
                for k, v in spread([cost["microseconds"] for cost in costs]).items()
            },
            **{f"memory_bytes_{k}": v for k, v in spread([cost["bytes"] for cost in costs]).items()},
        }
    )
    rows[-1]["memory_megabytes_of_10000"] = rows[-1]["memory_bytes_median"] * 1e-2
    report(rows, shards_goals(rows[: len(COUNTS)]), arguments.json, part="shards", setup=setup())


def shards_goals(rows: list[Row]) -> list[Row]:
    shares = [row["core_share_at_160k"] for row in rows]
    rise = max(shares) / min(shares) - 1
    return [
        goal(f">= 160k positions/s per host, {row['name']}", "<= 0.25 core", round(share, 3), share <= 0.25)
        for row, share in zip(rows, shares, strict=True)
    ] + [goal("cost per window, 10 to 10,000 shards", "flat within 20%", f"{rise:.1%}", rise <= 0.2)]


def setup() -> Row:
    return {
        "seq_len": SEQ_LEN,
        "scheme": "pps, tau 0.02, drawn softmaxes, 16.5 entries a position",
        "reads": READS,
    }


# --- parts ----------------------------------------------------------------------------------------


def parts_part(arguments: argparse.Namespace) -> None:
    folder = cache_at(arguments.scratch, DEEP, link=True)
    load = Load(folder, DEEP[0] * DEEP[1])
    load.open_all()
    calls: dict[str, Callable[[], None]] = {
        "read": load.some,
        "read without decoding": lambda: undecoded(load),
        "the same arrays by zarr": zarr_calls(folder, load, READS // 8),
    }
    found = alternate(calls, arguments.rounds)
    rows = [
        cpu_row(name, seconds, READS // 8 if "zarr" in name else READS) for name, seconds in found.items()
    ]
    report(rows, [], arguments.json, part="parts", setup=setup())


def undecoded(load: Load) -> None:
    """Arrays as ShardReader gives them: checked and unpacked."""
    shards = [load.reader._windows(shard)[1] for shard in shards_of(DOMAIN, SPLIT, load.size)]
    for _ in range(READS):
        load.random.choice(shards).arrays.read(load.random.randrange(load.size.shard_windows))


def zarr_calls(folder: LocalFolder, load: Load, reads: int) -> Callable[[], None]:
    """The same arrays of a window by zarr.Array, opened before."""
    groups = []
    for shard in shards_of(DOMAIN, SPLIT, load.size):
        record = require_record(folder, shard, load.reader.spec)
        group: Any = zarr.open_group(folder.path / group_of(shard, record), mode="r")
        groups.append([group[name] for name in record.checks])

    def call() -> None:
        for _ in range(reads):
            row = load.random.randrange(load.size.shard_windows)
            for array in load.random.choice(groups):
                array[row]

    return call


# --- host -----------------------------------------------------------------------------------------


def host_part(arguments: argparse.Namespace) -> None:
    folder = cache_at(arguments.scratch, MANY)
    rows = []
    for threads in (1, 2, 4, 8):
        load = Load(folder, 1_000)
        load.open_all()
        rows.append(timed(f"{threads} threads", lambda: load.in_threads(threads), arguments.rounds))  # noqa: B023
    for processes in (1, 2, 4):
        rows.append(in_processes(processes, arguments))
    report(rows, [], arguments.json, part="host", setup=setup(), cores=os.cpu_count())


def timed(name: str, call: Callable[[], None], rounds: int, reads: int = READS) -> Row:
    """Wall and CPU of rounds of `reads` windows."""
    call()
    walls, seconds = [], []
    for _ in range(rounds):
        began, cpu = time.monotonic(), time.process_time()
        call()
        walls.append(time.monotonic() - began)
        seconds.append(time.process_time() - cpu)
    rates = spread([reads / wall for wall in walls])
    return {
        **cpu_row(name, seconds, reads),
        **{f"windows_per_second_{key}": value for key, value in rates.items()},
    }


def in_processes(processes: int, arguments: argparse.Namespace) -> Row:
    """Readers of one cache in processes of their own, all at once."""
    options = ["--worker", str(arguments.rounds), "--scratch", str(arguments.scratch)]
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda _: fresh_process(__file__, *options, **HEAP), range(processes)))
    row = cpu_row(f"{processes} processes", [second for one in found for second in one["seconds"]])
    row["windows_per_second_together"] = sum(one["windows_per_second"] for one in found)
    return row


def worker(folder: LocalFolder, rounds: int) -> Row:
    load = Load(folder, 1_000, seed=os.getpid())
    load.open_all()
    began, seconds = time.monotonic(), []
    for _ in range(rounds):
        cpu = time.process_time()
        load.some()
        seconds.append(time.process_time() - cpu)
    return {"seconds": seconds, "windows_per_second": rounds * READS / (time.monotonic() - began)}


# --- S3 -------------------------------------------------------------------------------------------


@contextmanager
def moto() -> Iterator[str]:
    """An address in a fresh S3; its server is another process."""
    with s3.s3_server() as environment:
        os.environ.update(environment)
        yield s3.new_prefix()


class Counting(ObjectFolder):
    """Counts requests."""

    requests = 0
    _count = threading.Lock()

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        with self._count:
            self.requests += 1
        return super()._read_part(name, start, length)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        with self._count:
            self.requests += 1
        return super().read(name, most=most)


class Slow(Counting):
    """Every request takes some time more."""

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        time.sleep(FAR_SECONDS)
        return super()._read_part(name, start, length)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        time.sleep(FAR_SECONDS)
        return super().read(name, most=most)


class OneByOne(Slow):
    """Asks for one part after the other, as a reader without read_many would."""

    def each(self, call: Callable[[Any], Any], items: Any) -> list[Any]:
        return list(map(call, items))


def s3_part(arguments: argparse.Namespace) -> None:
    local, reads, rows = cache_at(arguments.scratch, FAR), 100, []
    with moto() as url:
        far = open_folder(url)
        for name in local.names():
            far.write(name, local.read(name))
        slow = f" + {FAR_SECONDS * 1e3:g} ms a request"
        kinds = {"": Counting(url), slow: Slow(url), f"{slow}, parts one by one": OneByOne(url)}
        for kind, folder in kinds.items():
            load = Load(folder, FAR[0] * FAR[1])
            before, began = folder.requests, time.monotonic()
            load.open_all()
            opening = (time.monotonic() - began) / FAR[0]
            opened_by = (folder.requests - before) / FAR[0]
            for threads in (1, 8, 32):
                before = folder.requests
                row = timed(f"{threads} threads{kind}", lambda: load.in_threads(threads, reads), 3, reads)  # noqa: B023
                row["requests_per_window"] = (folder.requests - before) / (4 * reads)
                rows.append(row)
            rows[-3] |= {"requests_to_open_and_read": opened_by, "seconds_to_open_and_read": opening}
    report(
        rows, [], arguments.json, part="s3", setup=setup(), server="moto, a process of its own: no real S3"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/ddk-cache-read"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--opened", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.opened:
        print(json.dumps(opened(cache_at(arguments.scratch, MANY), arguments.opened)))
    elif arguments.worker:
        print(json.dumps(worker(cache_at(arguments.scratch, MANY), arguments.worker)))
    else:
        for name in [arguments.only] if arguments.only else PARTS:
            globals()[f"{name}_part"](arguments)


if __name__ == "__main__":
    main()
