"""Per-domain losses -> domain weights: DDK (arXiv 2407.16154) and its drop-in relatives.

Everything here is a pure function of float64 arrays of shape [domains]:

    student_ce, teacher_ce   mean cross-entropy on each domain's validation windows, nats per token
    weights                  share of the next interval's windows that each domain gets; sums to 1
    gap = student_ce - teacher_ce        nats, positive where the student lags
    ratio = exp(gap)                     the student/teacher perplexity ratio of the paper

Every rule has the signature `rule(weights, student_ce, teacher_ce, **options) -> weights`; one that
names `student_ce_before` also gets the student's losses at the update before. What it returns is
finite, >= 0 and sums to 1. Every rule, also one that does not look at the losses, raises ValueError
for a NaN or infinite loss (naming the domain's index), for a shape that is not [domains], and for
weights that are negative or do not sum to 1.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError

FloatArray: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = Sequence[int] | NDArray[np.int64] | FloatArray
InitialDraw: TypeAlias = Literal["uniform", "ddk", "natural"]


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


_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BEFORE = "student_ce_before"
_ARRAYS = ("weights", "student_ce", "teacher_ce", _BEFORE)
_SUM_SLACK = 1e-6  # weights that went through float32 or a rounded report still pass
_LARGEST = np.finfo(np.float64).max
_LARGEST_EXPONENT = 700.0  # exp(700) is about 1e304, the last round number before overflow


def ddk_initial(student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """Eq. 1 of arXiv 2407.16154: softmax(exp(student_ce - teacher_ce)), float64 [domains].

    This is r_0. No floor holds for it. Exact for any finite losses: where exp(gap) would overflow,
    the result is the limit, in which the domain with the largest gap takes everything.
    Raises ValueError for losses that are not finite (naming the domain) or differ in shape.
    """
    gap_nats = _gap_nats(student_ce, teacher_ce)
    start = np.ones_like(gap_nats)
    return _tilted(start, _ratio_below_largest(gap_nats, start))


def ddk(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    alpha: float = 0.5,
    prior: FloatArray | None = None,
    largest_ratio: float | None = None,
) -> FloatArray:
    """Eq. 2 of arXiv 2407.16154: alpha * psi / sum(psi) + (1 - alpha) / N.

    Here psi = weights * exp(ratio). All arrays are float64 [domains]; `alpha` in [0, 1] has no
    unit, the paper's is 0.5. Each weight of the result lies in [(1 - alpha)/N, alpha + (1 -
    alpha)/N]. At fixed losses the updates settle in about five intervals; alpha = 1 has no floor
    and collapses onto one domain instead.

    Not in the paper: `prior`, shares [domains] that take the place of 1/N, and `largest_ratio`,
    which clamps the ratios from above (a broken domain of ratio 10 would take all of alpha).
    Raises ValueError as the module says, for alpha outside [0, 1], a prior that `check_weights`
    refuses, and a largest_ratio that is not positive.
    """
    weights, gap_nats = _checked(weights, student_ce, teacher_ce)
    if largest_ratio is not None:
        if not largest_ratio > 0:
            raise ValueError(f"largest_ratio must be positive, got {largest_ratio}")
        gap_nats = np.minimum(gap_nats, np.log(largest_ratio))
    psi = _tilted(weights, _ratio_below_largest(gap_nats, weights))
    share = 1.0 - _share("alpha", alpha)
    if prior is None:
        return _mixed_with_uniform(psi, uniform_share=share)
    return _normalised((1.0 - share) * psi + share * check_weights(prior, domains=weights.size))


def ddk_unsmoothed(weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """Eq. 1 of arXiv 2407.16154 recomputed: the paper's ablation "without factor smoothing".

    All arrays are float64 [domains]; the values of `weights` are not used. Raises as the module
    says.
    """
    _checked(weights, student_ce, teacher_ce)
    return ddk_initial(student_ce, teacher_ce)


def uniform(weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """1/N each, whatever the losses: the paper's "equal sampling". Float64 [domains].

    Raises as the module says: a NaN loss stops a uniform run as it stops any other.
    """
    weights, _ = _checked(weights, student_ce, teacher_ce)
    return np.full_like(weights, 1.0 / weights.size)


def natural(
    weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray, *, sizes: Sizes
) -> FloatArray:
    """Weights in proportion to `sizes`, the number of windows of each domain, shape [domains].

    Raises ValueError as the module says, and for sizes that are negative, not finite, all zero or
    of another length.
    """
    weights, _ = _checked(weights, student_ce, teacher_ce)
    return _natural(sizes, domains=weights.size)


def doremi(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    eta: float = 1.0,
    floor: float = 1e-4,
) -> FloatArray:
    """DoReMi's step: w' = w * exp(eta * max(0, gap)) / sum, then (1 - floor) * w' + floor/N.

    All arrays are float64 [domains]; `eta` is per nat; `floor` is the share spread evenly, so each
    weight is at least floor/N. The defaults are those of sangmichaelxie/doremi. Two differences:
    the reference model is the teacher, and the gap is clipped at 0 per domain, not per token.
    Raises ValueError as the module says, for eta < 0 and for floor outside [0, 1].
    """
    weights, gap_nats = _checked(weights, student_ce, teacher_ce)
    return _multiplicative(weights, np.maximum(gap_nats, 0.0), eta=eta, floor=floor)


def sheared(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    eta: float = 1.0,
    floor: float = 1e-4,
) -> FloatArray:
    """Sheared-LLaMA's dynamic loading: softmax(log w + eta * gap), then (1 - floor) * w' + floor/N.

    `doremi` without the clip: a domain where the student leads loses weight. All arrays are float64
    [domains]; `eta` is per nat; each weight is at least floor/N. The defaults are those of
    princeton-nlp/LLM-Shearing; the target loss is the teacher's.
    Raises ValueError as the module says, for eta < 0 and for floor outside [0, 1].
    """
    weights, gap_nats = _checked(weights, student_ce, teacher_ce)
    return _multiplicative(weights, gap_nats, eta=eta, floor=floor)


def gap_softmax(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    temperature: float = 1.0,
) -> FloatArray:
    """softmax(gap / temperature): one exponential where DDK has two, and no memory.

    All arrays are float64 [domains]; `temperature` is in nats; the values of `weights` are not
    used.
    Raises ValueError as the module says, and for a temperature that is not positive and finite.
    """
    weights, gap_nats = _checked(weights, student_ce, teacher_ce)
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    with np.errstate(over="ignore"):
        scores = _clipped(gap_nats / temperature)
    return _tilted(np.ones_like(weights), scores)


def learnability(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    student_ce_before: FloatArray | None = None,
    floor: float = 0.5,
) -> FloatArray:
    """(1 - floor) in proportion to what a window of each domain took off its gap in the last interval, + floor/N.

    All arrays are float64 [domains]; `student_ce_before` are the student's losses before that interval, which was
    drawn by `weights`. The teacher's losses do not change, so that a gap falls by what the student's loss falls; a
    loss that rose counts as 0. A domain whose gap does not close, however large, is left with floor/N: no rule that
    looks at the gaps alone can tell (docs/study.md, "A gap that cannot be closed"). The mix is even where there is
    no interval before, and where no loss fell.
    Not in the DDK paper: the learning progress of curricula (Graves et al. 2017, arXiv 1704.03003), per window.
    Raises ValueError as the module says, for student_ce_before too, and for floor outside [0, 1].
    """
    weights, _ = _checked(weights, student_ce, teacher_ce)
    share = _share("floor", floor)
    even = np.full_like(weights, 1.0 / weights.size)
    if student_ce_before is None:
        return even
    with np.errstate(over="ignore"):
        fallen = np.maximum(_gap_nats(student_ce_before, student_ce, names=(_BEFORE, "student_ce")), 0.0)
        slope = np.divide(fallen, weights, out=np.zeros_like(weights), where=weights > 0)
    return _mixed_with_uniform(_normalised(_clipped(slope)), uniform_share=share) if slope.any() else even


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
    return ready if _BEFORE in takes else _forgetful(ready)


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
        _checked(weights, student_ce, teacher_ce)
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
    gap_nats = _gap_nats(student_ce, teacher_ce)
    if initial == "uniform":
        return np.full_like(gap_nats, 1.0 / gap_nats.size)
    if initial == "ddk":
        return ddk_initial(student_ce, teacher_ce)
    if initial == "natural":
        return _natural(sizes, domains=gap_nats.size)
    raise _unknown("initial draw", initial, get_args(InitialDraw))


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
    return _normalised(values)


def _checked(
    weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(weights, gap in nats), both valid and [domains]."""
    gap_nats = _gap_nats(student_ce, teacher_ce)
    return check_weights(weights, domains=gap_nats.size), gap_nats


