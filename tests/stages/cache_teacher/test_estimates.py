"""`ddk-pipe estimate`: its figures against real caches, and the noise against the dense distribution."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import make_plan
from tiny import MakeProject
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import committed, read_spec
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.targets import Codec, Context, Plan, Ranks, SparseTargets, encode_log, select
from ddk_pipe.stages.cache_teacher import estimate
from ddk_pipe.stages.cache_teacher.estimates import TAUS, added_noise, size_text
from ddk_pipe.stages.cli.app import app

ROWS, VOCAB = 6000, 300
runner = CliRunner()


def dense(spread: float) -> torch.Tensor:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    return torch.log_softmax(logits, dim=1)


def drawn(log_p: torch.Tensor, plan: Plan, seed: int) -> SparseTargets:
    uniforms = np.random.default_rng(seed).random((len(log_p), plan.uniforms_per_position))
    return select(log_p.exp(), plan, torch.from_numpy(uniforms))


def coded(log_p: torch.Tensor, plan: Plan, seed: int) -> SparseTargets:
    """As a student reads them: the rounding of the codec included."""
    codec = Codec(plan, Ranks.fit(np.arange(VOCAB)))
    labels = log_p.argmax(1)
    codes = encode_log(log_p.gather(1, labels[:, None])[:, 0].numpy())
    context = Context(labels.numpy(), codes, f"window {seed}")
    return codec.decode(codec.encode(drawn(log_p, plan, seed), context), context)


def plans(tau: float) -> tuple[Plan, Plan, Plan]:
    first = make_plan(tau=tau, draws=50, temperatures=(1.0,))
    return first, replace(first, tau=0.01), replace(first, tau=0.02)


def systematic_variance(log_p: torch.Tensor, tau: float) -> float:
    """Exactly what `pps` adds: a token of the rest comes floor(p/s) or one time more, s = R/n the share of a draw."""
    p = log_p.double().exp().numpy()
    rest = np.where(p < tau, p, 0.0)
    mass = rest.sum(1, keepdims=True)
    share = mass / np.maximum(np.ceil(mass / tau), 1)
    times = rest / np.maximum(share, 1e-300)
    chance = times - np.floor(times)
    return float((share**2 * chance * (1 - chance)).sum() / (1 - (p**2).sum(1)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.5, 3.0])
@pytest.mark.parametrize("tau", [0.05, 0.02, 0.005])
def test_noise_of_pps_is_that_of_the_dense_distribution(spread: float, tau: float) -> None:
    log_p = dense(spread)
    targets = [drawn(log_p, plan, seed) for seed, plan in enumerate(plans(tau))]
    assert added_noise(*targets) == pytest.approx(systematic_variance(log_p, tau), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [20, 50])
def test_noise_of_random_sampling_is_one_nth(draws: int) -> None:
    log_p = dense(2.0)
    own, *others = plans(0.02)
    targets = [drawn(log_p, replace(own, scheme="random", draws=draws), 5)]
    targets += [drawn(log_p, plan, seed) for seed, plan in enumerate(others)]
    assert added_noise(*targets) == pytest.approx(1 / draws, rel=0.05)


@pytest.mark.slow
def test_rounding_of_the_codec_is_part_of_the_noise() -> None:
    log_p = dense(3.0)
    raw = added_noise(*(drawn(log_p, plan, seed) for seed, plan in enumerate(plans(0.005))))
    rounded = added_noise(*(coded(log_p, plan, seed) for seed, plan in enumerate(plans(0.005))))
    assert rounded > raw


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
    assert row.bytes_per_position == pytest.approx(sum(r.target_bytes for r in records) / labels, rel=0.08)
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


def test_sizes_for_people() -> None:
    assert [size_text(size) for size in (999.0, 1.5e3, 2.5e9, 3e15)] == [
        "999 B",
        "1.5 kB",
        "2.5 GB",
        "3e+03 TB",
    ]
