"""`ddk-pipe report`: a run or a sweep as one self-contained page, as pictures and as text.

It reads records and computes no result of its own.
"""

from ddk_pipe.stages.report.stage import report

__all__ = ["report"]
