import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import Waits

from ddk_pipe.pipeline.targets import Plan, SparseTargets, head_rows, join, select_logits, top_with_tail
from ddk_pipe.pipeline.targets.schemes import pps, random_draws

PEAKED = [0.9, 0.05, 0.03, 0.01, 0.005, 0.005]
FLAT = [1 / 600] * 600  # more than two blocks of the two-level draw
TWO = [0.995, 0.005]
ONE = [1.0]
LONG_TAIL = [0.3, 0.1] + [0.6 / 1000] * 1000
SHAPES = {"peaked": PEAKED, "flat": FLAT, "two": TWO, "one": ONE, "long tail": LONG_TAIL}


def plan(scheme: str = "pps", **changes: object) -> Plan:
    values = {"tau": 0.02, "k": 3, "cap": 4, "draws": 20, "temperatures": (1.0,), "seed": 0, **changes}
    return Plan(scheme=scheme, **values)  # type: ignore[arg-type]


def dense(targets: SparseTargets, vocab: int) -> torch.Tensor:
    """Weights as float64 [N, V], by plain loops."""
    out = torch.zeros(len(targets.ids), vocab, dtype=torch.float64)
    for row in range(len(targets.ids)):
        for token, logprob in zip(targets.ids[row].tolist(), targets.logprobs[row].tolist(), strict=True):
            if token >= 0:
                out[row, token] += math.exp(logprob)
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scheme", ["pps", "random"])
def test_weights_are_unbiased_over_1000_seeds(name: str, scheme: str) -> None:
    """Every token's mean weight within 5 standard errors of its probability."""
    p = torch.tensor(SHAPES[name], dtype=torch.float64)
    rows = p.float()[None].expand(1000, -1).contiguous()
    generator = torch.Generator().manual_seed(1)
    if scheme == "pps":
        targets = pps(rows, 0.02, torch.rand(1000, generator=generator, dtype=torch.float64)).targets
    else:
        targets = random_draws(rows, torch.rand(1000, 20, generator=generator, dtype=torch.float64))
    weights = dense(targets, len(p))
    error = (weights.mean(0) - p).abs()
    allowed = 5 * weights.std(0) / math.sqrt(1000) + 1e-6
    assert bool((error <= allowed).all()), float((error / allowed).max())


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=700),
    tau=st.sampled_from([0.3, 0.05, 0.01]),
    offset=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=100, deadline=None)
def test_pps_keeps_the_head_exactly_and_sums_to_one(logits: list[float], tau: float, offset: float) -> None:
    p = torch.softmax(torch.tensor([logits]), 1)[0]
    targets = pps(p[None], tau, torch.tensor([offset], dtype=torch.float64)).targets
    targets.validate(len(logits))
    weights = dense(targets, len(logits))[0]
    head = p >= tau
    assert torch.allclose(weights[head], p[head].double(), rtol=1e-4)
    rest = float(p.double()[~head].sum())
    below = weights[~head]
    assert len(below[below > 0]) <= math.ceil(rest / tau + 1e-6)
    if rest > 1e-6:
        share = rest / math.ceil(rest / tau)
        assert bool(((below == 0) | (below > 0.99 * min(share, rest))).all())


def test_pps_draws_hit_each_token_its_expected_number_of_times_within_one() -> None:
    """Systematic sampling: at any offset a token is drawn floor or ceil of n p / R times."""
    p = torch.tensor([*([0.019] * 50), 0.05])
    p = p / p.sum()
    for offset in np.linspace(0, 0.999, 23):
        targets = pps(p[None], 0.02, torch.tensor([offset]).double()).targets
        rest = float(p[:50].double().sum())
        draws = math.ceil(rest / 0.02)
        counts = dense(targets, 51)[0, :50] / (rest / draws)
        expected = p[:50].double() * draws / rest
        assert bool((counts >= expected.floor() - 1e-3).all()) and bool(
            (counts <= expected.ceil() + 1e-3).all()
        )


