"""keep_layers, distill, evaluate, on 42 architectures: the student read back is the one that was trained, or none is."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, Architecture, make_teacher
from tiny import make_tokenizer, write_jsonl, write_project

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.evaluate import Request, evaluate

WINDOWS = 2  # of each domain, measured by both
APART = 1e-4  # nats per token, in float32


def outcome_of(architecture: Architecture, folder: Path) -> str:
    """Caches, trains two steps and evaluates: "equal", by how much the CE differs, or why it was refused."""
    tokenizer = make_tokenizer(folder / "teacher")
    teacher = make_teacher(architecture, folder / "teacher", vocab_size=len(tokenizer.get_vocab()))
    loop: dict[str, Any] = {
        "steps": 2,
        "batch_tokens": 64,
        "interval_steps": 2,
        "validation_windows": WINDOWS,
        "validation_budget": None,  # the windows that are evaluated, all of them
    }
    path = write_project(folder, teacher, student={"keep_layers": list(architecture.keep)}, distill=loop)
    for name in ("code", "plays"):
        write_jsonl(folder / "text" / f"{name}.jsonl", [{"text": f"{name} {i} " * 20} for i in range(6)])
    project = load_project(path)
    cache_teacher(project)
    try:
        distill(project)
    except DdkError as refusal:
        assert not (project.run / "steps.jsonl").exists(), "refused, and yet a step was taken"
        return str(refusal)
    rows = [row for row in read_rows(project.run, "validation") if row["step"] == 2]
    found = evaluate(project.run, Request(windows=WINDOWS))["builtin"]["domains"]
    apart = max(abs(found[row["domain"]]["student_ce"] - row["student_ce"]) for row in rows)
    return "equal" if apart < APART else f"{apart:.3g} nats per token apart"


def test_there_are_42_of_them_each_once() -> None:
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES) == 42


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_the_saved_student_is_the_one_that_was_trained_or_is_refused_before_step_1(
    architecture: Architecture,
    ram: Path,
    record_property: Any,
) -> None:
    with tempfile.TemporaryDirectory(dir=ram) as folder:
        outcome = outcome_of(architecture, Path(folder))
    record_property(
        "outcome", f"{architecture.name:18} {outcome.partition('; ')[0]}"
    )  # conftest.py prints them
    assert re.search(architecture.refused or "^equal$", outcome)
