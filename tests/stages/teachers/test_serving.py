"""What engines raise becomes one line with a hint that fits; our own slips pass as they are."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError, field_validator
from tiny import make_model

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.targets import NO_LABEL, Plan
from ddk_pipe.stages.common import Unheard
from ddk_pipe.stages.teachers import Window
from ddk_pipe.stages.teachers.hf import HfTeacher
from ddk_pipe.stages.teachers.serving import SHOW, Service, reason
from ddk_pipe.stages.teachers.vllm import engine
from ddk_pipe.stages.teachers.vllm.engine import VllmTeacher
from ddk_pipe.stages.teachers.vllm.worker import SelectionExtension, noting

PLAN = Plan("topk", 0.02, 4, 64, 20, (1.0,), 0)
INT8 = "int8_scaled_mm_with_quant: expect A to be bfloat16 or half."  # vLLM 0.32.0 on a CPU with AMX
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class EngineDeadError(Exception):
    """vLLM's, by name and words."""


def raised_from(problem: Exception, cause: Exception) -> Exception:
    problem.__cause__ = cause
    return problem


# --- the reason -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError(f"{INT8}\nException raised from int8_scaled_mm_with_quant at gemm.cpp:1\nframe #0"), INT8),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory. Tried to allocate 2 GiB"),
        (NotImplementedError("no kernel"), "no kernel"),
        (NotImplementedError(), "NotImplementedError"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n  what it   is\nand more"), "what it is"),
        (EngineDeadError(DEAD), f"EngineDeadError: {DEAD}"),
        (raised_from(EngineDeadError(DEAD), RuntimeError(INT8)), INT8),
        (raised_from(RuntimeError("no such kernel"), KeyError("int8")), "no such kernel"),
    ],
)  # fmt: skip
def test_the_most_telling_words_in_one_line(problem: Exception, words: str) -> None:
    assert reason(problem) == words


def test_the_first_cause_is_asked_for_only_where_the_exception_looks_elsewhere() -> None:
    assert reason(EngineDeadError(DEAD), lambda: INT8) == INT8
    assert reason(RuntimeError("no such kernel"), lambda: INT8) == "no such kernel"


def test_words_that_pydantic_has_wrapped() -> None:
    class Config(BaseModel):
        dtype: str

        @field_validator("dtype")
        @classmethod
        def known(cls, _: str) -> str:
            raise ValueError("torch.float32 is not supported for awq.")

    with pytest.raises(ValidationError) as refused:
        Config(dtype="float32")
    assert reason(refused.value) == "torch.float32 is not supported for awq."


# --- the line -------------------------------------------------------------------------------------


def service(dtype: str = "float32", other: str = "hf") -> Service:
    return Service("vLLM 0.32.0", Path("/teacher"), dtype, other)


@pytest.mark.parametrize(
    ("dtype", "why", "hint"),
    [
        ("float32", INT8, "set teacher.dtype: bfloat16, or backend: hf"),
        ("bfloat16", "not implemented for 'BFloat16'", "set teacher.dtype: float32, or backend: hf"),
        ("float32", "CUDA out of memory", "lower teacher.batch_windows, or set teacher.dtype: bfloat16"),
        ("bfloat16", "DefaultCPUAllocator: can't allocate memory", "lower teacher.batch_windows ("),
        ("bfloat16", "_ArrayMemoryError: Unable to allocate 3 GiB", "lower teacher.batch_windows ("),
        ("bfloat16", "No available memory for the cache blocks", "raise teacher.vllm.gpu_memory_utilization"),
        ("bfloat16", "The decoder prompt (length 40) is longer than 20", "lower seq_len"),
        ("bfloat16", "A head_dtype different from the model dtype is only", "set teacher.logits: model"),
        ("bfloat16", DEAD, "see its log above; if it was killed for want of memory"),
    ],
)
def test_hints(dtype: str, why: str, hint: str) -> None:
    with pytest.raises(DdkError) as refused, service(dtype).one_line("cannot serve"):
        raise RuntimeError(why)
    line = str(refused.value)
    assert line.startswith(f"teacher.model: vLLM 0.32.0 cannot serve /teacher in {dtype} ({why}); {hint}")
    assert line.endswith(f" ({SHOW}=1 shows where)")
    assert isinstance(refused.value.__cause__, RuntimeError), "and the traceback can be reached"