def test_topk_and_threshold_against_sorting() -> None:
    logprobs = torch.log_softmax(torch.randn(7, 50, generator=torch.Generator().manual_seed(3)) * 2, 1)
    for targets, keep in (
        (top_with_tail(logprobs.exp(), 3, floor=0.0), lambda row: row.argsort(descending=True)[:3]),
        (
            top_with_tail(logprobs.exp(), 4, floor=0.05),
            lambda row: [i for i in row.argsort(descending=True)[:4] if row[i].exp() >= 0.05],
        ),
    ):
        targets.validate(50)
        for row in range(7):
            wanted = sorted(int(i) for i in keep(logprobs[row]))
            assert [i for i in targets.ids[row].tolist() if i >= 0] == wanted
            others = [i for i in range(50) if i not in wanted]
            assert float(targets.tail[row]) == pytest.approx(
                float(torch.logsumexp(logprobs[row, others].double(), 0)), abs=1e-5
            )


def test_tail_is_exact_where_one_minus_sum_would_cancel() -> None:
    logits = torch.tensor([[60.0, 1.0, 2.0, 3.0]])
    targets = top_with_tail(torch.softmax(logits, 1), 1, floor=0.0)
    exact = torch.logsumexp(logits[0, 1:].double(), 0) - torch.logsumexp(logits[0].double(), 0)
    assert float(targets.tail[0]) == pytest.approx(float(exact), rel=1e-6)


def test_whole_vocabulary_kept_means_no_tail() -> None:
    targets = top_with_tail(torch.softmax(torch.randn(2, 5), 1), 9, floor=0.0)
    assert targets.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert targets.tail.tolist() == [float("-inf")] * 2


def test_large_vocabulary_keeps_its_tail() -> None:
    """A float32 running sum over 262,144 tiny probabilities would drift; the draws must not."""
    vocab = 262_144
    p = torch.full((1, vocab), 1 / vocab)
    ids = torch.cat(
        [pps(p, 0.02, torch.tensor([o], dtype=torch.float64)).targets.ids for o in np.linspace(0, 0.99, 20)]
    )
    assert 0.48 < float(ids.double().mean()) / vocab < 0.52
    assert int(ids.max()) > 0.98 * vocab and int(ids.min()) < 0.02 * vocab


def test_positions_without_label_get_no_targets() -> None:
    chosen = plan()
    labels = torch.tensor([4, -100, 0, -100])
    uniforms = torch.from_numpy(chosen.uniforms("d/train/0/0", 4))
    selected = select_logits(torch.randn(4, 9), labels, chosen, uniforms)
    assert selected.label_logprobs.isnan().tolist() == [False, True, False, True]
    assert (selected.targets[0].ids >= 0).any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("scheme", ["pps", "topk"])
