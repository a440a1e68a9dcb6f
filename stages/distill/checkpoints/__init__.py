"""Checkpoints of a run: whole or not there, written beside the steps by one process or all, read by any other number.

    checkpoints/step-00000050/
        position.json        where the run stands (written last, before the folder gets its name)
        *.safetensors        parameters and AdamW's moments, tensors only (see tensor_files)

Learning rates, gamma and the data order are functions of the position, so nothing else is kept. Reading runs no code of
the checkpoint's: nothing is unpickled, neither here nor by torch.
"""

from ddk_pipe.stages.distill.checkpoints.finding import remove_checkpoint
from ddk_pipe.stages.distill.checkpoints.store import Checkpoints

__all__ = ["Checkpoints", "remove_checkpoint"]
