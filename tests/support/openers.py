"""Stand-ins for teachers, as plain values that other processes can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddk_pipe.pipeline.errors import DdkError


@dataclass(frozen=True)
class Refuses:
    """Opens no teacher."""

    why: str

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise DdkError(self.why, hint="none")
