"""The study: does distilling from a cache with shifting domain weights work, and by how much? With error bars.

    python benchmarks/study/study.py [TABLE ...] [--folder runs/study] [--corpus ../shared/data/corpus] [--parallel 2]
        [--seeds N] [--check]

Makes the texts, tokenizer, teachers and students that the tables want (material.py), then goes through ddk-pipe's own
commands: prepare, cache-teacher, and one sweep per table (the .yaml files beside this one). Every finished student is
measured on windows that its run never saw (measure.py); the rows are kept as Parquet in results/, and the page is
written from these alone (page.py). All of it resumes: what is finished is not done again.

--seeds N: only the first N of each table. --check: of each table one run is made again, its cache too, and compared with
its rows: the figures have to be the same. That takes minutes a table, from the pre-trained models and the real teacher's
cache in the folder; where they are not there yet they are made first (the far teacher and that cache take longest).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ddk_pipe.pipeline.manifest import Sweep, SweepSpec
from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

from common import Row, commit, processor
from material import make_material

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLES = ("near", "baselines", "left_out", "targets", "noise", "skipping", "real", "real_online")
REAL_DOMAINS = ("tech_docs_en", "speeches_en", "code_go", "de_docs", "literature_en", "formal_math")
CHANGES: dict[str, Row] = {  # the manifests that sweeps name, by what they change in study.yaml
    "study.yaml": {},
    "short.yaml": {"output": "short", "prepare": {"max_validation_windows": 32, "max_train_windows": 96}},
    "smollm.yaml": {
        "output": "real",
        "domains": {
            name: {part: f"material/text/{part}/{name}.jsonl" for part in ("train", "validation")}
            for name in REAL_DOMAINS
        },
        "prepare": {"max_validation_windows": 16},
        "teacher": {"model": "material/smollm2", "backend": "vllm"},
        "student": None,  # each run names its own
        "distill": {
            "steps": 45,
            "batch_tokens": 1024,
            "micro_batch_windows": 4,
            "interval_steps": 15,
            "validation_windows": 4,
            "validation_budget": None,
            "gamma": 1.0,
            "optimizer": {"learning_rate": 6e-4},
        },
    },
}
# their cache costs half an hour: --check makes the student again from it where it is there, not the cache
KEEPS_CACHE = ("real", "real_online")
MADE_BEFORE = ("teacher.", "cache.", "domains.")  # fields that decide what a run's cache is
COMMAND = [str(Path(sys.executable).with_name("ddk-pipe"))]
NO_CACHE = dict.fromkeys(("bytes_per_position", "cache_positions", "cache_seconds"))
SAME = 1e-6  # nats; the page shows 1e-4. Sums run in another order where memory is aligned otherwise: 4e-8 was seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--corpus", type=Path, default=Path("../shared/data/corpus"))
    parser.add_argument("--parallel", type=int, default=2, help="students at once, one thread each")
    parser.add_argument("--seeds", type=int, help="of each table, the first so many")
    parser.add_argument("--check", action="store_true", help="make one run of each table again and compare")
    arguments = parser.parse_args()
    sweeps = {
        table: yaml.safe_load((HERE / f"{table}.yaml").read_text(encoding="utf-8"))
        for table in arguments.tables
    }
    material, scratch = arguments.folder / "material", arguments.folder / "check"
    make_material(arguments.corpus, material, set().union(*map(models, sweeps.values())))
    if arguments.check:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(material, scratch / "material")  # a link would leave the manifest's folder
    wrong = 0
    for table, sweep in sweeps.items():
        if arguments.check:
            wrong += not check(table, sweep, arguments.folder, scratch)
        else:
            sweep["seeds"] = sweep["seeds"][: arguments.seeds]
            train(sweep, arguments.folder, arguments.parallel)
            measure(sweep, arguments.folder)
    if wrong:
        raise SystemExit(f"study: {wrong} tables have a run that did not come out the same")


# --- what a sweep needs -----------------------------------------------------------------------------


def settings(sweep: Row) -> list[Row]:
    """Of every run, seeds aside: what it changes in the manifest."""
    spec = SweepSpec.model_validate({**sweep, "seeds": [0]})
    return [{**spec.set, **run.changes} for run in Sweep(HERE, "study", spec, HERE).expand()]


def models(sweep: Row) -> set[str]:
    """The models of material.py that a sweep wants."""
    values = manifest(sweep["manifest"])
    base = {f"{part}.model": (values[part] or {}).get("model") for part in ("teacher", "student")}
    named = ({**base, **run}[field] for run in settings(sweep) for field in base)
    return {Path(model).name for model in named if model}


def caches(sweep: Row) -> list[Row]:
    """The caches that a sweep's runs need, each as its overrides of the manifest."""
    needed: list[Row] = []
    for run in settings(sweep):
        changes = {field: value for field, value in run.items() if field.startswith(MADE_BEFORE)}
        if changes not in needed:
            needed.append(changes)
    return needed


