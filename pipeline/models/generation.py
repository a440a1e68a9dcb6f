"""Generation settings beside a model's weights, which transformers reads in any state and saves in a sound one only."""

from __future__ import annotations

import copy
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason

MODES = ("do_sample", "num_beams", "num_beam_groups", "use_cache", "return_dict_in_generate")
WRONG = (ValueError, TypeError, AttributeError)  # of values that are not what they should be


def mend_generation(config: Any, *, field: str) -> list[str]:
    """Reset, in place, the settings of a transformers GenerationConfig that it refuses to save; returns their names.

    Such are those that say nothing in the mode that others choose (a temperature where nothing is sampled, early
    stopping without beams). Raises DdkError where each is sound and all together are not.
    """
    names = [name for name in config.to_diff_dict() if hasattr(config, name)]
    dropped = [name for name in names if not _is_sound(_only(config, names, name))]
    for name in dropped:
        _reset(config, name)
    try:
        config.validate(strict=True)
    except WRONG as problem:
        raise DdkError(
            f"{field}: transformers refuses to save its generation settings ({reason(problem)})",
            hint="mend generation_config.json in its folder",
        ) from None
    return dropped


def _only(config: Any, names: list[str], one: str) -> Any:
    """A copy in which, beside the modes, that one alone is set."""
    alone = copy.deepcopy(config)
    for name in names:
        if name != one and name not in MODES:
            _reset(alone, name)
    return alone


def _reset(config: Any, name: str) -> None:
    setattr(config, name, getattr(type(config)(), name, None))


def _is_sound(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except WRONG:
        return False
    return True
