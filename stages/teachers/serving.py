"""What an engine raises, while it loads a teacher or runs it, becomes one line with a hint."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import Unheard
from ddk_pipe.stages.teachers.precision import OTHERWISE

OURS = __name__.split(".")[0] + "."
SHOW = "DDK_PIPE_TRACEBACK"  # environment: print the whole traceback as well
# words of an exception that only says where to look
ELSEWHERE = re.compile(r"stack trace|root cause", re.IGNORECASE)
CACHE = re.compile(r"kv.?cache|cache blocks", re.IGNORECASE)
MEMORY = re.compile(
    r"out of memory|(can't|cannot|unable to) allocate|not enough memory|bad_alloc|MemoryError", re.IGNORECASE
)
HEAD = re.compile(r"head_dtype")  # vLLM, of an output layer that is quantised
LENGTH = re.compile(r"max_model_len|longer than|maximum (model|context|sequence) length", re.IGNORECASE)


@dataclass(frozen=True)
class Service:
    """A teacher in an engine: what a user must know to do something about an error of it."""

    engine: str  # with its version, "vLLM 0.32.0"
    folder: Path  # of the teacher
    dtype: str
    other: str  # backend that may do what this one cannot
    batch: str = "teacher.batch_windows"  # what to lower where memory ends
    unheard: Unheard | None = None  # what it and its processes have printed

    @contextmanager
    def one_line(self, fails: str, root: Callable[[], str] = str) -> Iterator[None]:
        """Inside, what the engine raises becomes DdkError("<engine> <fails> <teacher> ...") with a hint.

        `root`: the first cause in words, asked where the exception only says to look elsewhere. What our own code
        raises (a failed assertion, a missing key) is no fault of the engine and passes as it is.
        """
        try:
            yield
        except DdkError:
            raise
        except Exception as problem:
            if _is_ours(problem) or (isinstance(problem, OSError) and durable.explain(problem)):
                raise
            if os.environ.get(SHOW):
                traceback.print_exc()
            raise self.explained(fails, reason(problem, root)) from problem

    def explained(self, fails: str, why: str) -> DdkError:
        """The error in the user's terms."""
        log = self.unheard.keep() if self.unheard else None
        where = f"its log: {log}; " if log else ""
        return DdkError(
            f"teacher.model: {self.engine} {fails} {self.folder} in {self.dtype} ({why})",
            hint=f"{self._hint(why, log)} ({where}{SHOW}=1 shows where)",
        )

    def _hint(self, why: str, log: Path | None) -> str:
        dtype = "bfloat16" if self.dtype == "float32" else "float32"
        if CACHE.search(why):
            return "raise teacher.vllm.gpu_memory_utilization (cpu_kvcache_gib on a CPU), or lower seq_len"
        if MEMORY.search(why):
            return f"lower {self.batch}" + (f", or set teacher.dtype: {dtype}" if dtype != "float32" else "")
        if LENGTH.search(why):
            return f"lower seq_len, or set backend: {self.other}"
        if HEAD.search(why):
            return OTHERWISE
        if ELSEWHERE.search(why):
            return f"see its log{'' if log else ' above'}; if it was killed for want of memory, lower {self.batch}"
        return f"set teacher.dtype: {dtype}, or backend: {self.other}"


def reason(problem: BaseException, root: Callable[[], str] = str) -> str:
    """The most telling words of an exception in one line: its own, unless they only say to look elsewhere.

    Then those of `root()`, if it has any, or of what the exception was raised from.
    """
    said: BaseException | None = problem
    while said is not None and ELSEWHERE.search(_first_line(said)):
        known = root()
        if known:
            return known
        said = said.__cause__
    return _first_line(said or problem)


def _first_line(problem: BaseException) -> str:
    """pydantic wraps its own words around those of others; torch appends its C++ stack."""
    said = problem.errors()[0]["msg"] if isinstance(problem, ValidationError) else str(problem)
    lines = said.removeprefix("Value error, ").strip().splitlines()
    line = " ".join(lines[0].split()) if lines else ""
    plain = isinstance(problem, (RuntimeError, ValueError)) or type(problem) is Exception
    return line if line and plain else f"{type(problem).__name__}: {line}".removesuffix(": ")


def _is_ours(problem: BaseException) -> bool:
    """True of a slip in our own code. A tensor operation of ours that fails (no memory, no such dtype) is none."""
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(problem.__traceback__)]
    return raised_in[-1].startswith(OURS) and not isinstance(problem, (RuntimeError, MemoryError))
