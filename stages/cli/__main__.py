"""`python -P -m ddk_pipe.stages.cli`: the command where no console script is on the path."""

from ddk_pipe.stages.cli.program import main

main()
