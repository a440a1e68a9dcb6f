"""A plan on paper for a large teacher, and whether its model holds where it can be measured.

    PYTHONPATH=benchmarks python benchmarks/scale.py --json benchmarks/results/scale.json --docs docs/scale.md

Three small runs of the real stage (one domain of this Python's source). What a shard and a position cost is taken from
the first two; the third, larger one is predicted. The same model, with an assumed GPU, gives the tables of docs/scale.md.
About five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common import Row, goal, processor, report, teacher_option
from doc_tables import into_docs, table

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()  # before torch

from ddk_pipe.pipeline.cache import CacheWriter, read_spec
from ddk_pipe.pipeline.cache.spec import MOST_SHARDS
from ddk_pipe.pipeline.cache.strict_json import MOST_JSON_BYTES
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.demo.material import write_teacher
from ddk_pipe.stages.prepare import prepare

SEQ_LEN = 128
# windows of a shard, of training in all; twice a shard's are validation: 14, 8 and 26 shards
WARM_UP, SIZES = (2, 4), ((2, 24), (8, 48), (4, 96))
FILES = 80  # of Python's library, about 2 MB
LIMITS = {"target_bytes": 0.05, "record_bytes": 0.05, "files": 0.0, "seconds": 0.2}  # of the model's errors


@dataclass(frozen=True)
class Run:
    """What one run of the stage was and cost."""

    shard_windows: int
    windows: int
    shards: int
    target_bytes: int
    input_bytes: int  # tokens
    record_bytes: int
    files: int
    seconds: float  # from loading the teacher to the last commit
    write_cpu_seconds: float  # of encoding, writing, reading back and committing

    @property
    def positions(self) -> int:
        return self.windows * SEQ_LEN


@dataclass(frozen=True)
class Model:
    """What a shard, a window and a position cost."""

    target_bytes_per_shard: float
    target_bytes_per_position: float
    input_bytes_per_position: float
    record_bytes_per_shard: float
    record_bytes_per_window: float
    files_per_shard: float
    seconds_to_start: float
    seconds_per_position: float
    write_cpu_seconds_per_position: float

    @classmethod
    def of(cls, one: Run, two: Run) -> Model:
        target_shard, target_position = solve(one, two, "target_bytes", per="positions")
        record_shard, record_window = solve(one, two, "record_bytes", per="windows")
        pace = (two.seconds - one.seconds) / (two.positions - one.positions)
        return cls(
            target_shard,
            target_position,
            two.input_bytes / two.positions,
            record_shard,
            record_window,
            two.files / two.shards,
            two.seconds - pace * two.positions,
            pace,
            two.write_cpu_seconds / two.positions,
        )

    def predict(self, shards: int, windows: int, seq_len: int) -> dict[str, float]:
        """Bytes, files and seconds of a run."""
        positions = windows * seq_len
        return {
            "target_bytes": shards * self.target_bytes_per_shard + positions * self.target_bytes_per_position,
            "record_bytes": shards * self.record_bytes_per_shard + windows * self.record_bytes_per_window,
            "input_bytes": positions * self.input_bytes_per_position,
            "files": shards * self.files_per_shard,
            "seconds": self.seconds_to_start + positions * self.seconds_per_position,
        }


def solve(one: Run, two: Run, what: str, *, per: str) -> tuple[float, float]:
    """x and y with what = x * shards + y * per, in both runs."""
    a, b, c = one.shards, getattr(one, per), getattr(one, what)
    d, e, f = two.shards, getattr(two, per), getattr(two, what)
    determinant = a * e - b * d
    return (c * e - b * f) / determinant, (a * f - c * d) / determinant


# --- measured -------------------------------------------------------------------------------------


@contextmanager
def clocked(seconds: list[float]) -> Iterator[None]:
    """Inside, the CPU seconds of every CacheWriter.write, of its own thread, are noted."""
    real = CacheWriter.write

    def write(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return real(*arguments)
        finally:
            seconds.append(time.thread_time() - began)

    with mock.patch.object(CacheWriter, "write", write):
        yield


def project_in(
    name: Path, teacher: Path, backend: str, shard_windows: int, options: dict[str, int]
) -> Project:
    """The source of Python's library in records of 500 characters, as one domain.

    Shuffled: the first windows, which are all that a small run sees, are then like the others.
    """
    folder = name.resolve()
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:FILES]
    ]
    records = [text[at : at + 500] for text in texts for at in range(0, len(text), 500)]
    random.Random(0).shuffle(records)
    (folder / "source.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    manifest = {
        "output": "out",
        "domains": {"source": {"train": "source.jsonl"}},
        "teacher": {"model": str(teacher.resolve()), "backend": backend},
        "seq_len": SEQ_LEN,
        "prepare": {"validation_fraction": 0.1, **options},
        "cache": {"shard_windows": shard_windows},
        "student": {"keep_layers": [0]},
        "distill": {"steps": 1, "batch_tokens": SEQ_LEN, "interval_steps": 1},
    }
    (folder / "manifest.yaml").write_text(json.dumps(manifest))
    return load_project(folder / "manifest.yaml")


def prepare_rate(teacher: Path) -> float:
    """Tokens per second of `prepare` on all of that text."""
    with tempfile.TemporaryDirectory() as name:
        project = project_in(Path(name), teacher, "hf", 64, {"max_validation_windows": 1 << 20})
        began = time.monotonic()
        splits = prepare(project)
        windows: int = sum(split.tokens.shape[0] for domain in splits.values() for split in domain.values())
        return windows * SEQ_LEN / (time.monotonic() - began)


def run(teacher: Path, backend: str, shard_windows: int, train_windows: int) -> Run:
    """The stage on so many windows, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        project = project_in(
            Path(name),
            teacher,
            backend,
            shard_windows,
            {"max_train_windows": train_windows, "max_validation_windows": 2 * shard_windows},
        )
        prepare(project)
        writing: list[float] = []
        with clocked(writing):
            began = time.monotonic()
            cache_teacher(project)
            seconds = time.monotonic() - began
        return facts_of(project.output / "cache", shard_windows, seconds, sum(writing))