def manifest(name: str) -> Row:
    """The values of a manifest that a sweep names."""
    return {**yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8")), **CHANGES[name]}


# --- running and measuring --------------------------------------------------------------------------


def train(sweep: Row, folder: Path, parallel: int) -> None:
    """Caches and students of one sweep, in `folder`."""
    base = folder / sweep["manifest"]
    base.write_text(yaml.safe_dump(manifest(base.name), sort_keys=False), encoding="utf-8")
    for changes in caches(sweep):
        sets = [
            part for field, value in changes.items() for part in ("--set", f"{field}={json.dumps(value)}")
        ]
        _run("prepare", str(base), *sets)
        _run("cache-teacher", str(base), *sets)
    path = folder / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    _run("sweep", str(path), "--parallel", str(parallel), "--threads", "1", "--yes")


def measure(sweep: Row, folder: Path) -> None:
    """Add the finished students that have no rows yet to results/TABLE.parquet."""
    path = RESULTS / f"{sweep['name']}.parquet"
    there = pq.read_table(path) if path.exists() else pa.table({"run": []})
    rows = pa.Table.from_pylist(measured(sweep, folder, set(there["run"].to_pylist())))
    RESULTS.mkdir(exist_ok=True)
    pq.write_table(pa.concat_tables([there, rows], promote_options="permissive"), path)


def measured(sweep: Row, folder: Path, known: set[str]) -> list[Row]:
    """Rows of the sweep's finished students but the known ones: one a run and domain."""
    from measure import Measure, about_cache, shares_drawn

    output = folder / CHANGES[sweep["manifest"]].get("output", ".")
    finished = pq.read_table(output / "sweeps" / sweep["name"] / "results.parquet").to_pylist()
    waiting = [run for run in finished if run["status"] == "finished" and run["run"] not in known]
    if not waiting:
        return []
    made_by, rows, figures = {"machine": processor(), "commit": commit()}, [], None
    for number, run in enumerate(waiting, 1):
        at = output / "distill" / run["run"]
        summary = json.loads((at / "run.json").read_bytes())
        said = summary["manifest"]
        figures = figures or Measure(  # teacher, domains and windows are the same for all runs of a table
            output / "tokens", list(said["domains"]), folder / said["teacher"]["model"]
        )
        cache = folder / said["cache"]["path"] if said["cache"]["path"] else output / "cache"
        about = {
            **{name: run[name] for name in ("run", "seed", "settings", "steps", "tokens", "seconds")},
            "parameters": summary["parameters"],
            "versions": json.dumps(summary["versions"]),
            "cache_fingerprint": run["cache_fingerprint"],
            **(NO_CACHE if said["distill"]["targets"] == "online" else about_cache(cache)),
            **made_by,
        }
        drawn = shares_drawn(at)
        for row in figures.student(at / "student"):
            rows.append({**about, **row, "share_drawn": drawn[row["domain"]]})
        print(f"study: measured {number} of {len(waiting)}: {run['group']}, seed {run['seed']}", flush=True)
    return rows


def check(table: str, sweep: Row, folder: Path, scratch: Path) -> bool:
    """Make the table's first run again in `scratch`, from the material there; True if its figures are the same.

    Tables that are checked in one go share a cache there as they do in `folder`.
    """
    if table in KEEPS_CACHE:
        output = CHANGES[sweep["manifest"]]["output"]
        for part in (f"{output}/tokens", f"{output}/cache"):
            if (folder / part).is_dir() and not (scratch / part).exists():
                shutil.copytree(folder / part, scratch / part)
    first = settings(sweep)[0]
    one = {"name": table, "manifest": sweep["manifest"], "set": first, "seeds": sweep["seeds"][:1]}
    train(one, scratch, 1)
    again = {row["domain"]: row for row in measured(one, scratch, set())}
    kept = [
        row
        for row in pq.read_table(RESULTS / f"{table}.parquet").to_pylist()
        if row["seed"] == one["seeds"][0] and {**sweep.get("set", {}), **json.loads(row["settings"])} == first
    ]
    off = max(
        (abs(again[row["domain"]][name] - row[name]) for row in kept for name in ("student_ce", "kl", "ece")),
        default=float("inf"),
    )
    print(f"study: {table}: {len(kept)} rows made again, off by {off:.3g} at most", flush=True)
    return off <= SAME


def _run(*arguments: str) -> None:
    print("$ ddk-pipe", *arguments, flush=True)
    subprocess.run([*COMMAND, *arguments], check=True)


if __name__ == "__main__":
    main()
