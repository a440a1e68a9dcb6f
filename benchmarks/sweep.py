"""What the second student costs: four students from one cache, against four that run the teacher beside them.

    PYTHONPATH=benchmarks python benchmarks/sweep.py [--json OUT] [--teacher FOLDER] [--student NAME ...]
        [--steps 30] [--windows 32] [--work DIR]

What is saved grows with teacher / student, so there are two students: `seventh` has a seventh of the teacher's
parameters, which is about the pairs of the DDK paper (14B to 1.8B, 13B to 1.1B), and `six_layers` keeps 6 of its 30
layers and its whole vocabulary matrix, which leaves more than a third.

Two mixing rules times two seeds, the same students, steps and batches on both sides: `ddk-pipe sweep` over a cache,
and the same sweep file with `distill.targets: online` (a dense teacher in memory). Every run is a command of its own, offline and online in
turn, and is charged everything it does: starting, building the student, validation, writing it. Costs are seconds of CPU of
the command and its children, with the wall time beside them. The cache's cost is `ddk-pipe cache-teacher`; the text is prepared before,
for both. The break-even is the number of students from which the cache has paid for itself:
cache / (online - offline), per student. A student replaces its own rows in OUT and leaves the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, SEVENTH, Row, goal, report, spread, teacher_option

from ddk_pipe.pipeline.manifest import load_sweep
from ddk_pipe.stages.demo import material as demo_material

DOMAINS = ("python_code", "documentation", "licences", "plays")
RULES, SEEDS = ("ddk", "uniform"), (0, 1)
SIDES = ("offline", "online")
STUDENTS: dict[str, Row] = {
    "seventh": SEVENTH,
    "six_layers": {"keep_layers": [0, 1, 2, 27, 28, 29]},
}
CHEAPER = 3.0  # the goal, cache excluded


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write the result there")
    teacher_option(options)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--windows", type=int, default=32, help="training windows per domain")
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks" / "sweep")
    options.add_argument("--student", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    given = options.parse_args()
    demo_material.write_teacher(given.teacher)
    for student in given.student:
        measure(student, given)


def measure(student: str, given: argparse.Namespace) -> None:
    """Prepare, cache, train on both sides in turn, and report, all for one student."""
    manifest = write_project(given.work, given.teacher, given.steps, given.windows, STUDENTS[student])
    run("prepare", manifest)
    cache = run("cache-teacher", manifest)
    costs: dict[str, list[Row]] = {side: [] for side in SIDES}
    for rule in RULES:
        for seed in SEEDS:
            for side in SIDES:
                file = write_sweep(given.work, side, rule, seed)
                costs[side].append({"rule": rule, "seed": seed, **run("sweep", file), **result(file)})
                shutil.rmtree(given.work / "out" / "distill")  # the next one finds nothing
    report(
        *summarise(cache, costs),
        given.json,
        part=student,
        steps=given.steps,
        windows=given.windows,
        students=len(costs["offline"]),
        student_parameters=costs["offline"][0]["parameters"],
    )


def write_project(work: Path, teacher: Path, steps: int, windows: int, student: Row) -> Path:
    """Text, manifest and nothing else: what an earlier call made is removed."""
    shutil.rmtree(work / "out", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "text").is_dir():
        demo_material.write_texts(work / "text")
    values = {
        "domains": {name: {"train": f"text/{name}.jsonl"} for name in DOMAINS},
        "seq_len": 256,
        "prepare": {"validation_fraction": 0.2, "max_validation_windows": 2, "max_train_windows": windows},
        "teacher": {"model": str(teacher.absolute()), "backend": "hf"},
        "student": student,
        "distill": {
            "steps": steps,
            "batch_tokens": 1024,
            "micro_batch_windows": 4,
            "interval_steps": 10,
            "validation_windows": 2,
            "validation_budget": None,
            "gamma": 1.0,
            "initial": "uniform",
        },
    }
    path = work / "manifest.yaml"
    path.write_text(json.dumps(values))
    return path


def write_sweep(work: Path, side: str, rule: str, seed: int) -> Path:
    """A sweep of one run, so that the two sides can take turns."""
    values: dict[str, Any] = {
        "name": f"{side}-{rule}-{seed}",
        "set": {"distill.mixing": rule},
        "seeds": [seed],
    }
    if side == "online":
        values["set"]["distill.targets"] = "online"
    path = work / f"{side}.yaml"
    path.write_text(json.dumps(values))
    return path


def run(command: str, path: Path) -> Row:
    """Seconds of CPU, children included, and of wall time of one command; raises RuntimeError if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ddk_pipe.stages.cli", command, str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command} {path.name}: {done.stderr.strip().splitlines()[-1]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "wall_seconds": time.monotonic() - began}


def result(file: Path) -> Row:
    """Of the one run of a sweep: what its record says."""
    import pyarrow.parquet as pq

    name = load_sweep(file).name
    (row,) = pq.read_table(file.parent / "out" / "sweeps" / name / "results.parquet").to_pylist()
    return {
        "training_seconds": row["seconds"],
        "gap_nats": row["gap_nats"],
        "tokens": row["tokens"],
        "parameters": row["parameters"],
    }


def summarise(cache: Row, costs: dict[str, list[Row]]) -> tuple[list[Row], list[Row]]:
    """Rows of the benchmark and its goals; all ratios are of CPU seconds."""
    rows: list[Row] = [{"name": "cache", **cache}]
    for side, runs in costs.items():
        for place in runs:
            rows.append({"name": f"{side}, {place['rule']}, seed {place['seed']}", **place})
    total = {side: sum(row["cpu_seconds"] for row in runs) for side, runs in costs.items()}
    students = len(costs["offline"])
    saved = (total["online"] - total["offline"]) / students
    break_even = math.ceil(cache["cpu_seconds"] / saved) if saved > 0 else math.inf
    excluded = total["online"] / total["offline"]
    included = total["online"] / (total["offline"] + cache["cpu_seconds"])
    for side, runs in costs.items():
        figures = spread([row["cpu_seconds"] for row in runs])
        rows.append(
            {"name": f"{side}, a student", **{f"cpu_seconds_{key}": value for key, value in figures.items()}}
        )
    rows.append(
        {
            "name": f"{students} students, online / offline",
            "ratio_cache_excluded": excluded,
            "ratio_cache_included": included,
            "break_even_students": break_even,
        }
    )
    goals = [
        goal("online costs, cache excluded", f">= {CHEAPER} x", excluded, excluded >= CHEAPER),
        goal("break-even", "stated", f"{break_even} students", math.isfinite(break_even)),
    ]
    return rows, goals


if __name__ == "__main__":
    main()
