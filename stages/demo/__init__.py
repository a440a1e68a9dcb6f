"""`ddk-pipe demo`: the whole pipeline on real text with a real teacher, both from installed packages.

It runs the other commands as a user would.
"""

from ddk_pipe.stages.demo.stage import demo

__all__ = ["demo"]
