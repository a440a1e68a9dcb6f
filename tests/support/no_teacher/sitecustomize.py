"""On a program's path, this module makes every import that could bring up a teacher an error, in its children too."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

FORBIDDEN = (
    "vllm",
    "ddk_pipe.stages.teachers",
    "ddk_pipe.stages.cache_teacher.stage",
    "ddk_pipe.stages.cache_teacher.maker",
)


class Guard(importlib.abc.MetaPathFinder):
    """Refuses the modules above."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in FORBIDDEN:
            raise RuntimeError(f"import guard: {name} was imported, which loads teachers")
        return None


sys.meta_path.insert(0, Guard())
