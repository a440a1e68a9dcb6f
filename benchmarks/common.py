"""What every benchmark needs: alternating runs, medians with spread, and one JSON object of rows and
goals."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "runs" / "demo" / "teacher"  # the demo's
Row = dict[str, Any]
SEVENTH: Row = {  # a student of a seventh of SmolLM2-135M's parameters: about the pairs of the DDK paper (14B to 1.8B)
    "config": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
}


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Process-CPU seconds of every variant, in turn, `rounds` times after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def timing(values: list[float]) -> dict[str, float]:
    """The same under the names that rows carry, seconds of CPU."""
    return {f"cpu_seconds_{name}": value for name, value in spread(values).items()}


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the largest resident set exceeds, during the call, what was resident before it
    (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading the inputs has left behind
    before = peak_resident(reset=True)
    call()
    return peak_resident() - before


def peak_resident(reset: bool = False) -> int:
    """Largest resident set since the last reset, bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def fresh_process(script: str, *arguments: str, **environment: str) -> Any:
    """The JSON that the script prints last, run in a process of its own, where no earlier run has left memory.

    MALLOC_ARENA_MAX and with it glibc's own ways, which give memory back. Raises RuntimeError with what the
    process said if it fails.
    """
    path = os.pathsep.join([str(Path(script).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-P", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "2", **environment},
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{Path(script).name} {' '.join(arguments)}: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def goal(name: str, wanted: str, value: float | str, met: bool | None) -> Row:
    """One line of `goals`; `met` None where nothing can be said about it."""
    return {"name": name, "goal": wanted, "value": value, "met": met}


def report(
    rows: list[Row], goals: list[Row], path: Path | None, *, part: str | None = None, **extra: Any
) -> None:
    """Print the rows and goals; write them as JSON where a path is given.

    A benchmark of several parts names the one that was run: it replaces what the file has of that part, and the
    others stay, each with its own date, device and commit in `parts`.
    """
    about = {**provenance(), **extra}
    result: dict[str, Any] = {**about, "rows": rows, "goals": goals}
    if part is not None:
        before = json.loads(path.read_text()) if path and path.exists() else {}
        kept = {name: value for name, value in before.get("parts", {}).items() if name != part}
        result = {
            **provenance(),
            "parts": {**kept, part: about},
            "rows": _with_part(before, "rows", kept, rows, part),
            "goals": _with_part(before, "goals", kept, goals, part),
        }
    for row in rows:
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    for line in goals:
        met = {True: "met", False: "NOT MET", None: "not judged"}[line["met"]]
        print(f"{met}: {line['name']}: {_short(line['value'])} (goal {line['goal']})")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def teacher_option(parser: argparse.ArgumentParser) -> None:
    """The option --teacher, as most benchmarks take it."""
    parser.add_argument(
        "--teacher", type=Path, default=TEACHER, help="folder of SmolLM2-135M; made if it is missing"
    )


def provenance() -> Row:
    """When, where, with what and how."""
    import torch  # not above: prepare_cpu() of whoever imports this must come first

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def commit() -> str:
    """The checkout's commit; empty outside of one."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _with_part(before: Row, key: str, kept: Row, new: list[Row], part: str) -> list[Row]:
    old = [line for line in before.get(key, []) if line.get("part") in kept]
    return [*old, *({"part": part, **line} for line in new)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
