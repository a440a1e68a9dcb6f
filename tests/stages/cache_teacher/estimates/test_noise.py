"""The noise that is estimated from draws, against that of the dense distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import make_plan

from ddk_pipe.pipeline.targets import Codec, Context, Kept, Plan, Ranks, SparseTargets, label_codes, select
from ddk_pipe.stages.cache_teacher.estimates.noise import added_noise

ROWS, VOCAB = 6000, 300


def dense(spread: float) -> torch.Tensor:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    return torch.log_softmax(logits, dim=1)


def kept(log_p: torch.Tensor, plan: Plan, seed: int) -> Kept:
    uniforms = np.random.default_rng(seed).random((len(log_p), plan.uniforms_per_position))
    return select(log_p.exp(), plan, torch.from_numpy(uniforms))


def drawn(log_p: torch.Tensor, plan: Plan, seed: int) -> SparseTargets:
    return kept(log_p, plan, seed).targets


def coded(log_p: torch.Tensor, plan: Plan, seed: int) -> SparseTargets:
    """As a student reads them: the rounding of the codec included."""
    codec = Codec(plan, Ranks.fit(np.arange(VOCAB)))
    labels = log_p.argmax(1)
    codes = label_codes(log_p.gather(1, labels[:, None])[:, 0].numpy(), plan.seed, f"window {seed}")
    context = Context(labels.numpy(), codes, f"window {seed}")
    return codec.decode(codec.encode(kept(log_p, plan, seed), context), context)


def plans(tau: float) -> tuple[Plan, Plan, Plan]:
    first = make_plan(tau=tau, draws=50, temperatures=(1.0,))
    return first, replace(first, tau=0.01), replace(first, tau=0.02)


def systematic_variance(log_p: torch.Tensor, tau: float) -> float:
    """Exactly what `pps` adds: a token of the rest comes floor(p/s) or one time more, s = R/n the share of a draw."""
    p = log_p.double().exp().numpy()
    rest = np.where(p < tau, p, 0.0)
    mass = rest.sum(1, keepdims=True)
    share = mass / np.maximum(np.ceil(mass / tau), 1)
    times = rest / np.maximum(share, 1e-300)
    chance = times - np.floor(times)
    return float((share**2 * chance * (1 - chance)).sum() / (1 - (p**2).sum(1)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.5, 3.0])
@pytest.mark.parametrize("tau", [0.05, 0.02, 0.005])
def test_noise_of_pps_is_that_of_the_dense_distribution(spread: float, tau: float) -> None:
    log_p = dense(spread)
    targets = [drawn(log_p, plan, seed) for seed, plan in enumerate(plans(tau))]
    assert added_noise(*targets) == pytest.approx(systematic_variance(log_p, tau), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [20, 50])
def test_noise_of_random_sampling_is_one_nth(draws: int) -> None:
    log_p = dense(2.0)
    own, *others = plans(0.02)
    targets = [drawn(log_p, replace(own, scheme="random", draws=draws), 5)]
    targets += [drawn(log_p, plan, seed) for seed, plan in enumerate(others)]
    assert added_noise(*targets) == pytest.approx(1 / draws, rel=0.05)


@pytest.mark.slow
def test_rounding_of_the_codec_is_part_of_the_noise() -> None:
    log_p = dense(3.0)
    raw = added_noise(*(drawn(log_p, plan, seed) for seed, plan in enumerate(plans(0.005))))
    rounded = added_noise(*(coded(log_p, plan, seed) for seed, plan in enumerate(plans(0.005))))
    assert rounded > raw
