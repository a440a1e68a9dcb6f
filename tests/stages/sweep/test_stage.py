"""Sweeps, as a user runs them: processes that are killed, caches that change, runs that fail."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import project_without_teacher, results, start, wait_for, write_sweep
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_sweep
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.sweep import Request, sweep
from ddk_pipe.stages.sweep.run import Job, run_one

GRID: dict[str, Any] = {"grid": {"distill.mixing": ["ddk", "natural"]}, "seeds": [0, 1]}


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def finish(folder: Path, *arguments: object) -> str:
    """Run a command to its end with the import guard; returns what it said."""
    child = start(*arguments)
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    return out + err


@pytest.mark.slow
def test_killed_and_rerun_equals_undisturbed(tmp_path: Path, tiny_teacher: Path, cached_output: Path) -> None:
    """Four students, no teacher anywhere (its folder is gone and the import guard is on)."""
    folders = {}
    for name in ("undisturbed", "killed"):
        folders[name] = tmp_path / name
        manifest = project_without_teacher(folders[name], tiny_teacher, cached_output)
        write_sweep(manifest, **GRID)
    said = finish(tmp_path, "sweep", folders["undisturbed"] / "rules.yaml")
    assert "4 of 4" in said and "no finished run to tell the time by yet" in said

    here = folders["killed"]
    child = start("sweep", here / "rules.yaml")
    wait_for(lambda: list((here / "out/distill").glob("*/run.json")))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = {path: path.stat().st_mtime_ns for path in (here / "out/distill").glob("*/run.json")}
    assert 1 <= len(done) < 4
    said = finish(here, "sweep", here / "rules.yaml")
    assert f"{len(done)} of 4 runs are finished" in said and "to go" in said
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not repeated
    rows = results(here)
    assert rows == results(folders["undisturbed"])
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert [(row["group"], row["seed"]) for row in rows] == [
        (f"mixing={rule}", seed) for rule in ("ddk", "natural") for seed in (0, 1)
    ]
    assert len({(row["gap_nats"], row["weight.code"]) for row in rows}) == 4
    assert {"gap_nats.code", "student_ce.plays", "weight.code"} <= set(rows[0])


def begun(manifest: Path) -> bool:
    """True once a run of the project has made a step."""
    return any(path.stat().st_size for path in manifest.parent.glob("out/distill/*/steps.jsonl"))


@pytest.fixture
def prepared(tmp_path: Path, tiny_teacher: Path, cached_output: Path) -> Path:
    """A manifest without a teacher; runs of two steps."""
    distill = {"steps": 2, "batch_tokens": 64, "interval_steps": 2, "validation_windows": 2}
    return project_without_teacher(tmp_path / "p", tiny_teacher, cached_output, distill=distill)


@pytest.mark.slow
def test_a_failed_run_is_noted_and_the_rest_goes_on(prepared: Path) -> None:
    """One learning rate is absurd; two runs at once, each with a file for its lines."""
    path = write_sweep(prepared, grid={"distill.optimizer.learning_rate": [1e30, 1e-3]}, seeds=[0])
    with pytest.raises(DdkError) as mistake:
        sweep(path, Request(parallel=2, threads=1))
    assert "1 of 2 runs failed, the first: learning_rate=1e+30, seed 0: distill: the loss is" in str(
        mistake.value
    )
    rows = results(prepared.parent)
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert "lower distill.optimizer.learning_rate" in rows[0]["error"] and rows[1]["error"] is None
    logs = sorted(prepared.parent.glob("out/sweeps/rules/logs/*.log"))
    assert len(logs) == 2 and all("distill:" in log.read_text() for log in logs)
    status, shown, _ = call("sweep", path, "--status")
    assert status == 0 and "failed: distill: the loss" in shown and "finished" in shown


@pytest.mark.slow
def test_a_run_whose_process_dies_fails_alone(prepared: Path) -> None:
    """The first run's process is killed as the system kills for memory; the second one is run all the same."""
    path = write_sweep(prepared, runs=[{"distill.steps": 100000, "distill.interval_steps": 1}, {}], seeds=[0])
    child = start("sweep", path)
    wait_for(lambda: begun(prepared))
    (worker,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[-1:]
    os.kill(int(worker), signal.SIGKILL)
    _, err = child.communicate(timeout=240)
    assert child.returncode == 2 and "killed by signal 9 (out of memory?)" in err
    assert [row["status"] for row in results(prepared.parent)] == ["failed", "finished"]


@pytest.mark.slow
def test_stopped_in_time(prepared: Path) -> None:
    """SIGTERM: the run under way writes its checkpoint, and the same command continues there."""
    path = write_sweep(prepared, set={"distill.steps": 100000, "distill.interval_steps": 5})
    child = start("sweep", path)
    wait_for(lambda: begun(prepared))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and "run the same command again to continue" in err
    assert "the same command continues there" in err  # said by distill, in the worker
    (row,) = results(prepared.parent)
    assert row["status"] == "unfinished" and row["steps"] >= 1
    assert list((prepared.parent / "out/distill").glob("*/checkpoints/step-*"))


@pytest.mark.slow
def test_a_cache_that_changed_is_refused(prepared: Path, cached_output: Path) -> None:
    path = write_sweep(prepared, seeds=[0])
    sweep(path, Request(threads=1))
    note = prepared.parent / "out/sweeps/rules/sweep.json"
    record = json.loads(note.read_text())
    record["caches"] = dict.fromkeys(record["caches"], "another")  # as if the cache had been made anew since
    note.write_text(json.dumps(record))
    status, _, err = call("sweep", path)
    assert status == 2 and "not the cache that this sweep began with" in err


@pytest.mark.slow
def test_finished_runs_are_known_by_what_they_were_made_of(prepared: Path, cached_output: Path) -> None:
    """Also where the sweep's own folder is gone: the runs say it themselves."""
    path = write_sweep(prepared, seeds=[0])
    sweep(path, Request(threads=1))
    (summary,) = prepared.parent.glob("out/distill/*/run.json")
    before = summary.stat().st_mtime_ns
    shutil.rmtree(prepared.parent / "out/sweeps")
    sweep(path, Request(threads=1))
    assert summary.stat().st_mtime_ns == before
    values = json.loads(prepared.read_text())
    prepared.write_text(json.dumps({**values, "distill": {**values["distill"], "gamma": 0.9}}))
    status, _, err = call("sweep", path)
    told = (
        "holds a run with other settings (distill.gamma 0.2, now 0.9); delete that folder to train it again"
    )
    assert status == 2 and told in err
    prepared.write_text(json.dumps(values))
    shutil.rmtree(prepared.parent / "out/sweeps")
    cache = open_folder(prepared.parent / "out/cache")
    spec = read_spec(cache)  # and as if it had been made again, from another teacher
    cache.write("cache.json", replace(spec, teacher={**spec.teacher, "weights_digest": "0" * 32}).to_json())
    status, _, err = call("sweep", path)
    assert status == 2 and "holds a run from another cache (teacher weights" in err


def test_a_cache_that_changes_while_the_sweep_runs(prepared: Path) -> None:
    """The next run sees it before it begins."""
    (run,) = load_sweep(write_sweep(prepared)).expand()
    outcome = run_one(Job(run, prepared, cache="what the sweep began with", threads=1, log=None))
    assert outcome.status == "cache changed" and not (prepared.parent / "out/distill").exists()


def test_settings_that_the_cache_was_not_made_with(prepared: Path) -> None:
    """Varying tau over one cache would train all students on the same targets."""
    path = write_sweep(prepared, grid={"cache.tau": [0.02, 0.01]})
    status, _, err = call("sweep", path)
    assert status == 2 and "tau 0.02 there, 0.01 here" in err and "vary cache.path" in err
    assert not (prepared.parent / "out/distill").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"grid": {"distill.gama": [1]}}, "distill.gama: unknown key; did you mean gamma?"),
        ({"set": {"distil.gamma": 1}}, "distil: unknown key; did you mean distill?"),
        ({"grid": {"distill.gamma": [-1]}}, "(gamma=-1): distill.gamma: Input should be greater"),
        ({"manifest": "nothing.yaml"}, "no such manifest"),
        (
            {"grid": {"distill.gamma": list(range(100)), "distill.steps": list(range(100))}},
            "10,000 runs, more than 200; add --yes",
        ),
    ],
)
def test_refused_before_anything_is_run(prepared: Path, values: dict[str, Any], expected: str) -> None:
    status, _, err = call("sweep", write_sweep(prepared, **values))
    assert status == 2 and expected in err and len(err.splitlines()) == 1
    assert not (prepared.parent / "out/sweeps").exists()


