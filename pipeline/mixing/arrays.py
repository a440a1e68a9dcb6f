"""Float64 arrays of shape [domains]: what they may hold, and how they are brought to it.

Raises ValueError for what they may not hold, naming the array and the domain's index.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = Sequence[int] | NDArray[np.int64] | FloatArray

_SUM_SLACK = 1e-6  # weights that went through float32 or a rounded report still pass
_LARGEST = np.finfo(np.float64).max


def check_weights(weights: FloatArray, *, domains: int) -> FloatArray:
    """The weights as a float64 array [domains], scaled to sum to 1 without rounding left over.

    Raises ValueError for another shape, for a value that is negative or not finite (naming the
    domain's index), and for a sum further than 1e-6 from 1.
    """
    values = _finite_vector("weights", weights)
    if values.shape != (domains,):
        raise ValueError(f"weights has {values.size} domains, expected {domains}")
    _refuse_negative("weights", values)
    if abs(values.sum() - 1.0) > _SUM_SLACK:
        raise ValueError(f"weights must sum to 1, got {values.sum()}")
    return normalised(values)


def check_mixture(
    weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(weights, student_ce - teacher_ce in nats), both valid and [domains]."""
    gap_nats = gap_between(student_ce, teacher_ce)
    return check_weights(weights, domains=gap_nats.size), gap_nats


def gap_between(
    above: FloatArray, below: FloatArray, names: tuple[str, str] = ("student_ce", "teacher_ce")
) -> FloatArray:
    """above - below in nats, [domains]; `names` are what the two are called where one is refused."""
    first, second = _finite_vector(names[0], above), _finite_vector(names[1], below)
    if first.shape != second.shape:
        raise ValueError(f"{names[0]} has {first.size} domains and {names[1]} has {second.size}")
    with np.errstate(over="ignore"):
        return clipped(first - second)


def proportional(sizes: Sizes, *, domains: int) -> FloatArray:
    """Weights in proportion to `sizes`, [domains]; refused where all are 0."""
    values = _finite_vector("sizes", sizes)
    if values.size != domains:
        raise ValueError(f"sizes has {values.size} domains, expected {domains}")
    _refuse_negative("sizes", values)
    if not values.any():
        raise ValueError("sizes are all 0: no domain has a window to draw")
    return normalised(values)


def normalised(values: FloatArray) -> FloatArray:
    """Values >= 0, not all 0, scaled to sum to 1."""
    scaled = values / values.max()  # so that the sum cannot overflow
    shares: FloatArray = scaled / scaled.sum()
    return shares


def clipped(values: FloatArray) -> FloatArray:
    """Infinities from overflow become the largest float, so that differences stay defined."""
    return np.clip(values, -_LARGEST, _LARGEST)


def check_share(name: str, value: float) -> float:
    """The value, if it lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return value


def _finite_vector(name: str, values: Sizes) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must have shape [domains], got {list(vector.shape)}")
    wrong = np.flatnonzero(~np.isfinite(vector))
    if wrong.size:
        raise ValueError(f"{name} of domain {wrong[0]} is {vector[wrong[0]]}, not a finite number")
    return vector


def _refuse_negative(name: str, values: FloatArray) -> None:
    wrong = np.flatnonzero(values < 0)
    if wrong.size:
        raise ValueError(f"{name} of domain {wrong[0]} is {values[wrong[0]]}, below 0")
