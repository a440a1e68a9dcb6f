"""The stage's operations: parts of the work, dry runs, what it says, and how it stops."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openers import Fails, Wrapped
from same_bytes import groups, shard_contents
from tiny import MakeProject, break_weights
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CacheWriter
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.cache_teacher import Request, cache_teacher, local, maker
from ddk_pipe.stages.cache_teacher.status import StatusStream
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.teachers import Window, open_teacher


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return load_project(make_project())


def cache_of(project: Project) -> Path:
    return project.output / "cache"


def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("ddk_pipe.stages.cache_teacher.plan.open_teacher", never)


def wrap(monkeypatch: pytest.MonkeyPatch, before: Callable[[list[Window]], None]) -> None:
    monkeypatch.setattr(
        "ddk_pipe.stages.cache_teacher.plan.open_teacher",
        lambda *arguments, **options: Wrapped(before, open_teacher(*arguments, **options)),
    )


# --- parts of the work ----------------------------------------------------------------------------


@pytest.mark.slow
def test_one_shard_at_a_time_makes_the_same_bytes(
    project: Project, cached_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cached_output` was made with the teacher, the encoder and the disk at work at once."""
    monkeypatch.setattr(local, "DEPTH", 1)
    cache_teacher(project)
    assert shard_contents(cache_of(project)) == shard_contents(cached_output / "cache")


def test_limit_and_domains(project: Project, cached_output: Path) -> None:
    outcome = cache_teacher(project, Request(limit=2))
    assert outcome.shards_done == 2 and len(shard_contents(cache_of(project))) == 2
    cache_teacher(project, Request(domains=("plays",)))
    there = shard_contents(cache_of(project))
    whole = shard_contents(cached_output / "cache")
    plays = {name for name in whole if name.startswith("plays/")}
    assert plays < set(there) < set(whole) and all(there[name] == whole[name] for name in there)
    with pytest.raises(DdkError, match=r"--domains: no domain play; the manifest has code, plays"):
        cache_teacher(project, Request(domains=("play",)))


def test_dry_run_writes_nothing_and_loads_no_teacher(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_teacher(monkeypatch)
    outcome = cache_teacher(project, Request(dry_run=True, limit=3))
    said = capsys.readouterr().err
    assert "would predict 3 of" in said and "GB free there" in said and "would load" in said
    assert outcome.shards_done == 0 and not cache_of(project).exists()


def test_dry_run_sees_a_cache_of_other_settings(cached: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cached.parent.rglob("*")}
    with pytest.raises(DdkError, match=r"made with another selection \(tau 0\.02 there, 0\.1 here\)"):
        cache_teacher(load_project(cached, ["cache.tau=0.1"]), Request(dry_run=True))
    assert before == {path: path.stat().st_mtime_ns for path in cached.parent.rglob("*")}
    cache_teacher(load_project(cached), Request(dry_run=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--engine", "dask"], "--engine dask: unknown; use one of local, ray"),
        (["--domains", "code,prose"], "--domains: no domain prose"),
    ],
)
def test_requests_that_cannot_be(make_project: MakeProject, arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["cache-teacher", str(make_project()), *arguments])
    assert result.exit_code == 2 and expected in result.stderr


def test_commands_take_the_options(make_project: MakeProject, tmp_path: Path) -> None:
    status = tmp_path / "logs" / "status.jsonl"
    options = ["--domains", "code, plays", "--limit", "2", "--status", str(status), "--workers", "1"]
    result = CliRunner().invoke(app, ["cache-teacher", str(make_project()), *options])
    assert result.exit_code == 0, result.stderr
    assert len(shard_contents(tmp_path / "out" / "cache")) == 2
    assert json.loads(status.read_text().splitlines()[-1])["event"] == "finished"


# --- what it says ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_status_stream_and_shard_lines(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "status.jsonl"
    cache_teacher(project, Request(status=path, limit=3))
    cache_teacher(project, Request(status=path))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:5] == ["started", "shard", "shard", "shard", "finished"]
    total = len(shard_contents(cache_of(project)))
    shards = [event for event in events if event["event"] == "shard"]
    assert [event["done"] for event in shards] == list(range(1, total + 1))
    assert {event["total"] for event in events} == {total}
    for event in shards:
        assert event["positions_per_second"] > 0 and event["bytes_per_position"] > 0
        assert event["time"].endswith("+00:00") and event["teacher_waited_seconds"] >= 0
    assert (
        shards[2]["eta_seconds"] > 0 and shards[-1]["eta_seconds"] == 0
    )  # of the whole cache, not of the limit
    lines = [line for line in capsys.readouterr().err.splitlines() if " shards, ETA " in line]
    assert len(lines) == total
    assert "code/validation/00000: " in lines[0] and f"1 of {total} shards, ETA" in lines[0]


