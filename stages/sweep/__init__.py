"""`ddk-pipe sweep`: many runs of `distill` over one cache, one after the other, in processes or on Ray, and their table.

A run is handed out whole; how it trains is distill's business.
"""

from ddk_pipe.stages.sweep.record import read_record
from ddk_pipe.stages.sweep.stage import Request, status, sweep
from ddk_pipe.stages.sweep.stop import STOPPED
from ddk_pipe.stages.sweep.table import note_of, read_note

__all__ = ["STOPPED", "Request", "note_of", "read_note", "read_record", "status", "sweep"]
