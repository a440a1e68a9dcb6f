import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.codec import LOG_STEPS, Codec, Ranks, decode_log, encode_log
from ddk_pipe.pipeline.selection import Plan, select_logits
from ddk_pipe.pipeline.targets import SparseTargets

SCHEMES = ("pps", "threshold", "topk", "random")


def plan(scheme: str, tau: float = 0.02, k: int = 8) -> Plan:
    return Plan(scheme, tau, k, 16, 50, (1.0,), 0)


def some_targets(scheme: Plan, vocab: int, positions: int, seed: int, scale: float = 3.0) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, vocab, generator=generator) * scale
    labels = torch.randint(-1, vocab, (positions,), generator=generator)  # some positions without a label
    uniforms = torch.from_numpy(scheme.uniforms(f"w{seed}", positions))
    return select_logits(logits, labels, scheme, uniforms).targets[0]


def ranks(vocab: int, seed: int = 0) -> Ranks:
    return Ranks.fit(np.random.default_rng(seed).integers(0, 1000, vocab))


@given(
    scheme=st.sampled_from(SCHEMES),
    vocab=st.sampled_from([2, 37, 1000, 70_000]),
    positions=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
@settings(max_examples=80, deadline=None)
def test_round_trip_keeps_ids_and_bounds_the_weights(
    scheme: str, vocab: int, positions: int, seed: int, scale: float
) -> None:
    chosen = plan(scheme)
    codec = Codec(chosen, ranks(vocab))
    before = some_targets(chosen, vocab, positions, seed, scale)
    after = codec.decode(codec.encode(before))
    after.validate(vocab)
    for row in range(positions):
        old = dict(zip(before.ids[row].tolist(), before.logprobs[row].double().exp().tolist(), strict=True))
        new = dict(zip(after.ids[row].tolist(), after.logprobs[row].double().exp().tolist(), strict=True))
        old.pop(-1, None), new.pop(-1, None)
        lost = set(old) - set(new)  # only what the coarsest code rounds to nothing
        assert set(new) <= set(old) and sum(old[token] for token in lost) < 1e-6
        slack = sum(codec.error_bound(weight) for weight in old.values()) + 1e-4
        assert all(abs(new[token] - old[token]) <= slack for token in new)
    if chosen.has_tail:
        finite = before.tail > -31  # the code allows half a step, and decoding may use all of it
        assert torch.allclose(before.tail[finite], after.tail[finite], atol=1 / LOG_STEPS + 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_bound_holds_for_single_weights(scheme: str) -> None:
    """Before normalisation, over a fine grid of weights: the code nearest to w is within error_bound(w)."""
    codec = Codec(plan(scheme, tau=0.01), ranks(10))
    weights = np.linspace(0.01, 1.0, 2000)
    if scheme == "random":
        assert codec.error_bound(0.3) == 0.0
        return
    decoded = codec._table[codec._codes(weights)]
    bounds = np.array([codec.error_bound(weight) for weight in weights])
    assert (np.abs(decoded - weights) <= bounds + 1e-12).all()
    assert bounds.max() < (0.006 if codec.lowest else 0.009)


def test_random_counts_are_exact() -> None:
    chosen = plan("random")
    codec = Codec(chosen, ranks(200))
    before = some_targets(chosen, 200, 12, 1)
    after = codec.decode(codec.encode(before))
    assert after.ids.equal(before.ids) and torch.allclose(after.logprobs, before.logprobs, atol=1e-6)


def test_decoded_pps_stays_unbiased_within_the_quantiser_bound() -> None:
    """Mean over draws of the decoded weights against the exact probabilities."""
    chosen = plan("pps")
    codec = Codec(chosen, ranks(400))
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(9)) * 2.5
    p = torch.softmax(logits.double(), 1)[0]
    total, squares, draws = torch.zeros(400).double(), torch.zeros(400).double(), 400
    uniforms = torch.rand(1, draws, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    selected = select_logits(logits.expand(draws, -1), torch.zeros(draws).long(), chosen, uniforms).targets[0]
    decoded = codec.decode(codec.encode(selected))
    weights = torch.zeros(draws, 401).double()
    weights.scatter_(1, decoded.ids.long() % 401, decoded.logprobs.double().exp())
    weights = weights[:, :400]
    total, squares = weights.mean(0), weights.std(0)
    bound = sum(codec.error_bound(float(x)) for x in p[p >= chosen.tau])
    assert bool(((total - p).abs() <= 5 * squares / draws**0.5 + bound).all())
    assert float((total - p).abs().sum()) < 0.2  # the bound above is not what makes this pass


def test_u32_gaps_for_large_vocabularies() -> None:
    assert Codec(plan("pps"), ranks(65_536)).gap_dtype == np.dtype("u2")
    assert Codec(plan("pps"), ranks(65_537)).gap_dtype == np.dtype("u4")


def test_first_and_last_id_survive() -> None:
    codec = Codec(plan("topk"), Ranks.of(np.arange(100, dtype=np.int32)[::-1].copy()))
    targets = SparseTargets(
        ids=torch.tensor([[0, 99]], dtype=torch.int32),
        logprobs=torch.tensor([[0.25, 0.5]]).log(),
        tail=torch.tensor([0.25]).log(),
    )
    assert codec.decode(codec.encode(targets)).ids.tolist() == [[0, 99]]


def test_duplicate_ids_are_refused() -> None:
    targets = SparseTargets(
        ids=torch.tensor([[5, 5]], dtype=torch.int32),
        logprobs=torch.tensor([[0.5, 0.5]]).log(),
        tail=torch.tensor([float("-inf")]),
    )
    with pytest.raises(ValueError, match="duplicate id"):
        Codec(plan("pps"), ranks(10)).encode(targets)


@pytest.mark.parametrize("damage", ["explicit", "gaps", "codes", "far", "more"])
def test_planes_that_contradict_each_other_are_refused(damage: str) -> None:
    codec = Codec(plan("topk"), ranks(50))
    planes = codec.encode(some_targets(plan("topk"), 50, 4, 0))
    if damage == "explicit":
        planes["explicit"] = planes["explicit"] + np.uint16(1)
    elif damage == "more":
        planes["gaps"] = np.append(planes["gaps"], np.uint16(3))
    elif damage == "far":
        planes["gaps"] = np.full_like(planes["gaps"], 60)
    else:
        planes[damage] = planes[damage][1:]
    with pytest.raises(ValueError):
        codec.decode(planes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_planes_are_as_announced_and_may_be_padded(scheme: str) -> None:
    codec = Codec(plan(scheme), ranks(200))
    planes = codec.encode(some_targets(plan(scheme), 200, 6, 0))
    assert {name: values.dtype for name, values in planes.items()} == codec.planes
    padded = {
        name: np.pad(values, (0, 7 * (name in ("gaps", "codes")))).astype(values.dtype)
        for name, values in planes.items()
    }
    one, other = codec.decode(planes), codec.decode(padded)
    assert one.ids.equal(other.ids) and one.logprobs.equal(other.logprobs) and one.tail.equal(other.tail)


def test_log_codes() -> None:
    values = np.array([0.0, -0.5, -31.9, -100.0, -np.inf, np.nan])
    codes = encode_log(values)
    assert codes.tolist()[3:] == [65534, 65535, 65535]
    assert np.abs(decode_log(codes[:3], none=0.0) - values[:3]).max() <= 0.5 / LOG_STEPS + 1e-6
    assert np.isnan(decode_log(codes[5:], none=np.nan)[0])


def test_rank_tables() -> None:
    table = Ranks.fit(np.array([3, 9, 3, 0]))
    assert table.id_of.tolist() == [1, 0, 2, 3] and table.rank_of.tolist() == [1, 0, 2, 3]
    with pytest.raises(ValueError, match="permutation"):
        Ranks.of(np.array([0, 0, 1], np.int32))
    with pytest.raises(ValueError, match="outside"):
        Ranks.of(np.array([0, 7], np.int32))