def test_no_stream_without_a_file(tmp_path: Path) -> None:
    StatusStream(None).send("nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_teacher_waits_for_a_slow_disk_and_says_so(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While nothing can be written, DEPTH shards are predicted and no more."""
    real, disk, predicted = CacheWriter.write, threading.Event(), list[str]()

    def note(windows: list[Window]) -> None:
        predicted.extend({window.key.rpartition("/")[0] for window in windows} - set(predicted))

    def write(self: CacheWriter, *arguments: Any) -> Any:
        disk.wait()
        return real(self, *arguments)

    def release() -> None:
        held.extend(name for name in predicted if not name.startswith("sample/"))
        disk.set()

    held: list[str] = []
    wrap(monkeypatch, note)
    monkeypatch.setattr(CacheWriter, "write", write)
    timer = threading.Timer(5.0, release)
    timer.start()
    cache_teacher(project, Request(limit=8))
    assert len(held) == maker.DEPTH
    assert "for the disk" in capsys.readouterr().err


# --- what goes wrong ------------------------------------------------------------------------------


def test_nan_names_window_and_model_and_commits_nothing(
    project: Project, tiny_teacher: Path, tmp_path: Path
) -> None:
    broken = break_weights(tiny_teacher, tmp_path / "broken")
    status = tmp_path / "status.jsonl"
    project = load_project(project.root / "manifest.yaml", [f"teacher.model={broken}"])
    # which shard comes first to the teacher is up to the threads; both domains are broken
    with pytest.raises(DdkError, match=rf"window \S*(code|plays)/\S+: .* NaN or infinity \(model {broken}\)"):
        cache_teacher(project, Request(status=status))
    assert not shard_contents(cache_of(project)) and not groups(cache_of(project))
    last = json.loads(status.read_text().splitlines()[-1])
    assert last["event"] == "failed" and "NaN" in last["error"]


@pytest.mark.slow
def test_a_teacher_that_fails_on_the_way_leaves_what_was_before(
    project: Project, cached_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(windows: list[Window]) -> None:
        if any(window.key.startswith("code/train/2/") for window in windows):
            raise DdkError("window code/train/2/32: NaN", hint="none")

    wrap(monkeypatch, fail)
    with pytest.raises(DdkError, match="code/train/2/32"):
        cache_teacher(project)
    whole, there = shard_contents(cached_output / "cache"), shard_contents(cache_of(project))
    assert {f"{name}/validation/00000.json" for name in ("code", "plays")} < set(there) < set(whole)
    assert "code/train/00001.json" in there and "code/train/00002.json" not in there
    monkeypatch.undo()
    cache_teacher(project)
    assert shard_contents(cache_of(project)) == whole


@pytest.mark.slow
def test_an_error_of_the_writer_stops_the_teacher(
    project: Project, cached_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = CacheWriter.write, []
    lock = threading.Lock()

    def write(self: CacheWriter, shard: Any, *arguments: Any) -> Any:
        with lock:
            calls.append(shard)
            second = len(calls) == 2
        if second:
            raise OSError(5, "Input/output error", "/the/disk")
        return real(self, shard, *arguments)

    monkeypatch.setattr(CacheWriter, "write", write)
    with pytest.raises(OSError, match="Input/output error"):
        cache_teacher(project)
    assert len(calls) <= 2 + maker.DEPTH
    assert len(shard_contents(cache_of(project))) == len(groups(cache_of(project))) == len(calls) - 1
    monkeypatch.undo()
    cache_teacher(project)
    assert shard_contents(cache_of(project)) == shard_contents(cached_output / "cache")


def test_ctrl_c_writes_what_the_teacher_is_done_with(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(windows: list[Window]) -> None:
        if windows[0].key.startswith("code/train/1/"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    wrap(monkeypatch, interrupt)
    monkeypatch.setattr("ddk_pipe.stages.common.stopping._leave_after", lambda seconds, status: None)
    status = tmp_path / "status.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(project, Request(status=status))
    there = set(shard_contents(cache_of(project)))
    assert "code/train/00000.json" in there and "code/train/00002.json" not in there
    events = [json.loads(line) for line in status.read_text().splitlines()]
    assert events[-1]["event"] == "interrupted"
    assert len([event for event in events if event["event"] == "shard"]) == len(there)


def test_what_does_not_end_is_left_in_time() -> None:
    code = (
        "import os, signal, time, threading\n"
        "from ddk_pipe.stages.common.stopping import stops_in_time\n"
        "def long():\n    time.sleep(60)\n"
        "thread = threading.Thread(target=long); thread.start()\n"
        "with stops_in_time(0.5):\n    os.kill(os.getpid(), signal.SIGTERM); thread.join()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=50)
    assert done.returncode == 143 and time.monotonic() - began < 40


# --- an engine that fails -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workers", ["1", pytest.param("2", marks=pytest.mark.slow)], ids=["here", "in two processes"]
)
def test_an_engine_that_fails_is_one_line(
    make_project: MakeProject,
    cached_output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    workers: str,
) -> None:
    """At the second shard of a domain; a sound one then goes on from what is committed."""
    path, words = make_project(), "int8_scaled_mm_with_quant: expect A to be bfloat16 or half."
    arguments = ["cache-teacher", str(path), "--workers", workers]
    with monkeypatch.context() as patch:
        patch.setattr(
            "ddk_pipe.stages.cache_teacher.plan.open_teacher", Fails(shard="code/train/1/", words=words)
        )
        result = CliRunner().invoke(app, arguments)
    said = [line for line in result.output.splitlines() if line.startswith("ddk-pipe:")]
    assert result.exit_code == 2 and len(said) == 1
    assert f" in float32 ({words}); set teacher.dtype: bfloat16, or backend: vllm" in said[0]
    assert "Traceback" not in result.output + capfd.readouterr().err
    cache = path.parent / "out" / "cache"
    committed = shard_contents(cache)
    assert "code/train/00001.json" not in committed and len(committed) < 20
    assert len(groups(cache)) == len(committed), "nothing is half written"
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert shard_contents(cache) == shard_contents(cached_output / "cache")


def test_a_slip_of_ours_keeps_its_traceback_across_processes() -> None:
    def slip() -> None:
        assert False, "of ours"  # noqa: B011

    class NotPortable(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def two() -> None:
        raise NotPortable(1, 2)

    for raises, kind, words in (
        (slip, AssertionError, "of ours"),
        (two, RuntimeError, "NotPortable: 1 and 2"),
    ):
        with pytest.raises(Exception) as raised:
            raises()
        sent = pickle.loads(pickle.dumps(maker.portable(raised.value)))
        assert isinstance(sent, kind) and words in str(sent)
        assert f"in {raises.__name__}" in "".join(sent.__notes__)
    mistake = DdkError("a", hint="b")
    assert maker.portable(mistake) is mistake and not hasattr(mistake, "__notes__")
