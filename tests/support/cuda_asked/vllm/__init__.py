"""A stand-in for vLLM: starts its engine where and as vLLM does, notes what it finds there, and refuses to serve."""

import importlib
import multiprocessing
import os
from typing import Any

__version__ = "0.32.0"


class LLM:
    """In this process, or in one of its own by the method that vLLM reads from the environment."""

    def __init__(self, **_: Any) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":
            context: Any = multiprocessing.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork"))
            engine = context.Process(target=note_engine)
            engine.start()
            engine.join()
        else:
            note_engine()
        raise RuntimeError("the stand-in serves nobody")


def note_engine() -> None:
    """In the engine's process."""
    importlib.import_module("sitecustomize").note("engine")
