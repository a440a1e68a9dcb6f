"""Parts of `ddk-pipe distill`, one job each; `ddk_pipe.stages.distill` is the program."""