def test_labels_keep_their_logprob_where_the_probability_underflows(scheme: str) -> None:
    logits = torch.tensor([[0.0, -60.0, -80.0, -150.0, -400.0, 3.0]] * 6)
    labels = torch.arange(6)
    plan = Plan(scheme, 0.02, 6, 256, 50, (1.0, 2.0), 0)
    selected = select_logits(
        logits, labels, plan, torch.full((2, 6, plan.uniforms_per_position), 0.5).double()
    )
    exact = torch.log_softmax(logits.double(), 1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(selected.label_logprobs.double(), exact, rtol=1e-6, atol=1e-6)
    for targets in selected.targets:
        targets.validate(6)


def test_selection_does_not_depend_on_how_positions_are_cut_into_blocks() -> None:
    chosen = plan(temperatures=(1.0, 2.0))
    logits, labels = torch.randn(50, 600) * 3, torch.randint(0, 600, (50,))
    uniforms = torch.from_numpy(chosen.uniforms("d/train/0/7", 50))
    whole = select_logits(logits, labels, chosen, uniforms)
    pieces = join(
        [
            select_logits(logits[i : i + 7], labels[i : i + 7], chosen, uniforms[:, i : i + 7])
            for i in range(0, 50, 7)
        ]
    )
    for one, other in zip(whole.targets, pieces.targets, strict=True):
        assert one.ids.equal(other.ids) and one.logprobs.equal(other.logprobs)
    assert whole.label_logprobs.equal(pieces.label_logprobs)


def test_each_temperature_is_selected_from_its_own_distribution() -> None:
    chosen = plan("topk", temperatures=(1.0, 4.0))
    logits = torch.randn(3, 40) * 4
    selected = select_logits(logits, torch.zeros(3).long(), chosen, torch.from_numpy(chosen.uniforms("k", 3)))
    for temperature, targets in zip((1.0, 4.0), selected.targets, strict=True):
        p = torch.softmax(logits.double() / temperature, 1)
        kept = dense(targets, 40)
        assert torch.allclose(kept[kept > 0], p[kept > 0], atol=1e-5)
        assert torch.allclose(targets.tail.double().exp(), (p * (kept == 0)).sum(1), atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused_only_where_they_matter(bad: float) -> None:
    chosen = plan()
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    uniforms = torch.from_numpy(chosen.uniforms("k", 2))
    select_logits(logits, torch.tensor([1, -100]), chosen, uniforms)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        select_logits(logits, torch.tensor([1, 1]), chosen, uniforms)


def test_draws_are_a_pure_function_of_seed_and_window() -> None:
    one = plan(seed=5).uniforms("a/train/0/3", 8)
    assert (one == plan(seed=5).uniforms("a/train/0/3", 8)).all()
    assert not (one == plan(seed=6).uniforms("a/train/0/3", 8)).any()
    assert not (one == plan(seed=5).uniforms("a/train/0/4", 8)).any()
    assert plan("random").uniforms("k", 8).shape == (1, 8, 20)
    assert plan("topk").uniforms("k", 8).shape == (1, 8, 0)


def test_settings_name_only_what_the_scheme_depends_on() -> None:
    assert plan("topk").settings() == {"scheme": "topk", "k": 3, "temperatures": [1.0]}
    assert "seed" in plan("pps").settings() and "k" not in plan("pps").settings()
    assert Plan.from_dict(plan().to_dict()) == plan()


def test_head_rows_bound_the_memory() -> None:
    assert head_rows(49_152) * 49_152 * 4 <= 256 << 20
    assert head_rows(10_000_000) == 16


# --- elsewhere than on a CPU: run here with the sizes of there ------------------------------------


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked of the device freely: tensors are as wide as they could be."""
    monkeypatch.setattr("ddk_pipe.pipeline.targets.schemes.ASKED_FREELY", set())


SCHEMES = ["pps", "threshold", "topk", "random"]


@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([3, 256, 700]),
    scale=st.sampled_from([0.01, 2.0, 60.0]),
    tau=st.sampled_from([0.5, 0.02, 0.004]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=30, deadline=None)
def test_the_same_is_selected_elsewhere(
    scheme: str, seed: int, vocab: int, scale: float, tau: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(9, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(-2, vocab, (9,), generator=generator)
    chosen = plan(scheme, tau=tau, temperatures=(1.0, 2.0))
    uniforms = torch.from_numpy(chosen.uniforms(f"{seed}", 9))
    here = select_logits(logits, labels, chosen, uniforms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_pipe.pipeline.targets.schemes.ASKED_FREELY", set())
        there = select_logits(logits, labels, chosen, uniforms)
    assert torch.equal(here.label_logprobs.nan_to_num(), there.label_logprobs.nan_to_num())
    for one, other in zip(here.kept, there.kept, strict=True):
        assert one.targets.ids.equal(other.targets.ids) and one.head.equal(other.head)
        # a row of float64 weights is summed in another order where it is wider
        assert torch.allclose(one.targets.logprobs, other.targets.logprobs, rtol=1e-6, atol=1e-6)
        assert torch.allclose(one.targets.tail, other.targets.tail, rtol=1e-6, atol=1e-6)
        assert torch.allclose(one.mass, other.mass, rtol=1e-12, atol=1e-15)
        other.targets.validate(vocab)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_host_waits_once_a_block(scheme: str, as_elsewhere: None) -> None:
    chosen = plan(scheme, temperatures=(1.0, 2.0))
    labels = torch.arange(40) % 7 - 1
    uniforms = torch.from_numpy(chosen.uniforms("k", 40))
    logits = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)) * 3
    with Waits() as waits:
        select_logits(logits, labels, chosen, uniforms)
    assert waits.counts == {"tolist": 1}


def test_broken_logits_are_refused_elsewhere_too(as_elsewhere: None) -> None:
    """They are found at the end of a block: nothing before may stumble over them."""
    for scheme in SCHEMES:
        chosen = plan(scheme)
        for bad in (float("nan"), float("inf")):
            logits = torch.randn(5, 600)
            logits[3, 7] = bad
            with pytest.raises(FloatingPointError, match="NaN or infinity"):
                select_logits(logits, torch.ones(5).long(), chosen, torch.from_numpy(chosen.uniforms("k", 5)))
