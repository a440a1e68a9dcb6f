"""No way into the teacher's engine touches CUDA before the variables are set that let vLLM start there."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_questions import Noted, run
from tiny import MakeProject

from ddk_pipe.stages.common.machine import BEFORE_CUDA

OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # as on a GPU
pytestmark = pytest.mark.slow


def engines_in(noted: list[Noted]) -> int:
    return sum(each.event == "engine" for each in noted)


@pytest.mark.parametrize(
    ("more", "environment", "engines"),
    [
        ([], {}, 1),
        ([], OWN_PROCESS, 1),
        (["--workers", "2"], OWN_PROCESS, 2),
    ],
)
def test_nothing_asks_for_a_gpu_before_the_variables_are_set(
    make_project: MakeProject, tmp_path: Path, more: list[str], environment: dict[str, str], engines: int
) -> None:
    asked = ["cache-teacher", make_project(), "--set", "teacher.backend=vllm", *more]
    noted, said = run(*asked, notes=tmp_path / "notes", **environment)
    assert "the stand-in serves nobody" in said, said
    assert engines_in(noted) == engines
    for each in noted:
        assert each.variables == BEFORE_CUDA, each
        assert not each.touched, "an engine that was forked from such a process dies"


def test_what_the_user_has_set_wins(make_project: MakeProject, tmp_path: Path) -> None:
    forked = {"VLLM_WORKER_MULTIPROC_METHOD": "fork", "PYTORCH_NVML_BASED_CUDA_CHECK": "0"}
    asked = ["cache-teacher", make_project(), "--set", "teacher.backend=vllm"]
    noted, _ = run(*asked, notes=tmp_path / "notes", **OWN_PROCESS, **forked)
    engine = noted[-1]
    assert engine.event == "engine" and engine.variables == {**BEFORE_CUDA, **forked}
    assert engine.touched, "what the stand-ins are there to show"