def _gap_nats(
    above: FloatArray, below: FloatArray, names: tuple[str, str] = ("student_ce", "teacher_ce")
) -> FloatArray:
    first, second = _finite_vector(names[0], above), _finite_vector(names[1], below)
    if first.shape != second.shape:
        raise ValueError(f"{names[0]} has {first.size} domains and {names[1]} has {second.size}")
    with np.errstate(over="ignore"):
        return _clipped(first - second)


def _ratio_below_largest(gap_nats: FloatArray, weights: FloatArray) -> FloatArray:
    """ratio - (largest ratio of a domain with weight), [domains], without forming a ratio.

    exp(g) - exp(top) = exp(top) * expm1(g - top): at most 0, so only the factor exp(top) can
    overflow. Capping it there changes nothing: it already pushes every lesser domain to weight 0.
    """
    top = gap_nats[weights > 0].max()
    with np.errstate(over="ignore"):
        below = np.minimum(gap_nats - top, 0.0)
    difference: FloatArray = np.exp(min(top, _LARGEST_EXPONENT)) * np.expm1(below)
    return difference


def _tilted(weights: FloatArray, scores: FloatArray) -> FloatArray:
    """weights * exp(scores), scaled to sum to 1, in log space; a weight of 0 stays 0. [domains]"""
    live = weights > 0
    logits = np.log(weights[live]) + scores[live]
    tilted = np.zeros_like(weights)
    with np.errstate(over="ignore"):
        tilted[live] = np.exp(logits - logits.max())
    return _normalised(tilted)


