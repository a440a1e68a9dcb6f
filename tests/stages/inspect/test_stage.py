"""`ddk-pipe inspect` on caches: figures that fit the records, on one screen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from caches import fill, make_plan, make_spec
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import committed
from ddk_pipe.pipeline.storage import LocalFolder, open_folder
from ddk_pipe.stages.cli import app

runner = CliRunner()


def cells(place: object, title: str) -> dict[str, dict[str, str]]:
    """The table under `title`: row name -> column -> text. Every line fits into 100 columns."""
    result = runner.invoke(app, ["inspect", str(place)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 100
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    rows = []
    for line in lines[start + 1 :]:
        if line.startswith(("┃", "│")):
            rows.append([cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")])
        if line.startswith("└"):
            break
    header = rows[0]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_masses_and_bytes(tmp_path: Path, scheme: str) -> None:
    folder = LocalFolder(tmp_path / "cache")
    writer = fill(folder, make_spec(make_plan(scheme, temperatures=(1.0,))))
    records = [r for shard, r in committed(folder, writer.spec) if shard.domain == "code"]
    positions = sum(record.positions for record in records)
    parts = cells(folder.name, "bytes/position by part")["code"]
    whole = sum(sum(record.sizes.values()) for record in records) / positions
    assert float(parts["all"]) == pytest.approx(whole, abs=0.01)
    assert sum(float(parts[name]) for name in parts if name not in ("domain", "all")) == pytest.approx(
        whole, abs=0.1
    )
    expected = {"pps": {"draws"}, "threshold": {"tails"}, "topk": {"tails"}, "random": set()}[scheme]
    assert set(parts) & {"draws", "tails"} == expected
    kept = cells(folder.name, "targets at temperature 1")["code"]
    head, rest, tail = (float(kept[name]) for name in ("head mass", "rest", "tail"))
    assert head + rest + tail == pytest.approx(1, abs=2e-3)
    assert (head > 0) == (scheme != "random") and (tail > 0) == (scheme in ("threshold", "topk"))
    assert (rest > 0) == (scheme in ("pps", "random"))
    quantiles = [int(kept[f"entries {share}"]) for share in ("10%", "50%", "90%")]
    assert quantiles == sorted(quantiles) and quantiles[0] >= 1
    assert kept["positions"] == f"{positions:,}"  # fewer windows than the sample may have


def test_each_temperature_and_the_teachers_perplexity(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "cache")
    writer = fill(folder)
    title = "shards:"
    row = cells(folder.name, title)["code/train"]
    mine = [
        r for shard, r in committed(folder, writer.spec) if (shard.domain, shard.split) == ("code", "train")
    ]
    nats = sum(record.label_nats for record in mine) / sum(record.positions for record in mine)
    assert row["nats"] == f"{nats:.3f}" and row["perplexity"] == f"{math.exp(nats):,.5g}"
    assert row["shards"] == "3 of 3"
    assert cells(folder.name, "targets at temperature 1")
    assert cells(folder.name, "targets at temperature 2")


def test_a_cache_without_shards(tmp_path: Path) -> None:
    from caches import open_writer

    folder = LocalFolder(tmp_path / "cache")
    open_writer(folder, make_spec(make_plan()))
    assert cells(folder.name, "shards:")["plays/train"]["shards"] == "0 of 3"


def test_in_an_object_store(s3_url: str) -> None:
    fill(open_folder(s3_url), make_spec(make_plan(temperatures=(1.0,))))
    assert cells(s3_url, "targets at temperature 1")["plays"]["head mass"] != ""
