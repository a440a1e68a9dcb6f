"""How often the host reads what the device has found: seldom enough that it does not wait, often enough for people."""

from __future__ import annotations

import torch

from ddk_pipe.pipeline.manifest import Distill

LOG_STEPS = 10  # on a GPU, where reading means waiting for it
SECONDS = 2.0  # between two readings, if a step is no longer: of what a stop leaves of its grace period


def log_steps(options: Distill, device: torch.device) -> int:
    """Most steps between two readings; on a CPU, where nothing is queued, each step is read unless the manifest says
    otherwise."""
    return options.log_steps or (1 if device.type == "cpu" else LOG_STEPS)


class Pace:
    """When to read next: after the first step, then every `most` steps or about `SECONDS`, whichever comes first."""

    def __init__(self, done: int, most: int) -> None:
        self._most, self._next = most, done + 1

    def due(self, step: int) -> bool:
        """Whether it is time after `step` steps."""
        return step >= self._next

    def read(self, step: int, seconds: float) -> None:
        """What was found was read after `step` steps, which take `seconds` each: the same number on every process."""
        self._next = step + max(1, min(self._most, int(SECONDS / max(seconds, 1e-9))))
