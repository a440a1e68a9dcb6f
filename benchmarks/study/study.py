"""The study: does distilling from a cache with shifting domain weights work, and by how much? With error bars.

    python benchmarks/study/study.py [TABLE ...] [--folder runs/study] [--corpus ../shared/data/corpus] [--parallel 2]
        [--seeds N] [--page docs/study.md]

Makes texts, tokenizer, teacher and students (material.py), then goes through ddk-pipe's own commands: prepare,
cache-teacher, and one sweep per table (the .yaml files beside this one). Every finished student is measured on windows
that its run never saw (measure.py); the rows are kept as Parquet in results/, and the page is written from these
alone (page.py). All of it resumes: what is finished is not done again. --seeds N: only the first N of each table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ddk_pipe.stages.runtime import prepare_cpu

prepare_cpu()

from common import commit, processor
from material import make_material

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLES = ("baselines",)
COMMAND = [str(Path(sys.executable).with_name("ddk-pipe"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--corpus", type=Path, default=Path("../shared/data/corpus"))
    parser.add_argument("--parallel", type=int, default=2, help="students at once, one thread each")
    parser.add_argument("--seeds", type=int, help="of each table, the first so many")
    arguments = parser.parse_args()
    make_material(arguments.corpus, arguments.folder / "material")
    shutil.copy(HERE / "study.yaml", arguments.folder)
    _run("prepare", str(arguments.folder / "study.yaml"))
    for table in arguments.tables:
        run_table(table, arguments)


def run_table(table: str, arguments: argparse.Namespace) -> None:
    """Teacher, students and measurements of one table; its rows are in results/TABLE.parquet."""
    sweep = yaml.safe_load((HERE / f"{table}.yaml").read_text(encoding="utf-8"))
    sweep["seeds"] = sweep["seeds"][: arguments.seeds]
    path = arguments.folder / f"{table}.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    for overrides in caches(sweep):
        sets = [
            part for field, value in overrides.items() for part in ("--set", f"{field}={json.dumps(value)}")
        ]
        _run("cache-teacher", str(arguments.folder / "study.yaml"), *sets)
    _run("sweep", str(path), "--parallel", str(arguments.parallel), "--threads", "1", "--yes")
    measure(table, arguments.folder)


def caches(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The caches that a sweep's runs need, each as its overrides of the manifest's section `cache`."""
    needed = []
    for run in sweep.get("runs", [{}]):
        changes = {**sweep.get("set", {}), **run}
        cache = {field: value for field, value in changes.items() if field.startswith("cache.")}
        if cache not in needed:
            needed.append(cache)
    return needed


def measure(table: str, folder: Path) -> None:
    """Measure the table's finished students that have no rows yet."""
    from measure import Measure

    path = RESULTS / f"{table}.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    known = {row["run"] for row in rows}
    runs = pq.read_table(folder / "sweeps" / table / "results.parquet").to_pylist()
    waiting = [run for run in runs if run["status"] == "finished" and run["run"] not in known]
    if not waiting:
        return
    machine, made_by = processor(), commit()
    measured = Measure(folder / "cache", folder / "material" / "teacher")
    for number, run in enumerate(waiting, 1):
        summary = json.loads((folder / "distill" / run["run"] / "run.json").read_bytes())
        about = {
            **{name: run[name] for name in ("run", "seed", "settings", "steps", "tokens", "seconds")},
            "versions": json.dumps(summary["versions"]),
            "cache_fingerprint": run["cache_fingerprint"],
            "machine": machine,
            "commit": made_by,
        }
        student = folder / "distill" / run["run"] / "student"
        rows += [{**about, **figures} for figures in measured.student(student)]
        print(f"study: measured {number} of {len(waiting)}: {run['group']}, seed {run['seed']}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _run(*arguments: str) -> None:
    print("$ ddk-pipe", *arguments, flush=True)
    subprocess.run([*COMMAND, *arguments], check=True)


if __name__ == "__main__":
    main()
