"""A run's record as others read it, and its figures as rows of text.

The run itself writes it by `pipeline.metrics`.
"""

from ddk_pipe.stages.common.record.run import EVALUATION, RunRecord, is_run, load_run
from ddk_pipe.stages.common.record.tables import domain_rows, evaluation_tables

__all__ = ["EVALUATION", "RunRecord", "domain_rows", "evaluation_tables", "is_run", "load_run"]
