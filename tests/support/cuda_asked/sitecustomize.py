"""On a program's path, this module notes every question for a GPU, in its children too; `vllm` is the stand-in beside it.

A line of JSON each in the file DDK_NOTE_CUDA: what was asked for, by which process, and the variables as they were.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

VARIABLES = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD")
QUESTIONS = ("is_available", "device_count")
touched = False  # True where a real CUDA would be no good any more in a forked child; a child has it from its parent


def note(event: str) -> None:
    """One line; O_APPEND keeps those of several processes apart."""
    seen = {name: os.environ.get(name) for name in VARIABLES}
    line = json.dumps({"event": event, "process": os.getpid(), "touched": touched, **seen}) + "\n"
    file = os.open(os.environ["DDK_NOTE_CUDA"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


def noting(name: str, question: Callable[..., Any]) -> Callable[..., Any]:
    """The question, noted before it is asked. Not through NVML it brings CUDA up."""

    def asked(*arguments: Any, **options: Any) -> Any:
        global touched
        note(name)
        touched |= os.environ.get(VARIABLES[0]) != "1"
        return question(*arguments, **options)

    return asked


class Loader(importlib.abc.Loader):
    """torch.cuda as it is, and then its questions replaced."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name in QUESTIONS:
            setattr(module, name, noting(name, getattr(module, name)))


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch.cuda only."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "torch.cuda" else None
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
