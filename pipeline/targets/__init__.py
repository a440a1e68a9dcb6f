"""The value that flows, SparseTargets: how the teacher's distribution becomes one (selection), and bytes (the codec).

Selection and codec are arithmetic; where the bytes go is the cache's business.
"""

from ddk_pipe.pipeline.targets.codec import MOST_ENTRIES, MOST_PADDED, Codec
from ddk_pipe.pipeline.targets.quantisers import LEVELS, LOG_STEPS, NO_LOG, decode_log, encode_log
from ddk_pipe.pipeline.targets.ranks import Ranks
from ddk_pipe.pipeline.targets.rounding import label_codes
from ddk_pipe.pipeline.targets.schemes import top_with_tail
from ddk_pipe.pipeline.targets.selected import Kept, Selected, join, stack_kept
from ddk_pipe.pipeline.targets.selection import (
    Plan,
    head_rows,
    select,
    select_logits,
)
from ddk_pipe.pipeline.targets.sparse import NO_LABEL, PADDING_ID, SparseTargets, stack
from ddk_pipe.pipeline.targets.window import Context, Planes

__all__ = [
    "LEVELS",
    "LOG_STEPS",
    "MOST_ENTRIES",
    "MOST_PADDED",
    "NO_LABEL",
    "NO_LOG",
    "PADDING_ID",
    "Codec",
    "Context",
    "Kept",
    "Plan",
    "Planes",
    "Ranks",
    "Selected",
    "SparseTargets",
    "decode_log",
    "encode_log",
    "head_rows",
    "join",
    "label_codes",
    "select",
    "select_logits",
    "stack",
    "stack_kept",
    "top_with_tail",
]
