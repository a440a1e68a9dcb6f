"""A run's record as others read it, and its figures as rows of text.

The run itself writes it by `pipeline.metrics`.
"""

from ddk_pipe.stages.common.record.run import EVALUATION, RunRecord, is_run, load_run
from ddk_pipe.stages.common.record.student import check_student, read_student_record, write_student_record
from ddk_pipe.stages.common.record.tables import domain_rows, evaluation_tables

__all__ = [
    "EVALUATION",
    "RunRecord",
    "check_student",
    "domain_rows",
    "evaluation_tables",
    "is_run",
    "load_run",
    "read_student_record",
    "write_student_record",
]