def test_the_log_of_what_was_not_shown_is_named_where_there_is_one() -> None:
    for said in ("", "what it printed\n"):
        unheard = Unheard()
        unheard.path.write_text(said)
        with (
            pytest.raises(DdkError) as refused,
            Service("vLLM", Path("/t"), "float32", "hf", unheard=unheard).one_line("fails"),
        ):
            raise RuntimeError(DEAD)
        line, log = str(refused.value), unheard.path
        del unheard, refused
        gc.collect()  # an exception and the frames of its traceback hold one another
        assert log.exists() == bool(said)
        assert (f"(its log: {log}; {SHOW}=1 shows where)" in line) == bool(said)
        assert ("see its log above" in line) != bool(said)
    log.unlink()


def test_our_own_slips_are_not_disguised() -> None:
    """Raised in a module of ours: as they are. Raised by what it calls: the engine's."""
    with pytest.raises(AttributeError), service().one_line("cannot serve"):
        engine._from_flat(None, None, make_window().labels, 4, 0.0)
    with pytest.raises(DdkError, match=r"\(AttributeError: "), service().one_line("cannot serve"):
        None.rows()  # type: ignore[attr-defined]


def test_what_the_disk_refuses_and_what_the_user_stops_pass() -> None:
    with pytest.raises(OSError, match="No space"), service().one_line("cannot serve"):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), service().one_line("cannot serve"):
        raise KeyboardInterrupt


def test_the_traceback_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in (False, True):
        with pytest.raises(DdkError), service().one_line("cannot serve"):
            raise RuntimeError(INT8)
        assert ("Traceback" in capsys.readouterr().err) == shown
        monkeypatch.setenv(SHOW, "1")


# --- transformers ---------------------------------------------------------------------------------


def make_window(seed: int = 0, vocab: int = 64) -> Window:
    tokens = np.random.default_rng(seed).integers(0, vocab, 12)
    return Window(f"d/train/0/{seed}", tokens, np.append(tokens[1:], NO_LABEL))


@pytest.mark.parametrize(
    ("raised", "hint"),
    [
        (NotImplementedError("\"addmm_impl\" not implemented for 'Float8'"), "set teacher.dtype: bfloat16, or backend: vllm"),
        (torch.OutOfMemoryError("CUDA out of memory."), "lower teacher.batch_windows, or set teacher.dtype: bfloat16"),
    ],
)  # fmt: skip
def test_transformers_in_a_forward(tmp_path: Path, raised: Exception, hint: str) -> None:
    opened = HfTeacher(make_model(tmp_path, vocab_size=64), manifest.Teacher(model="m", backend="hf"))

    def fails(*_: Any, **__: Any) -> Any:
        raise raised

    handle = opened.model.model.layers[1].register_forward_pre_hook(fails)
    line = f"transformers \\S+ cannot serve {tmp_path} in float32 \\({re.escape(str(raised))}\\); {hint}"
    with pytest.raises(DdkError, match=line):
        opened.select([make_window()], PLAN)
    handle.remove()
    assert len(opened.select([make_window()], PLAN)) == 1, "a batch that is too large breaks nothing"


def test_transformers_with_weights_of_two_types(tmp_path: Path) -> None:
    """Raised under our own line, by torch: not our slip."""
    opened = HfTeacher(make_model(tmp_path, vocab_size=64), manifest.Teacher(model="m", backend="hf"))
    opened.head.layer.bfloat16()
    with pytest.raises(DdkError, match=r"\(.*dtype.*\); set teacher.dtype: bfloat16"):
        opened.select([make_window()], PLAN)