def _multiplicative(weights: FloatArray, gap_nats: FloatArray, *, eta: float, floor: float) -> FloatArray:
    if not (np.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")
    with np.errstate(over="ignore"):
        scores = _clipped(eta * gap_nats)
    return _mixed_with_uniform(_tilted(weights, scores), uniform_share=_share("floor", floor))


def _mixed_with_uniform(weights: FloatArray, *, uniform_share: float) -> FloatArray:
    return _normalised((1.0 - uniform_share) * weights + uniform_share / weights.size)


def _natural(sizes: Sizes, *, domains: int) -> FloatArray:
    values = _finite_vector("sizes", sizes)
    if values.size != domains:
        raise ValueError(f"sizes has {values.size} domains, expected {domains}")
    _refuse_negative("sizes", values)
    if not values.any():
        raise ValueError("sizes are all 0: no domain has a window to draw")
    return _normalised(values)


def _normalised(values: FloatArray) -> FloatArray:
    scaled = values / values.max()  # so that the sum cannot overflow
    shares: FloatArray = scaled / scaled.sum()
    return shares


def _clipped(values: FloatArray) -> FloatArray:
    """Infinities from overflow become the largest float, so that differences stay defined."""
    return np.clip(values, -_LARGEST, _LARGEST)


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


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return value


def _unknown(what: str, name: str, known: Iterable[str]) -> DdkError:
    names = list(known)
    if not names:
        return DdkError(f"there is no {what} {name!r}", hint="leave it out, it has none")
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return DdkError(f"there is no {what} {name!r}", hint=f"use {nearest!r}, or one of {', '.join(names)}")
