"""`ddk-pipe estimate`: what caches at several settings would cost and how noisy they would be, from a small sample.

Every figure comes from real shards: the sampled windows go through the teacher, the codec and the writer into a
temporary cache, and are read back as a student reads them.
"""

from ddk_pipe.stages.cache_teacher.estimates.stage import estimate

__all__ = ["estimate"]
