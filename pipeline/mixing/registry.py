"""A rule by its name, ours or a plug-in of another installed package; and by name what comes before its first update."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing.arrays import (
    FloatArray,
    Sizes,
    check_mixture,
    check_weights,
    gap_between,
    proportional,
)
from ddk_pipe.pipeline.mixing.rules import (
    BEFORE,
    ddk,
    ddk_initial,
    ddk_unsmoothed,
    doremi,
    gap_softmax,
    learnability,
    natural,
    sheared,
    uniform,
)

InitialDraw: TypeAlias = Literal["uniform", "ddk", "natural"]

RULES: Mapping[str, Callable[..., FloatArray]] = MappingProxyType(
    {
        "ddk": ddk,
        "ddk_unsmoothed": ddk_unsmoothed,
        "uniform": uniform,
        "natural": natural,
        "doremi": doremi,
        "sheared": sheared,
        "gap_softmax": gap_softmax,
        "learnability": learnability,
    }
)

PLUG_INS = "ddk_pipe.mixing"  # entry point group of users' own rules

_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ARRAYS = ("weights", "student_ce", "teacher_ce", BEFORE)


class Rule(Protocol):
    """A rule with its options filled in; `student_ce_before` is None where there was no update before."""

    def __call__(
        self,
        weights: FloatArray,
        student_ce: FloatArray,
        teacher_ce: FloatArray,
        *,
        student_ce_before: FloatArray | None = None,
    ) -> FloatArray: ...


def plug_ins() -> dict[str, EntryPoint]:
    """Rules that other installed packages offer, by name; ours win over theirs."""
    return {point.name: point for point in entry_points(group=PLUG_INS) if point.name not in RULES}


def make_rule(
    name: str,
    *,
    alpha: float = 0.5,
    sizes: Sizes,
    prior: FloatArray | None = None,
    largest_ratio: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rule:
    """The rule of that name, with those of the keyword arguments that it takes filled in, and all `options`.

    `sizes` is the number of windows of each domain, shape [domains]. The result is called as
    `rule(weights, student_ce, teacher_ce, student_ce_before=...)`. A name that is not in RULES is
    looked for in the entry point group `ddk_pipe.mixing`; what such a rule returns is checked.
    Raises DdkError for an unknown name or option, naming the nearest, and for a plug-in that cannot
    be loaded; its rule raises DdkError for weights that are none.
    """
    given = dict(options or {})
    offered = {"alpha": alpha, "sizes": sizes, "prior": prior, "largest_ratio": largest_ratio}
    rule = RULES[name] if name in RULES else _plug_in(name)
    takes = [key for key, value in inspect.signature(rule).parameters.items() if value.kind in _BY_NAME]
    known = [key for key in takes if key not in offered and key not in _ARRAYS]
    for key in given:
        if key not in known:
            raise _unknown(f"option of the mixing rule {name}", key, known)
    filled = {key: value for key, value in offered.items() if key in takes}
    ready = functools.partial(rule, **filled, **given)
    return ready if BEFORE in takes else _forgetful(ready)


def _forgetful(rule: Callable[..., FloatArray]) -> Rule:
    """The same rule for callers that give the losses of the update before, too."""

    def without(
        weights: FloatArray,
        student_ce: FloatArray,
        teacher_ce: FloatArray,
        *,
        student_ce_before: FloatArray | None = None,
    ) -> FloatArray:
        return rule(weights, student_ce, teacher_ce)

    return without


def _plug_in(name: str) -> Callable[..., FloatArray]:
    found = plug_ins()
    if name not in found:
        raise _unknown("mixing rule", name, [*RULES, *found])
    try:
        rule = found[name].load()
    except Exception as problem:  # noqa: BLE001 - whatever a user's module raises when imported
        raise DdkError(
            f"mixing rule {name!r}: {found[name].value} cannot be loaded ({problem})",
            hint="mend that package, or use one of our rules",
        ) from None

    @functools.wraps(rule)
    def checked(
        weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray, **options: Any
    ) -> FloatArray:
        check_mixture(weights, student_ce, teacher_ce)
        try:
            return check_weights(rule(weights, student_ce, teacher_ce, **options), domains=len(weights))
        except ValueError as problem:
            raise DdkError(f"mixing rule {name!r}: {problem}", hint=f"mend {found[name].value}") from None

    return checked


def initial_weights(
    initial: InitialDraw, *, student_ce: FloatArray, teacher_ce: FloatArray, sizes: Sizes
) -> FloatArray:
    """What the windows before the first update are drawn from: float64 [domains], sums to 1.

    `uniform` is 1/N, `ddk` is r_0 of Eq. 1, `natural` is in proportion to `sizes` (windows per
    domain). Algorithm 1 of arXiv 2407.16154 prints a random subset, not one drawn by r_0.

    This is the draw only: Eq. 2 still starts from r_0, which is `ddk_initial`, whatever was drawn.
    Raises DdkError for another `initial`, ValueError for losses or sizes that are not valid.
    """
    gap_nats = gap_between(student_ce, teacher_ce)
    if initial == "uniform":
        return np.full_like(gap_nats, 1.0 / gap_nats.size)
    if initial == "ddk":
        return ddk_initial(student_ce, teacher_ce)
    if initial == "natural":
        return proportional(sizes, domains=gap_nats.size)
    raise _unknown("initial draw", initial, get_args(InitialDraw))


def _unknown(what: str, name: str, known: Iterable[str]) -> DdkError:
    names = list(known)
    if not names:
        return DdkError(f"there is no {what} {name!r}", hint="leave it out, it has none")
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return DdkError(f"there is no {what} {name!r}", hint=f"use {nearest!r}, or one of {', '.join(names)}")
