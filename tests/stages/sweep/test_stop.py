"""The median rule: what it compares, and a sweep that stops a bad group, goes on and reports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweeps import project_without_teacher, results, write_sweep

from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.stages.report import report
from ddk_pipe.stages.report.data import load_report
from ddk_pipe.stages.sweep import Request, sweep
from ddk_pipe.stages.sweep.stop import Judge


def write_gaps(run: Path, gaps: dict[int, float]) -> Path:
    """A run whose validations found these mean gaps, over two domains."""
    record = Record(run, last_step=-1)
    for step, gap in gaps.items():
        record.add("validation", {"step": step, "domain": "code", "gap": gap - 0.5})
        record.add("validation", {"step": step, "domain": "plays", "gap": gap + 0.5})
    return run


def judge(folder: Path, mine: dict[int, float], *others: dict[int, float], **options: Any) -> Judge:
    """Of a first seed, behind groups with these gaps."""
    before = tuple(
        (write_gaps(folder / f"run{place}", gaps), folder / f"run{place}.json")
        for place, gaps in enumerate(others)
    )
    values = {"leader": None, "before": before, "first_step": 4, "others": 3, **options}
    return Judge(run=write_gaps(folder / "mine", mine), **values)


GOOD, FAIR, POOR = {0: 9.0, 4: 3.0, 8: 1.0}, {0: 9.0, 4: 4.0, 8: 2.0}, {0: 9.0, 4: 5.0, 8: 3.0}


@pytest.mark.parametrize(("gap", "expected"), [(3.9, False), (4.0, False), (4.1, True)])
def test_worse_than_the_median_of_the_others_by_that_step(tmp_path: Path, gap: float, expected: bool) -> None:
    """What the others reached later does not count."""
    assert judge(tmp_path, {0: 9.0, 4: gap}, GOOD, FAIR, POOR).is_bad(4) is expected


def test_the_best_so_far_counts_on_both_sides(tmp_path: Path) -> None:
    assert not judge(tmp_path, {0: 9.0, 4: 1.5, 8: 6.0}, GOOD, FAIR, POOR).is_bad(8)
    risen = [{0: 9.0, 4: gap, 8: 8.0} for gap in (3.0, 4.0, 5.0)]
    assert judge(tmp_path / "b", {0: 9.0, 4: 4.5, 8: 4.5}, *risen).is_bad(8)


def test_not_before_its_share_of_the_steps_and_not_by_too_few(tmp_path: Path) -> None:
    bad = {0: 9.0, 2: 8.0, 4: 8.0}
    assert not judge(tmp_path / "a", bad, *[{0: 9.0, 2: 1.0, 4: 1.0}] * 3).is_bad(2)
    assert judge(tmp_path / "b", bad, *[{0: 9.0, 2: 1.0, 4: 1.0}] * 3).is_bad(4)
    assert not judge(tmp_path / "c", bad, GOOD, FAIR).is_bad(4)
    assert not judge(tmp_path / "d", bad, GOOD, FAIR, {0: 9.0}).is_bad(4)  # the third has not come so far


def test_those_stopped_before_still_count(tmp_path: Path) -> None:
    """Else the median would be of the survivors, and ever fewer would pass."""
    found = judge(tmp_path, {0: 9.0, 4: 4.5, 8: 4.5}, GOOD, {0: 9.0, 4: 5.0}, {0: 9.0, 4: 6.0})
    assert not found.is_bad(8)  # one of three has come to step 8
    for place in (1, 2):
        (tmp_path / f"run{place}.json").write_text(json.dumps({"status": "stopped early", "step": 4}))
    assert not found.is_bad(8)  # 1, 5 and 6: better than the median
    write_gaps(tmp_path / "mine", {0: 9.0, 4: 5.5, 8: 5.5})
    assert found.is_bad(8)


def test_other_seeds_stop_where_the_first_did(tmp_path: Path) -> None:
    note = tmp_path / "first.json"
    follower = judge(tmp_path, {0: 9.0, 4: 0.1, 8: 0.1}, GOOD, FAIR, POOR, leader=note)
    note.write_text(json.dumps({"status": "stopped early", "step": 8}))
    assert not follower.is_bad(4) and follower.is_bad(8)
    note.write_text(json.dumps({"status": "finished"}))
    assert not follower.is_bad(8)
    note.unlink()
    assert not follower.is_bad(8)


@pytest.mark.slow
def test_a_sweep_stops_a_bad_group(tmp_path: Path, tiny_teacher: Path, cached_output: Path) -> None:
    """Both of its seeds, at the same step; not again when rerun; to the end when the rule is taken back."""
    distill = {"steps": 4, "batch_tokens": 64, "interval_steps": 1, "validation_windows": 1}
    manifest = project_without_teacher(tmp_path, tiny_teacher, cached_output, distill=distill)
    rates = [1e-2, 2e-2, 1e-9]
    values: dict[str, Any] = {"grid": {"distill.optimizer.learning_rate": rates}, "seeds": [0, 1]}
    path = write_sweep(manifest, **values, stop_early={"after": 0.3, "others": 2})
    sweep(path, Request(threads=1))
    rows = results(tmp_path)
    assert [(row["status"], row["steps"]) for row in rows] == [
        *[("finished", 4)] * 4,
        *[("stopped early", 2)] * 2,
    ]
    assert all(row["error"] is None and row["gap_nats"] > rows[0]["gap_nats"] for row in rows[4:])

    def touched() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out/distill").rglob("*.jsonl")}

    before = touched()
    sweep(path, Request(threads=1))
    assert touched() == before and results(tmp_path) == rows  # nothing is repeated

    place = tmp_path / "out/sweeps/rules"
    found = load_report(place)
    assert [group.name for group in found.stopped] == ["learning_rate=1e-09"]
    assert {group.name for group in found.groups} == {"learning_rate=0.01", "learning_rate=0.02"}
    assert found.unfinished == [] and (found.stopped[0].step, len(found.stopped[0].runs)) == (2, 2)
    text = report(place)[0].read_text()
    assert "Stopped early by the median rule" in text and "stopped early, at step 2" in text
    assert "4 of 6 finished, 2 stopped early" in text and "Unfinished" not in text

    for row in rows[4:]:  # killed after the checkpoint and before it was noted: the same verdict
        (place / "runs" / f"{row['run']}.json").unlink()
    sweep(path, Request(threads=1))
    assert results(tmp_path) == rows

    sweep(write_sweep(manifest, **values), Request(threads=1))
    assert [(row["status"], row["steps"]) for row in results(tmp_path)] == [("finished", 4)] * 6
