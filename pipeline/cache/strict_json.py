"""Small JSON files that may come from a stranger: cache.json and the commit records."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from ddk_pipe.pipeline.cache.damage import RESTORE, unreadable
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder

MOST_JSON_BYTES = 16 << 20  # parsed, JSON may take 24 times its bytes
Text = Annotated[str, Field(max_length=256)]


class Strict(pydantic.BaseModel):
    """JSON from a stranger: exact types, finite numbers."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def read_json(folder: Folder, name: str, *, hint: str = RESTORE) -> bytes:
    """A small file; raises DdkError if it is suspiciously large or damaged, FileNotFoundError if it is not there."""
    try:
        return folder.read(name, most=MOST_JSON_BYTES)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise unreadable(folder, name, problem, hint=hint) from None
    except ValueError as problem:
        raise DdkError(str(problem), hint=hint) from None
