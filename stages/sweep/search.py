"""What a search tries next: Optuna's TPE sampler over the space of a sweep file. The only importer of Optuna.

The trials and their gaps are in the sweep's own records, which are whole after any kill; Optuna is told all of them
anew before every question, and the sampler's seed is of the trial's number. So a search that was killed proposes what
an undisturbed one does, one run at a time, and nothing of Optuna's is kept on the disk.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.manifest import Dimension, Search

ATTEMPTS = 100  # proposals that were tried already before the space counts as used up
DIGITS = 4  # of a proposed number: names and commands stay readable
Values = dict[str, Any]  # dotted field: value


@dataclass(frozen=True)
class Trial:
    """A group of runs that the search has begun. `gap_nats` is the mean over its seeds, none while unknown."""

    values: Values
    state: Literal["complete", "stopped early", "failed", "running"]
    gap_nats: float | None = None
    step: int = 0  # of a stopped one


def need_optuna() -> None:
    """Raises DdkError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise DdkError("search: optuna is not installed", hint=install_hint("optuna"))


def propose(search: Search, trials: list[Trial]) -> Values | None:
    """The values of the next trial, the same for the same trials; none if the space holds nothing new.

    Source of the sampler: Bergstra et al., Algorithms for hyper-parameter optimization (NeurIPS 2011).
    """
    tried = [trial.values for trial in trials]
    for attempt in range(ATTEMPTS):
        values = _ask(search, trials, attempt)
        if values not in tried:
            return values
    return None


def _ask(search: Search, trials: list[Trial], attempt: int) -> Values:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # choices of other types than text, which only its dashboard minds
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        mixed = np.random.SeedSequence([search.seed, len(trials), attempt]).generate_state(1)
        sampler = optuna.samplers.TPESampler(seed=int(mixed[0]), n_startup_trials=search.random_trials)
        study = optuna.create_study(sampler=sampler)
        parts = {name: _part(dimension) for name, dimension in search.space.items()}
        for trial in trials:
            study.add_trial(_as_optuna(optuna, trial, parts))
        asked = study.ask({name: part.distribution for name, part in parts.items()})
        return {name: part.value(asked.params[name]) for name, part in parts.items()}


@dataclass(frozen=True)
class _Part:
    """A dimension as Optuna knows it. Choices are known by their place: it takes no lists as values."""

    distribution: Any
    value: Callable[[Any], Any]  # of what Optuna proposes
    known: Callable[[Any], Any]  # back


def _part(dimension: Dimension) -> _Part:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    choices, low, high, step = dimension.choices, dimension.low, dimension.high, dimension.step
    if choices is not None:
        return _Part(CategoricalDistribution(range(len(choices))), choices.__getitem__, choices.index)
    assert low is not None and high is not None
    if step is not None and all(isinstance(value, int) for value in (low, high, step)):
        return _Part(IntDistribution(int(low), int(high), step=int(step)), int, int)
    if step is not None:
        return _Part(FloatDistribution(low, high, step=step), lambda value: float(f"{value:.10g}"), float)
    distribution = FloatDistribution(low, high, log=dimension.log)
    return _Part(distribution, lambda value: min(max(float(f"{value:.{DIGITS}g}"), low), high), float)


def _as_optuna(optuna: Any, trial: Trial, parts: dict[str, _Part]) -> Any:
    states = optuna.trial.TrialState
    stopped, complete = trial.state == "stopped early", trial.state == "complete"
    state = {"complete": states.COMPLETE, "stopped early": states.PRUNED, "failed": states.FAIL}
    return optuna.trial.create_trial(
        state=state.get(trial.state, states.RUNNING),
        value=trial.gap_nats if complete else None,
        params={name: part.known(trial.values[name]) for name, part in parts.items()},
        distributions={name: part.distribution for name, part in parts.items()},
        intermediate_values={trial.step: trial.gap_nats} if stopped else {},
    )
