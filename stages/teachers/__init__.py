"""Teachers behind one protocol, transformers and vLLM; each engine is imported in its own module, when it is opened.

A teacher turns windows of tokens into selected targets and knows nothing of shards.
"""

from ddk_pipe.stages.teachers.opening import choose_backend, open_hf, open_teacher
from ddk_pipe.stages.teachers.precision import widens
from ddk_pipe.stages.teachers.protocol import Teacher, Window
from ddk_pipe.stages.teachers.vllm.limits import check_capture, check_head

__all__ = [
    "Teacher",
    "Window",
    "check_capture",
    "check_head",
    "choose_backend",
    "open_hf",
    "open_teacher",
    "widens",
]
