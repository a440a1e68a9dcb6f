"""What every part of a manifest has in common."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(pydantic.BaseModel):
    """A part of the manifest: values that exist are valid, and never change afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, itself or as an item; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    arguments = getattr(annotation, "__args__", ())
    return next((found for part in arguments if (found := section_in(part))), None)
