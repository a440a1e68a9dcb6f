"""Every part of the GPU benchmark at toy sizes on the CPU, and what it says where there is no card."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

NAMES = {
    "loss": {
        "three products alone",
        "CE on full logits",
        "ours",
        "F.linear_cross_entropy",
        "QuACK linear CE",
    },
    "step": {"ours", "ce_only"},
    "teacher": {"bare forward", "decoder", "output layer", "select", "cache-teacher"},
}
# what the CPU has, or every machine of the tests
MUST_RUN = {**NAMES, "loss": {"three products alone", "CE on full logits", "ours"}}


def result(part: str, device: str, folder: Path) -> dict[str, Any]:
    path = folder / "gpu" / f"{part}.json"
    import_module(f"gpu.{part}").run(device, path, rounds=1, peers=None)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", list(NAMES))
def test_a_part_runs_at_toy_sizes_and_judges_nothing(part: str, tmp_path: Path) -> None:
    found = result(part, "cpu", tmp_path)
    rows = {row.get("method", row["name"]): row for row in found["rows"]}
    assert rows.keys() >= NAMES[part]
    for name in MUST_RUN[part]:
        assert "not run" not in rows[name], rows[name]
        rate = rows[name].get("seconds_median") or rows[name]["positions_per_second"]
        assert rate > 0
    assert found["goals"] and "toy" in found
    for line in found["goals"]:
        assert line["met"] is None and line["value"].startswith("not judged: on a CPU"), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("part", list(NAMES))
def test_a_machine_without_a_card_says_so(part: str, tmp_path: Path) -> None:
    found = result(part, "cuda", tmp_path)
    assert found["rows"] and {row["status"] for row in found["rows"]} == {"not run: no CUDA device"}
    assert found["goals"]
    assert {(line["value"], line["met"]) for line in found["goals"]} == {("not run: no CUDA device", None)}
