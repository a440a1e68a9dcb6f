"""The command line: `app` is its commands, `main` the entry point of the console script.

Everything heavy is imported inside a command, so that `ddk-pipe --help` brings no torch.
"""

from ddk_pipe.stages.cli.program import app, main

__all__ = ["app", "main"]
