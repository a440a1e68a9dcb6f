"""The student of a run: built from a model, a configuration or the teacher's layers, and saved as an ordinary model folder.

`prove_saved` holds before the first step that what is saved is what is trained.
"""

from ddk_pipe.stages.distill.students.building import build_student, needs_rows_apart, origin
from ddk_pipe.stages.distill.students.module import DistillStudent, logit_softcap
from ddk_pipe.stages.distill.students.proof import prove_saved
from ddk_pipe.stages.distill.students.saving import save_student, shared_tokenizer

__all__ = [
    "DistillStudent",
    "build_student",
    "logit_softcap",
    "needs_rows_apart",
    "origin",
    "prove_saved",
    "save_student",
    "shared_tokenizer",
]
