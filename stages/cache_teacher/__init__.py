"""`ddk-pipe cache-teacher` and `ddk-pipe estimate`: the teacher's predictions of every shard, made once, here or on Ray.

Whoever makes a shard commits it itself, so work may be handed out twice, be lost with a worker and be handed out again: each is committed exactly once.
"""

from ddk_pipe.stages.cache_teacher.estimates import estimate
from ddk_pipe.stages.cache_teacher.stage import Request, cache_teacher

__all__ = ["Request", "cache_teacher", "estimate"]
