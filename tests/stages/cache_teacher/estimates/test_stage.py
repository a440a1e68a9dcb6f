"""`ddk-pipe estimate`: its figures against real caches, its table and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeProject
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import committed, read_spec
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cache_teacher import estimate
from ddk_pipe.stages.cache_teacher.estimates.settings import TAUS
from ddk_pipe.stages.cli import app

runner = CliRunner()


@pytest.fixture
def project(make_project: MakeProject) -> Path:
    return make_project(prepare={"max_train_windows": 40, "max_validation_windows": 4})


@pytest.mark.slow
def test_sizes_are_those_of_the_cache(project: Path) -> None:
    """Estimated from a part of the windows, against the cache that cache-teacher then writes."""
    from ddk_pipe.stages.cache_teacher import cache_teacher

    loaded = load_project(project)
    found = estimate(loaded, windows=20)
    assert not loaded.cache.exists("cache.json")
    cache_teacher(loaded)
    records = [record for _, record in committed(loaded.cache, read_spec(loaded.cache))]
    labels = sum(record.positions for record in records)
    total = sum(len(loaded.cache.read(name)) for name in loaded.cache.names() if name != "cache.json")
    row = found.rows[0]
    assert found.labels == labels and found.positions == sum(32 * record.windows for record in records)
    assert row.bytes_per_position == pytest.approx(sum(r.target_bytes for r in records) / labels, rel=0.04)
    assert row.entries_per_position == pytest.approx(sum(r.entries for r in records) / labels, rel=0.08)
    assert row.total_bytes == pytest.approx(total, rel=0.05)
    assert row.teacher_seconds == pytest.approx(found.positions / row.positions_per_second)


def shown(*arguments: object) -> Any:
    return runner.invoke(app, ["estimate", *map(str, arguments)], catch_exceptions=False)


def test_the_table_and_the_line_for_the_manifest(project: Path) -> None:
    result = shown(project, "--windows", 4)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 140
    assert "pps, tau 0.02 (yours)" in result.stdout and "recommended: pps, tau" in result.stdout
    assert "in the manifest: cache: {scheme: pps, tau: 0." in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["random", "threshold", "topk"])
def test_other_schemes_stand_beside_the_ladder(project: Path, scheme: str) -> None:
    result = shown(project, "--windows", 2, "--json", "--set", f"cache.scheme={scheme}")
    found = json.loads(result.stdout)
    own, *ladder = found["rows"]
    assert own["cache"]["scheme"] == scheme and own["name"].startswith(scheme)
    assert [row["cache"] for row in ladder] == [{"scheme": "pps", "tau": tau} for tau in TAUS]
    assert (own["added_noise"] > 0) == (scheme == "random")
    quiet = [row for row in ladder if row["added_noise"] <= 0.01]
    assert found["recommended"] == quiet[0]["name"]
    sizes = [row["entries_per_position"] for row in ladder]
    assert sizes == sorted(sizes) and all(row["bytes_per_position"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_several_temperatures_are_all_paid_for(project: Path) -> None:
    one, two = (
        json.loads(shown(project, "--windows", 2, "--json", "--set", f"cache.temperatures={t}").stdout)
        for t in ("[1.0]", "[1.0, 2.0]")
    )
    assert two["rows"][0]["entries_per_position"] > 1.5 * one["rows"][0]["entries_per_position"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--windows", 1), "--windows 1: at least 2"),
        (("--set", "teacher.model=nobody/nothing"), "neither a folder nor to be had"),
        (("--set", "seq_len=512"), "beyond teacher.model's 256 positions"),
    ],
)
def test_mistakes(project: Path, arguments: tuple[object, ...], expected: str) -> None:
    result = shown(project, *arguments)
    assert result.exit_code == 2 and expected in result.stderr and not result.stdout
