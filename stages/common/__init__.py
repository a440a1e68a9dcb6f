"""What several commands share: progress, the machine, stopping, tables, a run's record as others read it, a Ray cluster.

Knows no command.
"""

from ddk_pipe.stages.common.locking import alone
from ddk_pipe.stages.common.machine import SPREAD, peak_memory_bytes, pick_device, pick_dtype, prepare_cpu
from ddk_pipe.stages.common.progress import Tracker, clock, console, say, track
from ddk_pipe.stages.common.ray_cluster import MAX_RESTARTS, check_engine, connect
from ddk_pipe.stages.common.record import (
    EVALUATION,
    RunRecord,
    check_student,
    domain_rows,
    evaluation_tables,
    is_run,
    load_run,
    read_student_record,
    write_student_record,
)
from ddk_pipe.stages.common.stopping import (
    StopFlag,
    StoppedEarly,
    Terminated,
    gone_in_time,
    grace_seconds,
    stop_flag,
    stops_in_time,
)
from ddk_pipe.stages.common.tables import TableData, new_table, perplexity, show_table, terminal
from ddk_pipe.stages.common.unheard import Unheard

__all__ = [
    "EVALUATION",
    "MAX_RESTARTS",
    "SPREAD",
    "RunRecord",
    "StopFlag",
    "StoppedEarly",
    "TableData",
    "Terminated",
    "Tracker",
    "Unheard",
    "alone",
    "check_engine",
    "check_student",
    "clock",
    "connect",
    "console",
    "domain_rows",
    "evaluation_tables",
    "gone_in_time",
    "grace_seconds",
    "is_run",
    "load_run",
    "new_table",
    "peak_memory_bytes",
    "perplexity",
    "pick_device",
    "pick_dtype",
    "prepare_cpu",
    "read_student_record",
    "say",
    "show_table",
    "stop_flag",
    "stops_in_time",
    "terminal",
    "track",
    "write_student_record",
]
