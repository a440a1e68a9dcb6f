"""`ddk-pipe prepare` against its tokenizer alone: text of real documents, repeated with changes, as JSON lines, Parquet and zstd.

The tokenizer's rate is that of `encode_batch_fast` on the same documents, all cores, nothing else; the command's is its wall
clock, from its first import to the last window on the disk.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Row, goal, report, spread, teacher_option

BATCH = 256
WANTED_SHARE, SECOND_RUN_SECONDS, WORKER_BYTES = 0.85, 2.0, 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("../shared/data/corpus"),
        help="folder of .jsonl.gz with a field `text`",
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    teacher_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = write_forms(root, arguments.corpus, arguments.megabytes << 20)
        (root / "manifest.yaml").write_text(manifest_for(arguments.teacher))
        rows = measure(root, text, arguments)
    report(rows, goals_of(rows), arguments.json, megabytes=arguments.megabytes)


def write_forms(root: Path, corpus: Path, size: int) -> list[str]:
    """The same documents as JSON lines, zstd of them, and Parquet; returns them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = list(documents(corpus, size))
    lines = "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in text).encode()
    (root / "text.jsonl").write_bytes(lines)
    with pa.output_stream(str(root / "text.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    pq.write_table(pa.table({"text": text}), root / "text.parquet", row_group_size=2000)
    return text


def documents(corpus: Path, size: int) -> Iterator[str]:
    """Real documents, round and round, each with a number of its own, up to so many bytes."""
    known = [
        json.loads(line)["text"]
        for path in sorted(corpus.glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]
    for number, one in enumerate(itertools.cycle(known)):
        if size <= 0:
            return
        changed = f"{one}\n{number}"
        size -= len(changed.encode())
        yield changed


def manifest_for(teacher: Path) -> str:
    return (
        f"teacher: {{model: {teacher.resolve()}}}\nseq_len: 1024\n"
        "domains: {text: {train: text.jsonl}}\nprepare: {validation_fraction: 0.001}\n"
    )


def measure(root: Path, text: list[str], arguments: argparse.Namespace) -> list[Row]:
    seconds: dict[str, list[float]] = {}
    tokens = 0
    sources = {"JSON lines": "text.jsonl", "Parquet": "text.parquet", "zstd": "text.jsonl.zst"}
    for _ in range(arguments.rounds):  # in turn
        tokens, alone = tokenizer_alone(arguments.teacher, text)
        seconds.setdefault("tokenizer alone", []).append(alone)
        for form, source in sources.items():
            for workers in arguments.workers:
                name = f"{form}, {workers} worker{'s' * (workers > 1)}"
                seconds.setdefault(name, []).append(prepare(root, source, workers, fresh=True))
        seconds.setdefault("nothing to do", []).append(prepare(root, source, workers, fresh=False))
    rows: list[Row] = [
        {"name": name, **{f"seconds_{key}": value for key, value in spread(found).items()}}
        for name, found in seconds.items()
    ]
    alone = rows[0]["seconds_median"]
    for row in rows:
        if row["name"] != "nothing to do":
            row |= {
                "tokens_per_second": tokens / row["seconds_median"],
                "share_of_the_tokenizer": alone / row["seconds_median"],
            }
    largest = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return [*rows, {"name": "largest process", "peak_resident_bytes": largest}]


def tokenizer_alone(teacher: Path, text: list[str]) -> tuple[int, float]:
    """Tokens, and the seconds that they took."""
    from tokenizers import Tokenizer

    tool = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tool.no_truncation()
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(text), BATCH):
        tokens += sum(len(one) for one in tool.encode_batch_fast(text[start : start + BATCH]))
    return tokens, time.perf_counter() - began


def prepare(root: Path, source: str, workers: int, *, fresh: bool) -> float:
    """Wall-clock seconds of the command."""
    place = root / "out"
    command: list[Any] = [
        sys.executable,
        "-P",
        "-m",
        "ddk_pipe.stages.cli",
        "prepare",
        root / "manifest.yaml",
    ]
    command += ["--workers", str(workers), "--set", f"domains.text.train={source}"]
    if fresh:
        subprocess.run(["rm", "-rf", place], check=True)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - began


def goals_of(rows: list[Row]) -> list[Row]:
    by_name = {row["name"]: row for row in rows}
    found = [
        goal(f"{name}: share of the tokenizer's rate", f">= {WANTED_SHARE}", share, share >= WANTED_SHARE)
        for name, row in by_name.items()
        if (share := row.get("share_of_the_tokenizer")) is not None and name != "tokenizer alone"
    ]
    again = by_name["nothing to do"]["seconds_median"]
    largest = by_name["largest process"]["peak_resident_bytes"]
    return [
        *found,
        goal(
            "a second run with nothing to do, seconds",
            f"<= {SECOND_RUN_SECONDS}",
            again,
            again <= SECOND_RUN_SECONDS,
        ),
        goal("largest process, bytes", f"<= {WORKER_BYTES}", largest, largest <= WORKER_BYTES),
    ]


if __name__ == "__main__":
    main()
