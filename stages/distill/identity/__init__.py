"""What a run was made of, by name and digest: its settings, its cache or tokens, what its student started from.

Kept in the run's folder as identity.json and compared whenever `distill` meets that folder again.
"""

from ddk_pipe.stages.distill.identity.record import Identity
from ddk_pipe.stages.distill.identity.standing import begin, finished_run

__all__ = ["Identity", "begin", "finished_run"]
