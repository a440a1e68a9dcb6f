"""`ddk-pipe inspect` and `ddk-pipe verify`: what tokens, a cache or a run holds, and whether every byte of a cache is sound.

Both read only; `verify --repair` drops what is damaged.
"""

from ddk_pipe.stages.inspect.stage import domain_table, inspect, summarise
from ddk_pipe.stages.inspect.verification import verify

__all__ = ["domain_table", "inspect", "summarise", "verify"]
