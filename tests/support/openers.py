"""Stand-ins for teachers, as plain values that other processes can read."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.targets import Plan, Selected
from ddk_pipe.stages.teachers import Teacher, Window, open_teacher


@dataclass(frozen=True)
class Refuses:
    """Opens no teacher."""

    why: str

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise DdkError(self.why, hint="none")


class Wrapped:
    """A teacher, with something before each of its calls."""

    def __init__(self, before: Callable[[list[Window]], None], teacher: Teacher) -> None:
        self.teacher, self.before = teacher, before
        self.vocab_size = self.teacher.vocab_size

    def describe(self) -> dict[str, Any]:
        return self.teacher.describe()

    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        self.before(windows)
        return self.teacher.select(windows, plan)

    def close(self) -> None:
        self.teacher.close()


@dataclass(frozen=True)
class Fails:
    """Opens the real teacher, whose model raises these words as a kernel does: from windows of `shard` on."""

    shard: str  # as window keys begin
    words: str

    def __call__(self, *arguments: Any, **options: Any) -> Teacher:
        opened: Any = open_teacher(*arguments, **options)

        def before(windows: list[Window]) -> None:
            if windows[0].key.startswith(self.shard):
                opened.model.base_model.register_forward_pre_hook(self._kernel)

        return Wrapped(before, opened)

    def _kernel(self, *_: Any) -> None:
        raise RuntimeError(f"{self.words}\nframe #0")


@dataclass(frozen=True)
class DiesOnce:
    """Opens the real teacher. The first process whose teacher is given windows of `shard` is killed there; its number
    is left in the file `note`."""

    shard: str  # as window keys begin: "<domain>/<split>/<number>/"
    note: Path

    def __call__(self, *arguments: Any, **options: Any) -> Teacher:
        return Wrapped(self._die, open_teacher(*arguments, **options))

    def _die(self, windows: list[Window]) -> None:
        if windows[0].key.startswith(self.shard) and not self.note.exists():
            self.note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
