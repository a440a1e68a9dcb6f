"""`ddk-pipe evaluate`: a student measured on the cached validation windows, and by lm-eval's tasks.

No teacher is loaded.
"""

from ddk_pipe.stages.evaluate.stage import Request, evaluate, to_text

__all__ = ["Request", "evaluate", "to_text"]
