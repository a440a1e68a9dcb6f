"""What a run was made of, by name and digest: its settings, its cache or tokens, what its student started from.

Kept in the run's folder as identity.json and compared whenever `distill` meets that folder again.
"""

from ddk_pipe.stages.distill.identity.record import Identity
from ddk_pipe.stages.distill.identity.standing import Asked, asked_for, begin, finished_run

__all__ = ["Asked", "Identity", "asked_for", "begin", "finished_run"]
