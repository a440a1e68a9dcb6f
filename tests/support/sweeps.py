"""Sweeps for tests: a project without any teacher, and its sweep file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tiny import write_project
from transformers import AutoTokenizer

SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GUARD = Path(__file__).parent / "no_teacher"  # sitecustomize.py: importing a teacher is an error
VARYING = ("seconds", "tokens_per_second")  # of a row of results: not the same twice


def project_without_teacher(folder: Path, teacher: Path, output: Path, **changes: Any) -> Path:
    """A manifest whose cache is at hand and whose teacher is nowhere; the student has weights of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder / "tokenizer")
    manifest = write_project(
        folder,
        Path("/nowhere"),
        **{"tokenizer": "tokenizer", "student": {"config": SMALL}, **changes},
    )
    shutil.copytree(output / "cache", folder / "out" / "cache")
    return manifest


def write_sweep(manifest: Path, /, *, name: str = "rules", **values: Any) -> Path:
    """A sweep file beside the manifest."""
    path = manifest.parent / f"{name}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def start(*arguments: object, guard: bool = True, **environment: str) -> subprocess.Popen[str]:
    """`ddk-pipe ...` in a process of its own, on two threads, with the guard in it and in its children."""
    path = [str(GUARD)] if guard else []
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ddk_pipe.stages.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def wait_for(found: Callable[[], Any], seconds: float = 200) -> Any:
    """What `found` returns, as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def results(folder: Path, name: str = "rules", *, timings: bool = False) -> list[dict[str, Any]]:
    """The table of a sweep of the project in `folder`, without what no two runs have the same."""
    rows: list[dict[str, Any]] = pq.read_table(folder / "out/sweeps" / name / "results.parquet").to_pylist()
    if not timings:
        for row in rows:
            for column in VARYING:
                row.pop(column, None)
    return rows