# --- vLLM, by a fake ------------------------------------------------------------------------------


class FakeEngine:
    """In the place of vllm.LLM: says what it is told to say, when it is built or when it serves."""

    at_start: Exception | None = None
    in_generate: Exception | None = None
    in_worker: Exception | None = None  # raised there, and noted, if the driver has told it where

    def __init__(self, **_: Any) -> None:
        self.asked = 0
        if self.at_start:
            raise self.at_start

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "ddk_note_failures":
            self.step = noting(self._step, *args)
        return ["v1"]

    def generate(self, *_: Any, **__: Any) -> list[Any]:
        self.asked += 1
        try:
            self.step()
        except Exception:
            if not self.in_generate:
                raise
        if self.in_generate:
            raise self.in_generate
        return []

    def _step(self) -> None:
        if self.in_worker:
            raise self.in_worker


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher's folder; `vllm` is a fake with FakeEngine in it."""
    fake: Any = ModuleType("vllm")
    fake.__version__, fake.LLM, fake.SamplingParams = "0.32.0", FakeEngine, SimpleNamespace
    inputs: Any = ModuleType("vllm.inputs")
    inputs.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.setattr(engine, "import_vllm", lambda: fake)
    monkeypatch.setattr(engine, "set_environment", lambda *_: None)
    return make_model(tmp_path, vocab_size=64)


def open_vllm(folder: Path) -> VllmTeacher:
    return VllmTeacher(folder, manifest.Teacher(model="m", backend="vllm"), seq_len=12)


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("torch.float32 is not supported for awq."),
        RuntimeError("CUDA out of memory."),
        RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
    ],
)
def test_vllm_at_its_start(fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    monkeypatch.setattr(FakeEngine, "at_start", problem)
    with pytest.raises(DdkError, match=rf"vLLM 0.32.0 does not take {fake_vllm} in float32") as refused:
        open_vllm(fake_vllm)
    assert str(problem) in refused.value.message


@pytest.mark.parametrize("elsewhere", [False, True])
def test_vllm_while_it_serves(fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """In this process its own words arrive; from another only that it is dead, and the words are where it noted them."""
    monkeypatch.setattr(FakeEngine, "in_worker", RuntimeError(f"{INT8}\nframe #0"))
    if elsewhere:
        monkeypatch.setattr(FakeEngine, "in_generate", EngineDeadError(DEAD))
    opened = open_vllm(fake_vllm)
    line = (
        f"teacher.model: vLLM 0.32.0 cannot serve {fake_vllm} in float32 ({INT8});"
        f" set teacher.dtype: bfloat16, or backend: hf ({SHOW}=1 shows where)"
    )
    for _ in range(2):
        with pytest.raises(DdkError) as refused:
            opened.select([make_window()], PLAN)
        assert str(refused.value) == line
    assert opened.engine.asked == 1, "what it had begun would be among its next answers"
    opened.close()
    assert not opened._notes.exists()


def test_vllm_killed_without_a_word(fake_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "in_generate", EngineDeadError(DEAD))
    with pytest.raises(
        DdkError, match=r"\(EngineDeadError: EngineCore .*; see its log above; if it was killed"
    ):
        open_vllm(fake_vllm).select([make_window()], PLAN)


def test_the_extension_notes_what_a_step_raises(tmp_path: Path) -> None:
    class Worker(SelectionExtension):
        """vLLM's, of a version without sample_tokens."""

        def execute_model(self, number: int) -> int:
            if number < 0:
                raise RuntimeError(f"{INT8} {number}\nframe #0")
            return number

    worker, notes = Worker(), tmp_path / "notes"
    worker.ddk_note_failures(str(notes))
    assert worker.execute_model(3) == 3 and not notes.exists()
    for number in (-1, -2):
        with pytest.raises(RuntimeError, match="frame #0"):
            worker.execute_model(number)
    assert notes.read_text() == f"{INT8} -1\n{INT8} -2\n"
