"""What every teacher offers: windows in, selections out. Full distributions never leave its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.models import Starts
from ddk_pipe.pipeline.targets import Plan, Selected


@dataclass(frozen=True)
class Window:
    """One window to predict: tokens int64 [seq_len]; labels int64 [seq_len], negative where there is no loss;
    `key` names it for the draws of the selection; starts bool [seq_len]: true where a document begins, which sees itself
    alone (none: each token sees all of the window before it)."""

    key: str
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    starts: Starts | None = None


class Teacher(Protocol):
    """A loaded teacher."""

    @property
    def vocab_size(self) -> int:
        """V: length of the distributions it predicts, without the padding of its output layer."""
        ...

    def describe(self) -> dict[str, Any]:
        """Engine, versions and device, for the record."""
        ...

    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        """The teacher's thinned predictions for all positions of each window, in order, on the CPU.

        Raises DdkError naming the window if the model predicts NaN or infinity, and in one line, with a hint, for
        whatever the engine raises.
        """
        ...

    def close(self) -> None:
        """Give the device back."""
        ...