def test_dry_run_and_options(prepared: Path) -> None:
    path = write_sweep(prepared, **GRID)
    status, shown, said = call("sweep", path, "--dry-run")
    assert status == 0 and "mixing=natural" in shown and "0 of 4 runs are finished" in said
    assert not (prepared.parent / "out/sweeps").exists()
    assert "use one of local, ray" in call("sweep", path, "--engine", "rya")[2]
    assert "at least 1" in call("sweep", path, "--parallel", "0")[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_two_at_once_over_one_cache_one_of_them_on_ray(prepared: Path) -> None:
    """Each gives what it gives alone; Ray's workers need no teacher either."""
    alone, local, far = (write_sweep(prepared, name=name, **GRID) for name in ("alone", "local", "far"))
    children = [
        start("sweep", far, "--engine", "ray", "--parallel", "2", "--threads", "1"),
        start("sweep", local, "--threads", "1"),
    ]
    for child in children:
        _, err = child.communicate(timeout=280)
        assert child.returncode == 0, err
    sweep(alone, Request(threads=1))
    expected = [without_names(row) for row in results(prepared.parent, "alone")]
    for name in ("local", "far"):
        assert [without_names(row) for row in results(prepared.parent, name)] == expected


def without_names(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != "run"}


def test_one_at_a_time(prepared: Path) -> None:
    """A second process that runs the same sweep would write into the same folders."""
    import fcntl

    path = write_sweep(prepared)
    lock = prepared.parent / "out/sweeps/rules/lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = call("sweep", path)
    assert status == 2 and "another process runs this sweep" in err
