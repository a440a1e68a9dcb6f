"""A corpus in parts: the same tokens whoever makes them, and nothing made twice after a stop."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.text import SPLITS
from ddk_pipe.pipeline.text.sources import parts
from ddk_pipe.stages.prepare import crews, prepare

MakeProject = Callable[..., Path]
DOCUMENTS = 1500


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FIRST_BYTES", 2000)
    monkeypatch.setattr(parts, "MOST_BYTES", 8000)


@pytest.fixture
def corpus(make_project: MakeProject, tmp_path: Path) -> Path:
    """A manifest of two domains of some hundred kilobytes, one of which has validation text of its own."""
    drawn = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "1", "22", "def f(x):", "return"]
    for name in ("code", "plays", "held"):
        lines = (" ".join(drawn.choices(words, k=drawn.randrange(1, 40))) for _ in range(DOCUMENTS))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    domains = {"code": {"train": "code.jsonl"}, "plays": {"train": "plays.jsonl", "validation": "held.jsonl"}}
    return make_project(domains=domains, prepare={"max_validation_windows": 40})


def tokens(manifest: Path, output: str = "out") -> dict[str, tuple[str, int]]:
    """The digest and number of windows of each split, and that nothing else is there."""
    found = {}
    for name in ("code", "plays"):
        folder = manifest.parent / output / "tokens" / name
        assert sorted(path.name for path in folder.iterdir()) == sorted(SPLITS)
        for split in SPLITS:
            facts = json.loads((folder / split / "zarr.json").read_text())["attributes"]["facts"]
            found[f"{name}/{split}"] = facts["digest"], facts["windows"]
    return found


class Counting(crews.Alone):
    """Counts the parts that it is asked for, and fails at one."""

    made = 0
    fails_at: int | None = None

    def submit(self, job: crews.Job) -> Any:
        if Counting.made == Counting.fails_at:
            raise KeyboardInterrupt
        Counting.made += 1
        return super().submit(job)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(crews, "Alone", Counting)
    Counting.made, Counting.fails_at = 0, None
    return Counting


def test_a_stopped_run_goes_on_with_the_parts_that_are_missing(
    corpus: Path, counting: type[Counting]
) -> None:
    prepare(load_project(corpus, ["output=whole"]))
    total, counting.made, counting.fails_at = counting.made, 0, 11
    with pytest.raises(KeyboardInterrupt):
        prepare(load_project(corpus))
    assert len(list((corpus.parent / "out/tokens/code/parts").glob("*.arrow"))) == 11 < total
    counting.fails_at = None
    prepare(load_project(corpus))
    assert counting.made == total  # eleven before, the others now
    assert tokens(corpus) == tokens(corpus, "whole")
    counting.made = 0
    left = corpus.parent / "out/tokens/code/parts/left.arrow"
    left.parent.mkdir()
    left.touch()  # as by a kill right after the splits were there
    prepare(load_project(corpus))
    assert counting.made == 0 and not left.parent.exists()


def test_a_split_that_is_full_reads_no_further(corpus: Path, counting: type[Counting]) -> None:
    prepare(load_project(corpus, ["output=whole"]))
    total, counting.made = counting.made, 0
    prepare(load_project(corpus, ["prepare.max_train_windows=3", "prepare.max_validation_windows=1"]))
    assert counting.made < total / 2


def test_a_mended_file_is_read_again_and_others_are_not(corpus: Path, counting: type[Counting]) -> None:
    path = corpus.parent / "plays.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], '{"text": 5}\n']))
    with pytest.raises(DdkError, match=rf"plays\.jsonl:{DOCUMENTS}: "):
        prepare(load_project(corpus))
    held = len(list((corpus.parent / "out/tokens/plays/parts").glob("*.arrow")))
    path.write_text("".join(lines))
    counting.made = 0
    prepare(load_project(corpus))
    of_plays = counting.made
    shutil.rmtree(corpus.parent / "out/tokens/plays")
    counting.made = 0
    prepare(load_project(corpus))
    assert 0 < of_plays < counting.made <= of_plays + held  # the validation text was tokenised before


def test_a_damaged_part_is_named(corpus: Path, counting: type[Counting]) -> None:
    counting.fails_at = 5
    with pytest.raises(KeyboardInterrupt):
        prepare(load_project(corpus))
    part = next((corpus.parent / "out/tokens/code/parts").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-20])
    counting.fails_at = None
    with pytest.raises(DdkError, match=rf"{part}: a damaged file of tokens .*; delete it"):
        prepare(load_project(corpus))


@pytest.mark.parametrize("sets", [{"engine": "spark"}, {"workers": 0}])
def test_a_crew_that_does_not_exist(corpus: Path, sets: dict[str, Any]) -> None:
    with pytest.raises(DdkError, match=r"--engine spark: unknown|--workers 0: must be at least 1"):
        prepare(load_project(corpus), **sets)


@pytest.mark.slow
def test_tokens_of_two_processes_are_those_of_one(corpus: Path) -> None:
    """Errors are those of one, too: the first in the order of the text."""
    prepare(load_project(corpus, ["output=whole"]))
    prepare(load_project(corpus), workers=2)
    assert tokens(corpus) == tokens(corpus, "whole")
    path = corpus.parent / "code.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[700] = lines[1400] = '{"text": 5}\n'
    path.write_text("".join(lines))
    with pytest.raises(DdkError, match=r"code\.jsonl:701: "):
        prepare(load_project(corpus), workers=2)


def command(manifest: Path, *arguments: str) -> list[str]:
    """The real command, with small parts."""
    program = (
        "from ddk_pipe.pipeline.text.sources import parts\n"
        "parts.FIRST_BYTES, parts.MOST_BYTES = 2000, 8000\n"
        "if __name__ == '__main__':\n"
        "    from ddk_pipe.stages.cli.program import main\n"
        "    main()\n"
    )
    file = manifest.with_name("small_parts.py")
    file.write_text(program)
    return [sys.executable, "-P", str(file), "prepare", str(manifest), *arguments]


@pytest.mark.slow
def test_killed_again_and_again_with_other_numbers_of_workers(corpus: Path) -> None:
    """kill -9 leaves no worker behind and nothing that a later run would trip over."""
    prepare(load_project(corpus, ["output=whole"]))
    folder, drawn = corpus.parent / "out/tokens", random.Random()
    for workers in ("2", "1"):
        held = len(list(folder.rglob("*.arrow")))
        child = subprocess.Popen(command(corpus, "--workers", workers), stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while child.poll() is None and len(list(folder.rglob("*.arrow"))) <= held + drawn.randrange(4):
            assert time.monotonic() < end
            time.sleep(0.005)
        family = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        child.send_signal(signal.SIGKILL)
        child.communicate()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    prepare(load_project(corpus))
    assert not list(folder.rglob("*.arrow"))
    for name in ("code", "plays"):
        for path in (folder / name).glob(".*partial"):  # of splits that were being packed
            shutil.rmtree(path)
    assert tokens(corpus) == tokens(corpus, "whole")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line_and_the_next_run_goes_on(corpus: Path) -> None:
    child = subprocess.Popen(command(corpus, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    folder, end = corpus.parent / "out/tokens", time.monotonic() + 120
    while not list(folder.rglob("*.arrow")):
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    workers = [one for one in psutil.Process(child.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    said = child.communicate(timeout=120)[1]
    if child.returncode:  # else it was killed when everything was done
        assert child.returncode == 2 and "Traceback" not in said
        assert re.search(r"^ddk-pipe: prepare: a worker process died; is there memory", said, re.MULTILINE)
    prepare(load_project(corpus))
    prepare(load_project(corpus, ["output=whole"]))
    assert tokens(corpus) == tokens(corpus, "whole")
