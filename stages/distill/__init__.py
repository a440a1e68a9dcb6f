"""`ddk-pipe distill`: one student's training from the cache (or beside the teacher), from its first weights to its folder.

`stage` is where it begins, and `run` the order in which the files beside it act.
"""

from ddk_pipe.stages.distill.batches import Batch, BatchMaker
from ddk_pipe.stages.distill.identity import finished_run
from ddk_pipe.stages.distill.said import say_once
from ddk_pipe.stages.distill.sources import teacher_ce
from ddk_pipe.stages.distill.stage import distill
from ddk_pipe.stages.distill.students import DistillStudent, logit_softcap

__all__ = [
    "Batch",
    "BatchMaker",
    "DistillStudent",
    "distill",
    "finished_run",
    "logit_softcap",
    "say_once",
    "teacher_ce",
]