def facts_of(cache: Path, shard_windows: int, seconds: float, writing: float) -> Run:
    """What lies on the disk after a run."""
    from ddk_pipe.pipeline.storage import LocalFolder

    sizes = [size for domain in read_spec(LocalFolder(cache)).domains.values() for size in domain.values()]
    paths = list(cache.glob("*/*/[0-9]*.json"))
    records = [json.loads(path.read_bytes()) for path in paths]
    windows = sum(size.windows for size in sizes)
    return Run(
        shard_windows=shard_windows,
        windows=windows,
        shards=len(records),
        target_bytes=sum(record["target_bytes"] for record in records),
        input_bytes=sum(record["input_bytes"] for record in records),
        record_bytes=sum(path.stat().st_size for path in paths),
        files=len(records) + sum(path.is_file() for path in cache.glob("*/*/*.zarr/**/*")),
        seconds=seconds,
        write_cpu_seconds=writing,
    )


def check(model: Model, third: Run) -> tuple[Row, list[Row]]:
    """The third run, predicted and measured."""
    predicted = model.predict(third.shards, third.windows, SEQ_LEN)
    row: Row = {"name": "third run"}
    goals = []
    for name, limit in LIMITS.items():
        measured = getattr(third, name)
        row |= {f"{name}_predicted": predicted[name], f"{name}_measured": measured}
        error = abs(predicted[name] / measured - 1)
        goals.append(
            goal(f"{name} of a larger run, error of the model", f"<= {limit}", error, error <= limit + 1e-9)
        )
    return row, goals


# --- on paper -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assumed:
    """Not measured here: a GPU, a model, prices and limits of others. Change them on the command line."""

    parameters: float = 14e9  # of the teacher, embedding left out, output layer included
    layers: int = 40
    width: int = 5120  # of attention, all heads
    seq_len: int = 4096
    gpu_flops: float = 989e12  # dense bf16 of an H100 SXM, from its data sheet
    utilisation: float = 0.4  # of them that a prefill reaches
    stage_share: float = 0.05  # of a step for selecting: the goal, measured on CPUs only
    dollars_per_gpu_hour: float = 2.5
    dollars_per_gb_month: float = 0.023
    dollars_per_1000_puts: float = 0.005
    puts_per_second: float = 3500.0  # of one S3 prefix, from its documentation
    seconds_per_get: float = 0.02  # of a small object, one after the other

    @property
    def positions_per_gpu_second(self) -> float:
        flops = 2 * self.parameters + 2 * 2 * self.layers * self.width * self.seq_len / 2
        return self.gpu_flops * self.utilisation * (1 - self.stage_share) / flops


def plan(model: Model, assumed: Assumed, tokens: float, gpus: int, shard_windows: int) -> Row:
    """One line of the plan."""
    windows = -(-int(tokens) // assumed.seq_len)
    shards = -(-windows // shard_windows)
    size = model.predict(shards, windows, assumed.seq_len)
    gpu_hours = tokens / assumed.positions_per_gpu_second / 3600
    hours = gpu_hours / gpus
    total = size["target_bytes"] + size["record_bytes"] + size["input_bytes"]
    return {
        "name": f"{tokens / 1e9:,.0f}B tokens, {gpus} GPUs",
        "shard_windows": shard_windows,
        "gpu_hours": gpu_hours,
        "wall_hours": hours,
        "terabytes": total / 1e12,
        "shards": shards,
        "files": size["files"],
        "puts_per_second": size["files"] / (hours * 3600),
        "megabytes_per_second": total / (hours * 3600) / 1e6,
        "dollars_gpu": gpu_hours * assumed.dollars_per_gpu_hour,
        "dollars_puts": size["files"] / 1000 * assumed.dollars_per_1000_puts,
        "dollars_storage_month": total / 1e9 * assumed.dollars_per_gb_month,
    }


def limits(
    model: Model, assumed: Assumed, rate: float, tokens: float, gpus: int, shard_windows: int
) -> list[Row]:
    """What the largest case asks of each part, as a multiple of what the part has; above 1 it breaks."""
    line = plan(model, assumed, tokens, gpus, shard_windows)
    wall = line["wall_hours"] * 3600
    record = model.record_bytes_per_shard + shard_windows * model.record_bytes_per_window
    parts = {
        f"shards in a cache (at most {MOST_SHARDS:,})": line["shards"] / MOST_SHARDS,
        f"a commit record's size (at most {MOST_JSON_BYTES / 1e6:.0f} MB)": record / MOST_JSON_BYTES,
        "puts a second of one S3 prefix": line["puts_per_second"] / assumed.puts_per_second,
        "encoding and writing, of one CPU core for each GPU": assumed.positions_per_gpu_second
        * model.write_cpu_seconds_per_position,
        "`prepare`, one process, of the wall time": tokens / rate / wall,
        "reading every commit record when a run ends, of the wall time": line["shards"]
        * assumed.seconds_per_get
        / wall,
    }
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [{"name": name, "times_what_there_is": value} for name, value in ordered]


# --- all of it ------------------------------------------------------------------------------------


def tables_of(
    runs: list[Run], model: Model, third: Row, plans: list[Row], worst: list[Row], where: str
) -> str:
    """The generated part of docs/scale.md."""
    constants = [{"name": name.replace("_", " "), "value": value} for name, value in asdict(model).items()]
    checked = [
        {
            "name": name.replace("_", " "),
            "predicted": third[f"{name}_predicted"],
            "measured": third[f"{name}_measured"],
            "error": f"{third[f'{name}_predicted'] / third[f'{name}_measured'] - 1:+.1%}",
            "limit": f"{limit:.0%}",
        }
        for name, limit in LIMITS.items()
    ]
    sizes = [
        {
            "name": f"{r.windows} windows in shards of {r.shard_windows}",
            **asdict(r),
            "rate": r.positions / r.seconds,
        }
        for r in runs
    ]
    return "\n\n".join(
        [
            f"Measured on {where}, {time.strftime('%Y-%m-%d')}:",
            table(
                sizes,
                {
                    "run": "name", "shards": "shards", "target bytes": "target_bytes", "record bytes": "record_bytes",
                    "files": "files", "seconds": "seconds", "CPU seconds of writing": "write_cpu_seconds",
                },
            ),
            "What the first two say a shard, a window and a position cost:",
            table(constants, {"": "name", "value": "value"}),
            "The third, predicted from these:",
            table(checked, {"": "name", **{key: key for key in ("predicted", "measured", "error", "limit")}}),
            "The plan:",
            table(
                plans,
                {
                    "": "name", "windows a shard": "shard_windows", "GPU-hours": "gpu_hours", "wall hours": "wall_hours",
                    "TB": "terabytes", "shards": "shards", "files = puts": "files", "puts/s": "puts_per_second",
                    "MB/s": "megabytes_per_second", "$ GPUs": "dollars_gpu", "$ puts": "dollars_puts",
                    "$ a month": "dollars_storage_month",
                },
            ),
            f"Where it breaks first, at {plans[-1]['name']} (1 = all that there is):",
            table(worst, {"": "name", "asked / there": "times_what_there_is"}),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    teacher_option(parser)
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="the page whose tables are replaced")
    for name, value in asdict(Assumed()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    assumed = Assumed(**{name: getattr(options, name) for name in asdict(Assumed())})
    write_teacher(options.teacher)
    rate = prepare_rate(options.teacher)
    run(options.teacher, options.backend, *WARM_UP)  # imports and first calls are nobody's
    runs = [run(options.teacher, options.backend, *size) for size in SIZES]
    model = Model.of(runs[0], runs[1])
    third, goals = check(model, runs[2])
    cases = [(tokens, gpus, 64 if tokens < 1e11 else 256) for tokens in (15e9, 1e12) for gpus in (8, 64, 512)]
    plans = [plan(model, assumed, *case) for case in cases]
    worst = limits(model, assumed, rate, *cases[-1])
    measured: list[Row] = [{"name": f"run {number}", **asdict(each)} for number, each in enumerate(runs)]
    preparing: Row = {"name": "prepare", "tokens_per_second": rate}
    rows = [*measured, preparing, {"name": "model", **asdict(model)}, third, *plans, *worst]
    report(rows, goals, options.json, assumed=asdict(assumed))
    if options.docs:
        into_docs(options.docs, tables_of(runs, model, third, plans, worst, processor()))


if __name__ == "__main__":
    main()
